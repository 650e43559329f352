"""The command line: the starter's and the paper's flags, their defaults, and what is refused."""

import itertools
import json
import shlex

import pytest

from arguments import HERE, OTHER_NAMES, data_paths, get_args, make_parser, nearest_flag
from config import LEARNING_RATES, LORA_TARGETS, TASKS, UserError
from run_folder import RunFolder

LORA = "--fine-tune-mode LoRA"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No run and no data of the repository's own in the working directory."""
    monkeypatch.chdir(tmp_path)


def parse(command):
    """The checked arguments of a command line."""
    return get_args(shlex.split(command))[0]


def run_path(command):
    """The run's folder of a command line."""
    return str(get_args(shlex.split(command))[1].path)


# -------------------------------------------------------------------- command lines of others


def test_the_starters_command_line():
    args = parse(
        "--sst_train a --sst_dev b --sst_test c --para_train d --para_dev e --para_test f "
        "--sts_train g --sts_dev h --sts_test i --seed 11711 --epochs 10 "
        "--fine-tune-mode full-model --use_gpu --sst_dev_out j --sst_test_out k --para_dev_out l "
        "--para_test_out m --sts_dev_out n --sts_test_out o --batch_size 8 "
        "--hidden_dropout_prob 0.3 --lr 1e-5"
    )
    assert (args.sst_train, args.para_dev, args.sts_test) == ("a", "e", "i")
    assert (args.sst_dev_out, args.sts_test_out) == ("j", "o")
    assert (args.seed, args.epochs, args.batch_size) == (11711, 10, 8)
    assert (args.use_gpu, args.hidden_dropout_prob, args.lr) == (True, 0.3, 1e-5)


def test_the_papers_first_command_line():
    args, run = get_args(shlex.split(
        "--use_gpu --fine-tune-mode=full-model --lr=1e-5 --weight_decay=1e-3 --epoch=100 "
        "--batch_size=16 --supervised_simcse --unsupervised_simcse "
        "--model_file_suffix=both_simcse_batch_16"
    ))  # fmt: skip
    assert (args.fine_tune_mode, args.epochs, args.batch_size) == ("full-model", 100, 16)
    assert (args.lr, args.encoder_rate, args.weight_decay) == (1e-5, 1e-5, 1e-3)
    assert args.supervised_simcse
    assert args.unsupervised_simcse
    assert str(run.path) == "runs/full-model-both_simcse_batch_16"


def test_the_papers_second_command_line():
    args = parse(
        "--use_gpu --fine-tune-mode=LoRA --LoRA_r=4 --lr=1e-4 --weight_decay=1e-2 --epoch=100"
    )
    assert (args.fine_tune_mode, args.LoRA_r, args.LoRA_alpha) == ("LoRA", 4, 16)
    assert (args.encoder_rate, args.weight_decay, args.epochs) == (1e-4, 1e-2, 100)


def test_the_defaults_of_the_design():
    args = parse(LORA)
    assert (args.epochs, args.batch_size, args.weight_decay) == (10, 8, 1e-3)
    assert (args.LoRA_r, args.LoRA_alpha, args.LoRA_targets) == (32, 16, list(LORA_TARGETS))
    assert args.hidden_dropout_prob is None  # the encoder's own
    assert args.tasks == ["sst", "para", "sts"]
    assert (args.pooling, args.joint, args.gradient_surgery) == ("mean", (), None)
    heads = (args.sst_head, args.para_head, args.sts_head)
    assert heads == ("ffn", "features", "cosine")


# ------------------------------------------------------------------------------ what is derived


@pytest.mark.parametrize("mode", LEARNING_RATES)
def test_learning_rates_by_mode(mode):
    assert (parse(f"--fine-tune-mode {mode}").encoder_rate,
            parse(f"--fine-tune-mode {mode}").head_rate) == LEARNING_RATES[mode]  # fmt: skip


def test_learning_rates_that_are_given():
    both = parse("--lr 1e-4 --head_lr 3e-3")
    assert (both.encoder_rate, both.head_rate) == (1e-4, 3e-3)
    one = parse("--lr 1e-4")  # the heads start from random numbers: theirs stays the mode's own
    assert (one.encoder_rate, one.head_rate) == (1e-4, LEARNING_RATES["full-model"][1])
    frozen = parse("--fine-tune-mode last-linear-layer --lr 0.01")
    assert (frozen.encoder_rate, frozen.head_rate) == (0.0, 0.01)


def test_tasks_come_in_one_order_and_once():
    assert parse("--tasks sts sst sts").tasks == ["sst", "sts"]
    assert parse("--tasks sst para sts cfimdb").tasks == list(TASKS)


@pytest.mark.parametrize(
    ("flags", "joint", "both"),
    [
        ("", (), ()),
        ("--pair_encoding separate", (), ()),
        ("--pair_encoding joint", ("para", "sts"), ()),
        ("--pair_encoding both", (), ("para", "sts")),
        ("--pair_encoding para=joint", ("para",), ()),
        ("--pair_encoding para=both sts=joint", ("sts",), ("para",)),
        ("--pair_encoding para=joint sts=separate", ("para",), ()),
        ("--pair_encoding joint para=separate", ("sts",), ()),
        ("--pair_encoding joint --tasks sst sts", ("sts",), ()),
    ],
)
def test_pair_encoding(flags, joint, both):
    args = parse(flags)
    assert (args.joint, args.both) == (joint, both)


@pytest.mark.parametrize("value", ["all", "sst=joint", "para=yes", "joint=para", "=joint="])
def test_wrong_pair_encodings_say_what_is_expected(value):
    with pytest.raises(UserError, match="expected separate, joint or both, or TASK=separate"):
        parse(f"--pair_encoding {value}")


def test_batch_sizes_of_single_tasks():
    assert parse("--batch_size 16").batch_sizes == {"sst": 16, "para": 16, "sts": 16}
    own = parse("--tasks sst para --batch_size 16 --task_batch_sizes para=64")
    assert own.batch_sizes == {"sst": 16, "para": 64}


@pytest.mark.parametrize("value", ["64", "para", "para=0", "para=-1", "para=1.5", "cfimdb=8", "=8"])
def test_wrong_batch_sizes_say_what_is_expected(value):
    with pytest.raises(UserError, match="expected TASK=N with TASK of sst, para, sts"):
        parse(f"--task_batch_sizes {value}")


def test_a_batch_of_one_of_a_single_task_leaves_simcse_without_negatives():
    for fine in ("", "--unsupervised_simcse --simcse_tasks para", "--supervised_simcse"):
        parse(f"--task_batch_sizes sst=1 {fine}")
    for flags, name in (
        ("--task_batch_sizes sst=1 --unsupervised_simcse", "sst"),
        ("--task_batch_sizes para=1 --supervised_simcse", "para"),
    ):
        with pytest.raises(UserError, match=f"1 of {name}: SimCSE needs other examples"):
            parse(flags)


def test_loss_weights():
    weights = parse("--unsupervised_simcse --loss_weights para=2 simcse_sst=0.1").weights
    assert (weights["para"], weights["simcse_sst"], weights["sst"]) == (2.0, 0.1, 1.0)
    assert set(weights) == {"sst", "para", "sts", "simcse_sst", "simcse_para", "simcse_sts"}


@pytest.mark.parametrize("value", ["para", "para=much", "para=-1", "para=nan"])
def test_wrong_loss_weights(value):
    with pytest.raises(UserError, match=f"--loss_weights {value}; expected"):
        parse(f"--loss_weights {value}")


def test_gradient_surgery_by_itself_is_the_published_sum():
    assert parse("--gradient_surgery").gradient_surgery == "sum"
    assert parse("--gradient_surgery mean").gradient_surgery == "mean"


def test_the_run_is_named_by_mode_and_suffix():
    assert run_path("") == "runs/full-model"
    assert run_path(f"{LORA} --model_file_suffix r4.x_1") == "runs/LoRA-r4.x_1"
    assert run_path("--runs_dir elsewhere") == "elsewhere/full-model"


@pytest.mark.parametrize("suffix", ["../../x", "/etc/x", ".hidden", "a b", "x" * 300, "-x", "a/b"])
def test_a_suffix_that_is_no_folder_name_is_refused(suffix, tmp_path):
    with pytest.raises(UserError, match="--model_file_suffix"):
        get_args([f"--model_file_suffix={suffix}"])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--LoRA_rank 4", "--LoRA_r"),
        ("--lora_r 4", "--LoRA_r"),
        ("--lora-alpha 4", "--LoRA_alpha"),
        ("--batchsize 8", "--batch_size"),
        ("--fine_tune_mode LoRA", "--fine-tune-mode"),
        ("--unsupervised-simcse", "--unsupervised_simcse"),
        ("--epocs=3", "--epochs"),
        ("--sst_trian x", "--sst_train"),
        ("--learning-rate 1", "--lr"),
        ("--rank 4", "--LoRA_r"),
        ("--wd 0.1", "--weight_decay"),
        ("--steps 10", "--steps_per_epoch"),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag, near):
    with pytest.raises(UserError) as caught:
        parse(flag)
    assert flag.split()[0] in str(caught.value)
    assert f"did you mean {near}?" in str(caught.value)


def test_an_unknown_flag_like_no_other_names_none():
    with pytest.raises(UserError, match=r"unknown argument --verbose \(--help"):
        parse("--verbose")


def test_other_names_are_those_of_flags_that_there_are():
    flags = make_parser()._option_string_actions
    for name, meant in OTHER_NAMES.items():
        assert f"--{name}" not in flags
        assert nearest_flag(name, flags).lower() == f"--{meant}"


@pytest.mark.parametrize("flag", ["--batch 8", "--weight 0.1", "--fine LoRA", "--hidden 0.1"])
def test_no_flag_may_be_abbreviated(flag):
    """`--LoRA 4` would otherwise mean whichever flag comes to be unique."""
    with pytest.raises(UserError, match="unknown argument"):
        parse(flag)


@pytest.mark.parametrize(
    "flags",
    [
        "--lr nan", "--lr -1", "--lr inf", "--lr 0", "--lr x", "--batch_size 0", "--epochs -1",
        "--epochs 1.5", "--hidden_dropout_prob 1.5", "--hidden_dropout_prob -0.1", "--warmup 2",
        "--layer_decay 0", "--layer_decay 1.1", "--weight_decay -1", "--weight_decay nan",
        "--clip -1", "--accumulate 0", "--seed -1", "--steps_per_epoch 0", "--max_length 2",
        "--patience -1", "--log_every 0",
        f"{LORA} --LoRA_r 0", f"{LORA} --LoRA_r -4", f"{LORA} --LoRA_r 2.5",
        f"{LORA} --LoRA_alpha 0", f"{LORA} --LoRA_alpha -1", f"{LORA} --LoRA_dropout 1",
        "--epochs 1" + 400 * "0", "--batch_size", "--tasks",
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_the_flag(flags):
    with pytest.raises(UserError, match=flags.split()[-2 if len(flags.split()) > 1 else 0]):
        parse(flags)


@pytest.mark.parametrize(
    ("flags", "choice"),
    [
        ("--fine-tune-mode lora", "last-linear-layer"),
        ("--tasks sst nli", "cfimdb"),
        ("--pooling max", "mean"),
        ("--sst_head cosine", "ffn"),
        ("--para_head linear", "features"),
        (f"{LORA} --LoRA_targets dense", "query"),
        ("--precision fp8", "bf16"),
        ("--gradient_surgery maybe", "mean"),
    ],
)
def test_a_wrong_choice_lists_the_right_ones(flags, choice):
    with pytest.raises(UserError, match=f"invalid choice.*{choice}"):
        parse(flags)


CONTRADICTIONS = {
    "--LoRA_r 4": "only with --fine-tune-mode LoRA",
    "--fine-tune-mode last-linear-layer --LoRA_targets query": "only with --fine-tune-mode LoRA",
    "--simcse_tasks sst": "only with --unsupervised_simcse",
    "--unsupervised_simcse --simcse_tasks cfimdb": "not among --tasks",
    "--unsupervised_simcse --batch_size 1": "at least 2",
    "--supervised_simcse --batch_size 1": "at least 2",
    "--supervised_simcse --tasks sst sts": "needs the task para",
    "--fine-tune-mode last-linear-layer --unsupervised_simcse": "the encoder is frozen",
    "--fine-tune-mode last-linear-layer --supervised_simcse": "the encoder is frozen",
    "--fine-tune-mode last-linear-layer --gradient_surgery": "the encoder is frozen",
    "--fine-tune-mode last-linear-layer --tasks sts": "nothing to train",
    "--gradient_surgery --accumulate 2": "not with --accumulate",
    f"{LORA} --freeze_word_embeddings": "only in full-model",
    "--fine-tune-mode last-linear-layer --freeze_word_embeddings": "only in full-model",
    "--fine-tune-mode last-linear-layer --layer_decay 0.9": "none of its layers learns",
    "--fine-tune-mode last-linear-layer --lr 1e-3 --head_lr 1e-3": "both are the heads' rate",
    "--loss_weights other=1": "--loss_weights other=1: no such loss in this run",
    "--loss_weights simcse_sst=5": "no such loss in this run; it has sst, para, sts",
    "--unsupervised_simcse --simcse_tasks sst --loss_weights simcse_sts=5": "no such loss",
    "--supervised_simcse --loss_weights r_drop_sst=5": "no such loss.*simcse_para_supervised",
    "--swap_pairs": "--swap_pairs: only with --r_drop para",
    "--r_drop sst --swap_pairs": "--swap_pairs: only with --r_drop para",
    "--resume --overwrite": "exclude each other",
    "--sst_dev_out x.csv --para_dev_out x.csv": "one file for several",
    "--sst_dev_out x.csv --para_test_out ./x.csv": "one file for several.*sst dev, para test",
    "--sts_dev_out predictions/sst-test-output.csv": "one file for several.*sst test, sts dev",
}


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_flags_that_contradict_each_other(flags):
    with pytest.raises(UserError, match=CONTRADICTIONS[flags]):
        parse(flags)


def test_what_looks_like_a_contradiction_and_is_none():
    parse("--fine-tune-mode last-linear-layer --tasks sts --sts_head linear")
    parse("--fine-tune-mode last-linear-layer --tasks sts --pair_encoding joint")
    parse("--unsupervised_simcse --batch_size 2 --simcse_tasks sst")
    parse("--gradient_surgery --accumulate 1")
    parse("--unsupervised_simcse --supervised_simcse --r_drop sst --loss_weights simcse_sst=5 "
          "simcse_para_supervised=2 r_drop_sst=4 sts=0")  # fmt: skip
    parse("--recipe best --swap_pairs")


def test_every_message_is_one_line():
    for flags in ("--LoRA_rank 4", "--lr nan", "--fine-tune-mode lora", "--LoRA_r 4"):
        with pytest.raises(UserError) as caught:
            parse(flags)
        assert "\n" not in str(caught.value)


def test_every_flag_is_described():
    for action in make_parser()._actions:
        assert action.help, action.option_strings


# ---------------------------------------------------------------------------- a run that is there


def a_run(command):
    """Leaves a run of this command line."""
    args, run = get_args(shlex.split(command))
    kept = {n: v for n, v in vars(args).items() if n not in ("given", "weights")}
    run.path.mkdir(parents=True)
    rest = dict.fromkeys(("command", "encoder", "data", "precision"))  # not asked for here
    (run.path / "run.json").write_text(json.dumps(rest | {"args": kept}))
    return run


def test_a_run_from_before_a_flag_goes_on_without_it():
    """Not with what today's recipe says, and not with what is given beside --resume."""
    run = a_run("--recipe best")
    description = json.loads((run.path / "run.json").read_text())
    for name in ("r_drop", "task_batch_sizes", "batch_sizes", "both"):
        del description["args"][name]
    description["args"]["pair_encoding"] = ["para=joint", "sts=separate"]
    (run.path / "run.json").write_text(json.dumps(description))
    args = parse("--recipe best --resume")
    assert (args.r_drop, args.joint, args.both) == ([], ("para",), ())
    assert args.batch_sizes == {"sst": 32, "para": 32, "sts": 32}
    for flags in ("--task_batch_sizes para=64", "--r_drop sst"):
        with pytest.raises(UserError, match="not the run that was begun"):
            parse(f"--recipe best --resume {flags}")


def test_a_run_from_before_a_check_goes_on_by_the_same_command():
    """Targets were recorded as they were given, and weights of losses that a run has not taken."""
    run = a_run(f"{LORA} --LoRA_targets query value")
    description = json.loads((run.path / "run.json").read_text())
    description["args"] |= {"LoRA_targets": ["value", "query", "value"],
                            "loss_weights": ["simcse_sst=0.1", "para=2"]}  # fmt: skip
    (run.path / "run.json").write_text(json.dumps(description))
    command = f"{LORA} --LoRA_targets value query value --loss_weights simcse_sst=0.1 para=2"
    args = parse(f"{command} --resume")
    assert args.LoRA_targets == ["query", "value"] and args.weights["para"] == 2
    with pytest.raises(UserError, match="no such loss"):
        parse(f"{command} --overwrite")


def test_a_run_is_neither_continued_nor_replaced_unasked():
    a_run("--epochs 3")
    with pytest.raises(UserError) as caught:
        parse("--epochs 3")
    for way in ("--epochs 3 --resume", "--epochs 3 --overwrite"):
        assert f"python multitask_classifier.py {way}" in str(caught.value)
        parse(way)


def test_a_continued_run_takes_its_own_flags():
    a_run(f"{LORA} --LoRA_r 4 --epochs 3 --pair_encoding para=joint --loss_weights para=2")
    args = parse(f"{LORA} --resume --save_every 5")
    assert (args.LoRA_r, args.epochs, args.joint) == (4, 3, ("para",))
    assert (args.weights["para"], args.save_every) == (2.0, 5)


def test_a_continued_run_given_otherwise_lists_every_difference():
    a_run(f"{LORA} --LoRA_r 4 --epochs 3")
    with pytest.raises(UserError) as caught:
        parse(f"{LORA} --resume --LoRA_r 8 --epochs 3 --seed 5")
    assert "--LoRA_r is 8, was 4" in str(caught.value)
    assert "--seed is 5" in str(caught.value)
    assert "--epochs" not in str(caught.value)


def test_nothing_to_continue_is_no_error():
    args, run = get_args(["--resume"])
    assert args.resume
    assert not run.holds_run()
    assert isinstance(run, RunFolder)


# ------------------------------------------------------------------------------------------ data


def names(paths):
    """File names by (task, split)."""
    return {(t, s): p.name for t, of_task in paths.items() for s, p in of_task.items()}


def test_without_data_it_is_the_sample_and_says_so():
    paths, warning = data_paths(parse("--tasks sst para sts cfimdb"))
    assert "sample" in warning
    assert {p.parent for of_task in paths.values() for p in of_task.values()} == {
        HERE / "data" / "sample"
    }
    assert all(p.exists() for of_task in paths.values() for p in of_task.values())


def test_one_file_of_the_courses_is_enough_never_a_mixture(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sts-dev.csv").touch()
    paths, warning = data_paths(parse(""))
    assert warning is None
    assert {str(p.parent) for of_task in paths.values() for p in of_task.values()} == {"data"}


def test_a_named_folder_or_file_is_taken_at_its_word(tmp_path):
    paths, warning = data_paths(parse("--data_dir nowhere"))
    assert warning is None
    assert str(paths["sst"]["dev"]) == "nowhere/ids-sst-dev.csv"
    paths, warning = data_paths(parse("--sst_train mine.csv"))
    assert warning is None
    assert names(paths)["sst", "train"] == "mine.csv"
    assert str(paths["para"]["train"]) == "data/quora-train.csv"


def test_all_files_have_the_courses_names():
    found = names(data_paths(parse(""))[0])
    expected = {
        (name, split): TASKS[name].file_name(split)
        for name, split in itertools.product(("sst", "para", "sts"), ("train", "dev", "test"))
    }
    assert found == expected


def test_r_drop_is_for_classes_and_for_encoders_that_are_trained():
    args = parse("--r_drop sst para --loss_weights r_drop_sst=0.5")
    assert (args.r_drop, args.weights["r_drop_sst"], args.weights["r_drop_para"]) == (
        ["sst", "para"], 0.5, 1.0,
    )  # fmt: skip
    for flags, words in (
        ("--r_drop sts", "sts"),
        ("--r_drop sst --loss_weights r_drop_sts=2", "r_drop_sts"),
        ("--r_drop para --tasks sst", "--r_drop para: not among --tasks sst"),
        ("--r_drop sst --fine-tune-mode last-linear-layer", "its two passes would be one"),
    ):
        with pytest.raises(UserError, match=words):
            parse(flags)
