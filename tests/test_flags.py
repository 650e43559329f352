"""The command line: flags, recipes, the plan that follows from them, and what is refused.

Numbers in test names are rows of the project's table of faults.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SAMPLE

import evaluation
import multitask_classifier
from config import LEARNING_RATES, LORA_TARGETS, RECIPES, TASKS, UserError
from training.data_files import check_output_paths, data_paths
from training.flags import make_parser, parse_command
from training.plan import make_plan
from training.run_folder import RunFolder, run_path

FULL, LORA = "--fine-tune-mode full-model", "--fine-tune-mode LoRA"
FROZEN, PAIRS = "--fine-tune-mode last-linear-layer", "--pair_encoding"
BEST, SIMCSE = "--recipe best", "--unsupervised_simcse"
HEADS = "--para_head features --sts_head cosine"


pytestmark = pytest.mark.usefixtures("workplace")


def parse(command):
    """The flags of a command line, checked as far as no file is needed."""
    flags = parse_command(shlex.split(command)).flags
    check_output_paths(flags, {})
    return flags


def everything():
    """Every path in the working directory, with the content of files."""
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


def refused(command, pattern, program=parse):
    """Check that a command is the user's mistake: code 2, one line, and every file is as before."""
    before = everything()
    with pytest.raises(UserError, match=pattern) as caught:
        program(command)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert everything() == before


def a_run(command):
    """Leave a run of this command line, whose precision `auto` came to fp32."""
    flags = parse(command)
    values = dict.fromkeys(("command", "encoder", "data")) | {"precision": "fp32"}
    run_path(flags).mkdir(parents=True)
    (run_path(flags) / "run.json").write_text(json.dumps(values | {"args": vars(flags)}))


# fmt: off
STARTER = """
    --sst_train a --sst_dev b --sst_test c --para_train d --para_dev e --para_test f --sts_train g
    --sts_dev h --sts_test i --seed 11711 --epochs 10 --fine-tune-mode full-model --use_gpu
    --sst_dev_out j --sst_test_out k --para_dev_out l --para_test_out m --sts_dev_out n
    --sts_test_out o --batch_size 8 --hidden_dropout_prob 0.3 --lr 1e-5
"""
EXPECTED = {  # command -> values of its flags and of its plan, and the path of its run
    STARTER: {
        "sst_train": "a", "para_dev": "e", "sts_test": "i", "sst_dev_out": "j", "sts_test_out": "o",
        "seed": 11711, "epochs": 10, "batch_size": 8, "use_gpu": True, "hidden_dropout_prob": 0.3,
        "encoder_lr": 1e-5, "fine_tune_mode": "full-model",
    },
    "": {
        "fine_tune_mode": "full-model", "epochs": 10, "batch_size": 8, "weight_decay": 1e-3,
        "LoRA_r": 32, "LoRA_alpha": 16, "LoRA_targets": list(LORA_TARGETS), "pooling": "mean",
        "LoRA_variant": "plain", "LoRA_layers": None, "LoRA_lr_ratio": 1.0,
        "hidden_dropout_prob": None, "tasks": ["sst", "para", "sts"], "gradient_surgery": None,
        "sst_head": "ffn", "para_head": "features", "sts_head": "cosine", "joint": (), "both": (),
        "simcse_tasks": (), "steps_per_epoch": 5, "total_steps": 50,
        "loss_weights": {"sst": 1.0, "para": 1.0, "sts": 1.0},
        "epoch_sizes": [{"sst": 8, "para": 8, "sts": 8}],
    },
    "--epoch=100": {"epochs": 100},
    "--tasks sts sst sts": {"tasks": ["sst", "sts"]},
    "--tasks sst para sts cfimdb": {"tasks": list(TASKS), "steps_per_epoch": 2000},
    f"{LORA} --LoRA_targets value query value": {"LoRA_targets": ["query", "value"]},
    f"{LORA} --LoRA_layers 9 6-8 7": {"LoRA_layers": [6, 7, 8, 9]},
    "--gradient_surgery": {"gradient_surgery": "sum"},
    "--gradient_surgery main --unsupervised_simcse --simcse_tasks sst --r_drop para "
    "--loss_weights sst=4": {"loss_weights": {
        "sst": 4.0, "para": 1.0, "sts": 1.0, "r_drop_para": 1.0, "simcse_sst": 0.3,
    }},
    "--gradient_surgery main --main_tasks sts --supervised_simcse --r_drop sst": {"loss_weights": {
        "sst": 0.3, "para": 0.3, "sts": 1.0, "r_drop_sst": 0.3, "simcse_para_supervised": 0.3,
    }},
    # 24 shared out by 21 : 33 : 1 is 9.2, 14.4 and 0.4; sts gets 1, so 14.4 is rounded down
    "--sampling proportional": {
        "epoch_sizes": [{"sst": 9, "para": 14, "sts": 1}], "steps_per_epoch": 3,
        "batch_sizes": {"sst": 8, "para": 8, "sts": 8},
    },
    **{f"--fine-tune-mode {mode}": {"encoder_lr": rates[0], "head_lr": rates[1]}
       for mode, rates in LEARNING_RATES.items()},
    "--lr 1e-4 --head_lr 3e-3": {"encoder_lr": 1e-4, "head_lr": 3e-3},
    "--lr 1e-4": {"encoder_lr": 1e-4, "head_lr": 5e-4},  # the heads, new, keep the mode's rate
    f"{FROZEN} --lr 0.01": {"encoder_lr": 0.0, "head_lr": 0.01},
    f"{PAIRS} both": {"joint": (), "both": ("para", "sts")},
    f"{PAIRS} para=both sts=joint": {"joint": ("sts",), "both": ("para",)},
    f"{PAIRS} joint para=separate": {"joint": ("sts",), "both": ()},
    f"{PAIRS} joint --tasks sst sts": {"joint": ("sts",), "both": ()},
    "--tasks sst para --task_batch_sizes para=64": {"batch_sizes": {"sst": 8, "para": 64}},
    "--epochs 3 --task_batch_sizes sst=4": {"steps_per_epoch": 6, "total_steps": 18},
    "--accumulate 4": {"steps_per_epoch": 2, "total_steps": 20},
    "--steps_per_epoch 3000 --epochs 2": {"steps_per_epoch": 3000, "total_steps": 6000},
    f"{SIMCSE} --tasks sst para --supervised_simcse --r_drop sst para --loss_weights para=0 "
    "simcse_sst=0.1 r_drop_sst=0.5 simcse_para_supervised=3": {"loss_weights": {
        "sst": 1.0, "para": 0.0, "r_drop_sst": 0.5, "r_drop_para": 1.0, "simcse_sst": 0.1,
        "simcse_para": 1.0, "simcse_para_supervised": 3.0,
    }},
    # with --mlm, a task of weight 0 has no head
    "--mlm sts sst": {"mlm": ["sst", "sts"], "tasks": ["sst", "para", "sts"], "loss_weights": {
        "sst": 1.0, "para": 1.0, "sts": 1.0, "mlm_sst": 1.0, "mlm_sts": 1.0,
    }},
    "--mlm sst --tasks sst para --loss_weights sst=0 mlm_sst=0.1": {"tasks": ["para"]},
    f"--mlm sst --loss_weights sst=0 para=0 sts=0 {SIMCSE}": {"tasks": []},
    "--loss_weights sst=0": {"tasks": ["sst", "para", "sts"]},  # as without --mlm
    # what looks like a contradiction and is none
    f"{FROZEN} --tasks sts --sts_head linear": {"sts_head": "linear"},
    f"{FROZEN} --tasks sts {PAIRS} joint": {"joint": ("sts",)},
    f"{SIMCSE} --batch_size 2 --simcse_tasks sst": {"simcse_tasks": ("sst",)},
    f"{SIMCSE} --simcse_tasks para --task_batch_sizes sst=1": {"simcse_tasks": ("para",)},
    "--supervised_simcse --task_batch_sizes sst=1": {"supervised_simcse": True},
    "--gradient_surgery --accumulate 1": {"accumulate": 1},
    f"{LORA} --model_file_suffix r4.x_1": {"path": "runs/LoRA-r4.x_1"},
    "--runs_dir elsewhere": {"path": "elsewhere/full-model"},
    # a recipe names the run; a flag beside it overrides it, wherever it stands
    "--fine-tune-mode PAL --PAL_size 24": {
        "path": "runs/PAL", "PAL_size": 24, "PAL_heads": 12, "pals": False,
    },
    "--pals --PAL_heads 7 --freeze_word_embeddings": {"pals": True, "PAL_size": None},
    "--recipe simcse-lora --LoRA_r 4": {"path": "runs/LoRA-simcse-lora", "LoRA_r": 4},
    "--LoRA_r 4 --recipe=simcse-lora --model_file_suffix x": {
        "path": "runs/LoRA-x", "LoRA_r": 4, "unsupervised_simcse": True,
    },
    # what the best recipe sets, and what of it other tasks and modes drop
    f"{BEST} --swap_pairs": {
        "swap_pairs": True, "r_drop": ["sst", "para"], "both": ("para",), "total_steps": 1800,
        "batch_sizes": {"sst": 32, "para": 32, "sts": 32}, "encoder_lr": 1e-4, "head_lr": 5e-4,
        "freeze_word_embeddings": True,
    },
    f"{BEST} --r_drop": {"r_drop": [], "both": ("para",)},
    f"{BEST} --tasks para sts": {"r_drop": ["para"], "both": ("para",)},
    f"{BEST} --tasks sst": {"r_drop": ["sst"], "both": (), "freeze_word_embeddings": True},
    f"{BEST} --no-freeze_word_embeddings": {"freeze_word_embeddings": False, "encoder_lr": 1e-4},
    f"{BEST} {LORA}": {"freeze_word_embeddings": False, "encoder_lr": 5e-4, "head_lr": 5e-4},
    f"{BEST} {FROZEN}": {
        "r_drop": [], "both": ("para",), "freeze_word_embeddings": False, "encoder_lr": 0.0,
        "head_lr": 1e-3,
    },
}
DOCUMENTED = {  # the paper's recipes, written out as a user would
    "baseline": f"{FROZEN} --sst_head linear --para_head dot --sts_head linear --warmup 0.1",
    "cosine": f"{FULL} --sst_head linear {HEADS}",
    "simcse": f"{FULL} --sst_head linear {HEADS} {SIMCSE}",
    "simcse-lora": f"{LORA} --LoRA_r 32 --LoRA_alpha 16 --sst_head ffn {HEADS} {SIMCSE}",
    "simcse-full": f"{FULL} --sst_head ffn {HEADS} {SIMCSE}",
}
RECIPE_COMMANDS = [
    *(f"--recipe {name}" for name in RECIPES), "--recipe simcse-lora --LoRA_r 4 --seed 3",
    f"--recipe simcse-lora {FULL}", f"{BEST} --r_drop", f"{BEST} --tasks para sts",
    f"{BEST} --tasks sst --no-freeze_word_embeddings", f"{BEST} {LORA}", f"{BEST} {FROZEN}",
    f"{BEST} --pair_encoding joint", f"{BEST} --pair_encoding para=joint sts=both",
]
NEAREST = {
    "--lora-alpha": "--LoRA_alpha", "--fine_tune_mode": "--fine-tune-mode", "--epocs": "--epochs",
    "--batch": "--batch_size",  # no abbreviation
    # as other scripts call them
    "--learning-rate": "--lr", "--rank": "--LoRA_r", "--alpha": "--LoRA_alpha",
    "--wd": "--weight_decay", "--dropout": "--hidden_dropout_prob", "--bs": "--batch_size",
    "--steps": "--steps_per_epoch", "--name": "--model_file_suffix", "--option": "--fine-tune-mode",
    "--gradient_accumulation_steps": "--accumulate", "--output_dir": "--runs_dir",
}
WRONG_CHOICES = [
    "--recipe simcse_lora", "--tasks sst nli", "--para_head linear", "--precision fp8",
    "--r_drop sts", "--sampling size", "--LoRA_targets query qury", f"{LORA} --LoRA_variant loha",
]
OUT_OF_RANGE = {
    "--lr": "nan -1 inf 0 x 1e-999", "--head_lr": "0", "--hidden_dropout_prob": "1.5 -0.1 nan",
    "--batch_size": "0 1.5 " + 400 * "9", "--epochs": "-1", "--warmup": "2",
    "--layer_decay": "0 1.1", "--weight_decay": "-1", "--clip": "-1", "--accumulate": "0",
    "--seed": "-1", "--steps_per_epoch": "0", "--max_length": "2", "--patience": "-1",
    "--log_every": "0", "--save_every": "-1", "--LoRA_lr_ratio": "0", "--LoRA_dropout": "1",
    "--LoRA_layers": "x 3-2 -1 1- 1000 1-2-3", "--pair_encoding": "all para=yes joint=para =joint=",
    "--task_batch_sizes": "64 para para=1.5 cfimdb=8 =8",
    "--loss_weights": "para para=much para=-1 simcse_sst=5",
}
REFUSED = {
    **{f"01 {flag} 4": f"unknown argument {flag}; did you mean {near}.*--help"
       for flag, near in NEAREST.items()},
    "01 --verbose": r"unknown argument --verbose \(--help",
    "01 --fine-tune-mode lora": "invalid choice: 'lora'.*last-linear-layer.*full-model.*LoRA",
    **{f"01 {flags}": "invalid choice" for flags in WRONG_CHOICES},
    "01 --r_drop para --tasks sst": "--r_drop para: not among --tasks sst",
    f"01 {FROZEN} --r_drop sst": "both passes would be identical",
    f"01 {PAIRS} joint --para_head dot": "--para_head: the head of a pair encoded as one sequence",
    "01 --r_drop sst --swap_pairs": "--swap_pairs: only with --r_drop para",
    f"01 {FROZEN} --mlm sst": "--mlm: the encoder is frozen",
    "01 --mlm sst cfimdb": "--mlm cfimdb: not among --tasks sst para sts",
    "01 --mlm sst --loss_weights sst=0 para=0": "para=0 with --mlm: para has no head then: it",
    "01 --mlm sst --loss_weights sst=0 mlm_sst=0": "sst=0 with --mlm: sst has no head then: it",
    "01 --mlm sst --r_drop sst --loss_weights sst=0": "sst=0 .* no --r_drop",
    "01 --loss_weights mlm_sst=0.1": "losses sst, para, sts",
    "01 --start_from runs/a --pretrained bundled": "exclude each other",
    "01 --start_from runs/full-model/": "runs/full-model: this run itself",
    "01 --simcse_tasks sst": "only with --unsupervised_simcse",
    f"01 {SIMCSE} --simcse_tasks cfimdb": "not among --tasks",
    f"01 {SIMCSE} --simcse_tasks sst --loss_weights simcse_sts=5": "losses .* simcse_sst",
    "01 --supervised_simcse --loss_weights r_drop_sst=5": "losses .* simcse_para_supervised",
    "01 --supervised_simcse --tasks sst sts": "needs the task para",
    f"01 {FROZEN} {SIMCSE}": "the encoder is frozen",
    f"01 {FROZEN} --supervised_simcse": "the encoder is frozen",
    f"01 {FROZEN} --gradient_surgery": "the encoder is frozen",
    "01 --gradient_surgery main": "main: no auxiliary loss; add SimCSE, --mlm or --main_tasks",
    "01 --gradient_surgery main --r_drop sst": "main: no auxiliary loss",
    "01 --gradient_surgery main --tasks sst --mlm sst --loss_weights sst=0": "no main task has a",
    f"01 {SIMCSE} --main_tasks sst": "--main_tasks: only with --gradient_surgery main",
    f"01 {SIMCSE} --gradient_surgery main --main_tasks cfimdb": "cfimdb: not among --tasks sst",
    "01 --sampling annealed --task_batch_sizes para=9": "--task_batch_sizes: not with --sampling",
    f"01 {FROZEN} --tasks sts": "nothing to train",
    f"01 {FROZEN} --layer_decay 0.9": "none of its layers learns",
    f"01 {FROZEN} --lr 1e-3 --head_lr 1e-3": "both are the heads' rate",
    "01 --gradient_surgery --accumulate 2": "not with --accumulate",
    "01 --gradient_surgery --tasks sst": "--gradient_surgery: needs two tasks",
    "01 --resume": "--resume and --overwrite exclude each other",
    "01 --sst_dev_out x --para_test_out ./x": "x: one file for several.*sst dev, para test",
    "01 --sts_dev_out predictions/sst-test-output.csv": "for several.*sst test, sts dev",
    **{f"02 {flag} {value}": f"{flag}.*expected"
       for flag, values in OUT_OF_RANGE.items() for value in values.split()},
    "02 --pair_encoding sst=joint": "expected separate, joint or both, or TASK=.* para, sts",
    "02 --task_batch_sizes para=0": "expected TASK=N, N from 1, with TASK of sst, para, sts",
    "02 --loss_weights stss=2":
        "expected LOSS=WEIGHT, WEIGHT from 0, with LOSS of this run's .* sst, para, sts",
    f"02 {SIMCSE} --batch_size 1": "--batch_size 1 of sst.*at least 2",
    f"02 {SIMCSE} --task_batch_sizes sts=1": "1 of sts: SimCSE needs other examples",
    "02 --supervised_simcse --task_batch_sizes para=1": "1 of para: SimCSE needs other examples",
    "04 --LoRA_r 0": "--LoRA_r: '0'; expected a whole number of at least 1",
    "04 --LoRA_alpha 0": "--LoRA_alpha: '0'; expected a number above 0",
    "04 --LoRA_r 4": "--LoRA_r: only with --fine-tune-mode LoRA, not full-model",
    "04 --recipe simcse-lora --fine-tune-mode full-model --LoRA_r 4": "--LoRA_r: only with",
    "04 --PAL_size 24": "--PAL_size: only with --fine-tune-mode PAL or --pals",
    "04 --pals --PAL_size 50": "--PAL_size 50: expected a multiple of --PAL_heads, 12",
    f"04 --pals {LORA}": "--pals: only with --fine-tune-mode full-model, not LoRA",
    "04 --fine-tune-mode PAL --freeze_word_embeddings": "PAL freezes them anyway",
    **{f"39 '--model_file_suffix={suffix}'": "--model_file_suffix.*expected 1 to 100 letters"
       for suffix in ("../../x", "/etc/x", "x" * 300, ".hidden", "x\n")},
}
ANOTHER_MODEL = {
    f"{LORA} --LoRA_alpha 8": "--LoRA_alpha is 8.0, was 16.0$",
    f"{LORA} --LoRA_targets query": r"--LoRA_targets is \['query'\], was \['query', 'key', .*'\]$",
    f"{LORA} --tasks sst": r"--tasks is \['sst'\], was \['sst', 'para', 'sts'\]$",
    f"{LORA} --precision bf16": "--precision is bf16, was auto or fp32$",
    f"{LORA} --LoRA_r 8 --epochs 3 --seed 5 --lr 1 --batch_size 4 --max_length 9":
        "--LoRA_r is 8, was 4; --batch_size is 4, was 8; --lr is 1.0, was not given; "
        "--max_length is 9, was not given; --seed is 5, was 11711$",
    f"{LORA} --epochs 20":
        "--epochs is 20, was 3; to train longer, begin a new run with --start_from and the .*",
    "--fine-tune-mode full-model": "--fine_tune_mode is full-model, was LoRA$",
}
# fmt: on


@pytest.mark.parametrize("command", EXPECTED)
def test_what_a_command_stands_for(command):
    flags = parse(command)
    examples = {"sst": 21, "para": 33, "sts": 1, "cfimdb": 10**6}
    plan = make_plan(flags, {name: examples[name] for name in flags.tasks})
    found = vars(flags) | vars(plan) | {"path": str(run_path(flags))}
    assert {name: found[name] for name in EXPECTED[command]} == EXPECTED[command]


COURSE = {"sst": 8544, "para": 16002, "sts": 6040}
SKEWED = {"sst": 21, "para": 10**6, "sts": 1}
# Of 48, 8544 : 16002 : 6040 is 13.41, 25.11, 9.48: the last has the largest remainder. To N^0.6, it
# is 14.68, 21.39, 11.92, and to N^0.2, 15.65, 17.75, 14.60.
ANNEALED = [(13, 25, 10), (15, 21, 12), (16, 18, 14)]


@pytest.mark.parametrize(
    ("flags", "examples", "processes", "expected"),
    [
        ("proportional --batch_size 16", COURSE, 1, ANNEALED[:1]),
        # in pairs 6.70, 12.56, 4.74: two pairs are left, for sts and sst
        ("proportional --batch_size 16", COURSE, 2, [(14, 24, 10)]),
        ("annealed --batch_size 16 --epochs 3", COURSE, 1, ANNEALED),
        ("annealed --batch_size 16 --epochs 1", COURSE, 1, ANNEALED[:1]),
        ("annealed --batch_size 16 --epochs 0", COURSE, 1, ANNEALED[:1]),
        ("proportional --batch_size 4", SKEWED, 1, [(1, 10, 1)]),
        (f"proportional --batch_size 4 {SIMCSE}", SKEWED, 1, [(2, 8, 2)]),
        (f"proportional --batch_size 4 {SIMCSE} --simcse_tasks sst", SKEWED, 1, [(2, 9, 1)]),
        (f"proportional --batch_size 4 {SIMCSE}", SKEWED, 2, [(2, 8, 2)]),
        (f"proportional --batch_size 2 {SIMCSE}", SKEWED, 2, [(2, 2, 2)]),
        ("proportional --batch_size 8", SKEWED, 4, [(4, 16, 4)]),
        # the loss is on pairs of para
        ("proportional --supervised_simcse", {"sst": 9, "para": 1, "sts": 9}, 1, [(11, 2, 11)]),
        # in pairs 1.5, 1.5, 3: the one that is left is of the first task
        ("proportional --batch_size 4", {"sst": 1, "para": 1, "sts": 2}, 2, [(4, 2, 6)]),
    ],
)
def test_a_batch_is_shared_out_by_largest_remainder(flags, examples, processes, expected):
    """Worked out by hand, in the order sst, para, sts. Its total size stays."""
    plan = make_plan(parse(f"--sampling {flags}"), examples, processes)
    assert [tuple(sizes.values()) for sizes in plan.epoch_sizes] == expected
    for sizes in plan.epoch_sizes:
        assert list(sizes) == list(examples)
        assert sum(sizes.values()) == sum(plan.batch_sizes.values())


def test_with_sampling_every_example_counts_the_same():
    """A task's losses, means, weigh as its share of the batch: 16, 6 and 2 of 24, 8 each if equal.

    The second epoch's shares (10, 8, 6) hold in all later steps.
    """
    flags = "annealed --epochs 2 --steps_per_epoch 5 --r_drop sst --loss_weights para=2"
    plan = make_plan(parse(f"--sampling {flags}"), {"sst": 8000, "para": 3000, "sts": 1000})
    first = {"sst": 2, "r_drop_sst": 2, "para": 2 * 6 / 8, "sts": 2 / 8}
    assert plan.weights_at(0) == plan.weights_at(4) == first
    last = {"sst": 10 / 8, "r_drop_sst": 10 / 8, "para": 2 * 8 / 8, "sts": 6 / 8}
    assert plan.weights_at(5) == plan.weights_at(11) == last
    assert make_plan(parse("--task_batch_sizes sst=2"), {}).weights_at(3)["sst"] == 1


def test_every_flag_is_described():
    assert all(action.help for action in make_parser()._actions)


# ---------------------------------------------------------------------------------------- recipes


def values(command):
    """All flags of a command line by name, but `recipe`."""
    return {name: value for name, value in vars(parse(command)).items() if name != "recipe"}


def test_the_papers_recipes_are_their_documented_flags():
    for name, command in DOCUMENTED.items():
        assert values(f"--recipe {name}") == values(command), name
    assert {name for name, recipe in RECIPES.items() if recipe.paper_score} == set(DOCUMENTED)


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_the_expanded_command_gives_the_same_run(command):
    """A reader pastes it, also once the recipe means something else."""
    expanded = parse_command(shlex.split(command)).expanded()
    script, flags = "python multitask_classifier.py ", expanded.partition(".py ")[2]
    assert expanded == script + flags
    assert parse(flags) == parse(command)
    recipe = parse(command).recipe
    assert values(flags.replace(f" --recipe {recipe}", "")) == values(command)
    names = [word for word in flags.split() if word.startswith("--")]
    assert len(names) == len(set(names))  # a given flag replaces the recipe's


def test_without_a_recipe_there_is_no_expanded_command():
    assert parse_command([]).expanded() is None


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("command", REFUSED)
def test_01_02_04_39_flags_that_are_refused(command):
    """A run of the same name stays, though `--overwrite` would replace it."""
    a_run("")
    refused(f"{command[3:]} --overwrite", REFUSED[command])


def test_01_the_other_script_names_the_nearest_flag_too():
    refused("--chekpoint x", "mean --checkpoint?", lambda c: evaluation.parse_flags(c.split()))


def test_01_the_script_answers_before_it_loads_torch(tmp_path):
    """A wrong flag ends it with code 2 and one line, `--help` with code 0."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, REPOSITORY / "multitask_classifier.py"]
    setting = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": "."}}
    wrong = subprocess.run([*command, "--LoRA_rank=4"], **setting)
    message = "error: unknown argument --LoRA_rank=4; did you mean --LoRA_r? (--help lists all)\n"
    assert (wrong.returncode, wrong.stderr) == (2, message)
    shown = subprocess.run([*command, "--help"], **setting)
    assert (shown.returncode, shown.stderr, shown.stdout.count("usage:")) == (0, "", 1)
    right = subprocess.run(command, **setting)
    assert right.stderr == "torch was imported\n"  # else this test would prove nothing


@pytest.mark.parametrize("command", ANOTHER_MODEL)
def test_28_a_run_resumed_as_another_lists_every_difference(command):
    """And nothing that is as it was."""
    a_run(f"{LORA} --LoRA_r 4 --epochs 3")
    if "LoRA" not in command:
        Path("runs/LoRA").rename("runs/full-model")
    expected = f"^--resume: the run was begun with other settings: {ANOTHER_MODEL[command]}"
    refused(f"{command} --resume", expected)


def test_a_resumed_run_takes_its_own_flags_though_its_recipe_has_changed(monkeypatch):
    command = "--recipe simcse-lora --LoRA_r 4"
    a_run(f"{command} --epochs 3 --pair_encoding para=joint --loss_weights para=2")
    changed = RECIPES["simcse-lora"].flags | {"pooling": "cls"}
    monkeypatch.setitem(RECIPES, "simcse-lora", replace(RECIPES["simcse-lora"], flags=changed))
    assert parse(f"{command} --overwrite").pooling == "cls"
    plan = make_plan(parse(f"{command} --resume --save_every 5 --precision fp32"), {})
    assert (plan.flags.epochs, plan.flags.save_every, plan.flags.pooling) == (3, 5, "mean")
    assert (plan.lora.r, plan.joint, plan.loss_weights["para"]) == (4, ("para",), 2.0)


def test_what_names_the_run_or_has_no_order_is_no_other_setting():
    """A recipe's run is found by its name, too; sst before para is para before sst."""
    a_run(f"{BEST} --simcse_tasks sts para --unsupervised_simcse")
    flags = parse(
        "--resume --model_file_suffix best --r_drop para sst para --simcse_tasks para sts"
    )
    assert (flags.recipe, flags.r_drop) == ("best", ["sst", "para"])
    assert flags.simcse_tasks == ["para", "sts"]


def test_flags_of_one_command_are_not_those_of_the_run():
    """It may be resumed on a machine without a GPU, or without test files."""
    for device in ("gpu", "cpu"):
        a_run(f"--use_{device} --require_test --debug --model_file_suffix {device}")
        flags = parse(f"--resume --model_file_suffix {device}")
        assert not (flags.use_gpu or flags.use_cpu or flags.require_test or flags.debug)


@pytest.mark.parametrize(
    "flags", ["--pair_encoding joint --sts_head linear", f"{BEST} --pair_encoding joint"]
)
def test_a_run_of_joint_pairs_resumes_with_its_own_command(flags):
    """A head that was typed stays; that of a recipe is not one of the run."""
    a_run(flags)
    assert vars(parse(f"{flags} --resume")) == vars(parse(f"{flags} --overwrite")) | {
        "resume": True,
        "overwrite": False,
    }


# ------------------------------------------------- what the encoder or the hardware cannot do


@pytest.fixture
def main(write_encoder, cut_sample):
    """Runs the training script with a tiny random encoder, for no epochs."""
    write_encoder("encoder")
    base = ["--pretrained", "encoder", "--data_dir", str(cut_sample), "--epochs", "0"]
    base += ["--calibration_examples", "0"]
    return lambda command: multitask_classifier.main([*base, *command.split()])


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("--max_length 41", "--max_length 41: this encoder takes at most 40 tokens"),
        (f"{LORA} --LoRA_r 33 --overwrite", "--LoRA_r is 33; .*1 to 32"),
        ("--use_gpu", "--use_gpu: no GPU here; the only device is cpu"),
    ],
)
def test_02_04_05_limits_are_told_before_weights_load(main, flags, pattern):
    """The weights are none, which is what any other command would end with."""
    Path("encoder/model.safetensors").write_bytes(b"no weights")
    a_run(LORA)
    refused(flags, pattern, main)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        main("")


def test_03_06_no_epochs_only_evaluate_and_without_bf16_in_fp32(main, monkeypatch, capsys):
    """Resumed, it does the same again. What the recipe stands for is printed and kept."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    run, predictions = RunFolder("runs/full-model-cosine"), []
    for flags in ("", "--resume"):
        main(f"--recipe cosine --precision bf16 {flags}")
        assert [line["kind"] for line in run.metrics()] == ["eval"]
        predictions.append({p.name: p.read_bytes() for p in Path("predictions").iterdir()})
    assert predictions[0] == predictions[1] and len(predictions[0]) == 6
    description, printed = run.description(), capsys.readouterr().out
    assert "warning: precision bf16: this cpu has no bf16" in printed
    assert description["precision"] == "fp32"
    assert "--sst_head linear" in description["expanded_command"]
    assert f"--recipe cosine is: {description['expanded_command']}" in printed


# -------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("flags", "link", "sst_train", "folders"),
    [
        ("--tasks sst para sts cfimdb", None, SAMPLE / "ids-sst-train.csv", {SAMPLE}),
        ("--tasks sst", "data/sts-dev.csv", Path("data/ids-sst-train.csv"), {Path("data")}),
        ("", "data", Path("data/ids-sst-train.csv"), {Path("data")}),
        ("--data_dir nowhere", None, Path("nowhere/ids-sst-train.csv"), {Path("nowhere")}),
        ("--sst_train mine.csv", None, Path("mine.csv"), {Path("."), Path("data")}),
    ],
)
def test_22_one_file_of_the_courses_or_a_named_path_rules_out_the_sample(
    flags, link, sst_train, folders, capsys
):
    """Also another task's, on a disk that is not mounted. It is said where the sample is used."""
    if link:
        Path(link).parent.mkdir(exist_ok=True)
        Path(link).symlink_to("unmounted")
    paths = data_paths(parse(flags))
    assert paths["sst"]["train"] == sst_train
    assert {path.parent for of_task in paths.values() for path in of_task.values()} == folders
    assert ("sample" in capsys.readouterr().out) == (folders == {SAMPLE})
