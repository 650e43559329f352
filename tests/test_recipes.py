"""`--recipe`: the flags of the paper's rows, what wins over them, and what is kept of them."""

import json
import shlex
import signal

import pytest
from conftest import SAMPLE

import multitask_classifier
from arguments import get_args, make_parser
from bert import BertModel
from config import LEARNING_RATES, MODES, RECIPES, TASKS, UserError
from tokenizer import BertTokenizer

# What the recipes are documented to stand for, written out as a user would.
DOCUMENTED = {
    "baseline": "--fine-tune-mode last-linear-layer --sst_head linear --para_head dot "
    "--sts_head linear --warmup 0.1",
    "cosine": "--fine-tune-mode full-model --sst_head linear --para_head features "
    "--sts_head cosine",
    "simcse": "--fine-tune-mode full-model --sst_head linear --para_head features "
    "--sts_head cosine --unsupervised_simcse",
    "simcse-lora": "--fine-tune-mode LoRA --LoRA_r 32 --LoRA_alpha 16 --sst_head ffn "
    "--para_head features --sts_head cosine --unsupervised_simcse",
    "simcse-full": "--fine-tune-mode full-model --sst_head ffn --para_head features "
    "--sts_head cosine --unsupervised_simcse",
}
OWN = ("argv", "given", "recipe", "expanded_command")  # what only a recipe's command line sets


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory without runs: those of whoever runs the tests are in nobody's way."""
    monkeypatch.chdir(tmp_path)


def parsed(command):
    """Checked arguments of a command line, as a dict without what is a recipe's own."""
    args, _ = get_args(shlex.split(command))
    return {name: value for name, value in vars(args).items() if name not in OWN}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_recipe_is_its_documented_flags(name):
    assert parsed(f"--recipe {name}") == parsed(DOCUMENTED[name])


def test_every_recipe_of_the_paper_is_documented_and_no_other_has_its_score():
    assert {name for name, recipe in RECIPES.items() if recipe.paper} == set(DOCUMENTED)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_flags_and_choices_that_exist(name):
    """`set_defaults` takes any name and value: a typing error would do nothing, in silence."""
    actions = {action.dest: action for action in make_parser()._actions}
    for flag, value in RECIPES[name].flags.items():
        choices = actions[flag].choices
        values = value if isinstance(value, list) else [value]
        assert choices is None or set(values) <= set(choices)


def test_the_best_recipe_passes_the_checks_and_encodes_paraphrase_pairs_both_ways():
    args, _ = get_args(["--recipe", "best"])
    assert args.both == ("para",) and args.tasks == [n for n, t in TASKS.items() if t.default]
    assert (args.batch_sizes["para"], args.epochs * args.steps_per_epoch) == (32, 1800)


def test_a_flag_given_beside_the_recipe_wins_wherever_it_stands():
    for command in ("--recipe simcse-lora --LoRA_r 4", "--LoRA_r 4 --recipe=simcse-lora"):
        assert parsed(command) == parsed(f"{DOCUMENTED['simcse-lora']} --LoRA_r 4")
    assert parsed("--recipe simcse-lora --LoRA_r 4") != parsed("--recipe simcse-lora")


def test_another_mode_takes_the_recipes_lora_flags_away():
    """They would be an error in full-model mode, though the user gave none of them."""
    args, _ = get_args(["--recipe", "simcse-lora", "--fine-tune-mode", "full-model"])
    assert args.unsupervised_simcse and "LoRA" not in args.expanded_command.split("--recipe")[0]
    get_args(shlex.split(args.expanded_command)[2:])  # may be pasted
    with pytest.raises(UserError, match="LoRA_r"):  # but one that the user gave stays an error
        get_args(["--recipe", "simcse-lora", "--fine-tune-mode", "full-model", "--LoRA_r", "4"])


@pytest.mark.parametrize("given", ["", " --LoRA_r 4 --seed 3", " --fine-tune-mode full-model"])
def test_the_expanded_command_gives_the_same_run(given):
    """It is what a reader pastes: the same flags in the same folder."""
    args, run = get_args(shlex.split(f"--recipe simcse-lora{given}"))
    words = shlex.split(args.expanded_command)
    assert words[:2] == ["python", "multitask_classifier.py"] and "--unsupervised_simcse" in words
    assert words.count("--LoRA_r") <= 1  # the one that was given, and not the recipe's beside it
    again, same_run = get_args(words[2:])
    assert same_run.path == run.path
    assert {n: v for n, v in vars(again).items() if n not in OWN} == parsed(
        f"--recipe simcse-lora{given}"
    )


def test_the_run_is_named_by_the_recipe_unless_it_has_a_name():
    assert get_args(["--recipe", "simcse-lora"])[1].path.name == "LoRA-simcse-lora"
    named = ["--recipe", "simcse-lora", "--model_file_suffix", "x"]
    assert get_args(named)[1].path.name == "LoRA-x"
    assert get_args([])[1].path.name == "full-model"


def test_an_unknown_recipe_is_an_error_that_lists_them():
    with pytest.raises(UserError, match="simcse-lora"):
        get_args(["--recipe", "simcse_lora"])


def test_without_a_recipe_there_is_no_expanded_command():
    assert get_args([])[0].expanded_command is None


def test_the_expanded_command_is_printed_and_kept_and_may_be_continued(
    tiny_config, toy_vocab_folder, tmp_path, monkeypatch, capsys
):
    """A run that does not say what its recipe meant cannot be repeated once the recipe changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    BertModel(tiny_config).save_pretrained(tmp_path / "encoder", tokenizer)
    command = ["--pretrained", "encoder", "--data_dir", str(SAMPLE), "--recipe", "simcse"]
    command += ["--tasks", "sts", "--epochs", "0"]
    multitask_classifier.main(command)
    kept = json.loads((tmp_path / "runs/full-model-simcse/run.json").read_text("utf-8"))
    assert "--sts_head cosine --unsupervised_simcse" in kept["expanded_command"]
    assert kept["expanded_command"] in capsys.readouterr().out
    changed = RECIPES["simcse"].flags | {"pooling": "cls"}
    monkeypatch.setitem(RECIPES, "simcse", type(RECIPES["simcse"])(changed, "changed since"))
    multitask_classifier.main([*command, "--resume"])  # goes on with the run's own flags
    assert get_args([*command, "--resume"])[0].pooling == "mean"
    with pytest.raises(UserError, match="epochs"):
        multitask_classifier.main([*command, "--resume", "--epochs", "1"])


@pytest.mark.parametrize(
    ("flags", "r_drop", "both"),
    [
        ("", ["sst", "para"], ("para",)),
        ("--r_drop", [], ("para",)),
        ("--r_drop para", ["para"], ("para",)),
        ("--tasks para sts", ["para"], ("para",)),
        ("--tasks sst", ["sst"], ()),
        ("--fine-tune-mode last-linear-layer", [], ("para",)),
    ],
)
def test_what_the_best_recipe_sets_for_other_tasks_and_modes_is_left_away(flags, r_drop, both):
    """Else an error would name a flag that nobody gave; the printed command has to work too."""
    args, _ = get_args(["--recipe", "best", *flags.split()])
    assert (args.r_drop, args.both) == (r_drop, both)
    again, _ = get_args(shlex.split(args.expanded_command)[2:])
    assert (again.r_drop, again.both, again.joint) == (r_drop, both, args.joint)


def test_what_a_recipe_switches_on_may_be_switched_off_beside_it():
    args, _ = get_args(["--recipe", "best", "--no-freeze_word_embeddings"])
    assert not args.freeze_word_embeddings
    again, _ = get_args(shlex.split(args.expanded_command)[2:])
    assert not again.freeze_word_embeddings


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "full-model"])
def test_the_best_recipe_in_another_mode_learns_at_that_modes_rates(mode):
    """Its own is for the whole model, and there are no word embeddings to leave out."""
    best, _ = get_args(["--recipe", "best"])
    args, _ = get_args(["--recipe", "best", "--fine-tune-mode", mode])
    assert best.freeze_word_embeddings and not args.freeze_word_embeddings
    assert (args.encoder_rate, args.head_rate) == LEARNING_RATES[mode]
    assert best.encoder_rate == RECIPES["best"].flags["lr"] != LEARNING_RATES["full-model"][0]
    assert parsed(shlex.join(shlex.split(args.expanded_command)[2:])) == {
        n: v for n, v in vars(args).items() if n not in OWN
    }
