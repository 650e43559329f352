"""`--recipe`: the flags of the paper's rows, what overrides them, and the expanded command."""

import shlex

import pytest

from config import RECIPES
from training.flags import default_flags, parse_command
from training.plan import make_plan
from training.run_folder import run_path

HEADS = "--para_head features --sts_head cosine"
FULL, LORA = "--fine-tune-mode full-model", "--fine-tune-mode LoRA"
FROZEN, SIMCSE = "--fine-tune-mode last-linear-layer", "--unsupervised_simcse"
DOCUMENTED = {  # the paper's recipes, written out as a user would
    "baseline": f"{FROZEN} --sst_head linear --para_head dot --sts_head linear --warmup 0.1",
    "cosine": f"{FULL} --sst_head linear {HEADS}",
    "simcse": f"{FULL} --sst_head linear {HEADS} {SIMCSE}",
    "simcse-lora": f"{LORA} --LoRA_r 32 --LoRA_alpha 16 --sst_head ffn {HEADS} {SIMCSE}",
    "simcse-full": f"{FULL} --sst_head ffn {HEADS} {SIMCSE}",
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A working directory without runs."""
    monkeypatch.chdir(tmp_path)


def parse(command):
    """The flags of a command line."""
    return parse_command(shlex.split(command)).flags


def values(command):
    """All flags of a command line by name, but `recipe`."""
    return {name: value for name, value in vars(parse(command)).items() if name != "recipe"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_recipe_is_its_documented_flags(name):
    assert values(f"--recipe {name}") == values(DOCUMENTED[name])


def test_every_recipe_of_the_paper_is_documented_and_no_other_has_its_score():
    assert {name for name, recipe in RECIPES.items() if recipe.paper} == set(DOCUMENTED)


def test_a_flag_beside_the_recipe_overrides_it_wherever_it_stands():
    expected = values(f"{DOCUMENTED['simcse-lora']} --LoRA_r 4")
    assert expected != values("--recipe simcse-lora")
    for command in ("--recipe simcse-lora --LoRA_r 4", "--LoRA_r 4 --recipe=simcse-lora"):
        assert values(command) == expected


@pytest.mark.parametrize(
    ("flags", "r_drop", "both", "rates", "freezes_words"),
    [
        ("", ["sst", "para"], ("para",), (1e-4, 5e-4), True),
        ("--r_drop", [], ("para",), (1e-4, 5e-4), True),
        ("--r_drop para", ["para"], ("para",), (1e-4, 5e-4), True),
        ("--tasks para sts", ["para"], ("para",), (1e-4, 5e-4), True),
        ("--tasks sst", ["sst"], (), (1e-4, 5e-4), True),
        ("--no-freeze_word_embeddings", ["sst", "para"], ("para",), (1e-4, 5e-4), False),
        (LORA, ["sst", "para"], ("para",), (5e-4, 5e-4), False),
        (FROZEN, [], ("para",), (0.0, 1e-3), False),
    ],
)
def test_what_best_sets_for_other_tasks_and_modes_is_dropped(
    flags, r_drop, both, rates, freezes_words
):
    """Otherwise an error would name a flag that nobody gave."""
    plan = make_plan(parse(f"--recipe best {flags}"), {})
    assert (plan.flags.r_drop, plan.both) == (r_drop, both)
    assert (plan.encoder_lr, plan.head_lr) == rates
    assert plan.flags.freeze_word_embeddings == freezes_words
    assert plan.batch_sizes == dict.fromkeys(plan.flags.tasks, 32)
    assert plan.total_steps == 1800


@pytest.mark.parametrize(
    "command",
    [
        *(f"--recipe {name}" for name in RECIPES),
        "--recipe simcse-lora --LoRA_r 4 --seed 3",
        f"--recipe simcse-lora {FULL}",
        "--recipe best --r_drop",
        "--recipe best --tasks para sts",
        "--recipe best --tasks sst --no-freeze_word_embeddings",
        f"--recipe best {LORA}",
        f"--recipe best {FROZEN}",
    ],
)
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
    assert set(RECIPES[recipe].flags) <= set(default_flags())


def test_without_a_recipe_there_is_no_expanded_command():
    assert parse_command([]).expanded() is None


def test_the_run_is_named_by_the_recipe_unless_it_has_a_name():
    assert run_path(parse("--recipe simcse-lora")).name == "LoRA-simcse-lora"
    assert run_path(parse("--recipe simcse-lora --model_file_suffix x")).name == "LoRA-x"
