"""What can be asked for on the command line, and what cannot?

The flags of the course starter and of the paper keep their names. Every check here runs before any
data or weights load.
"""

import argparse
import difflib
import math
import os
import re
import shlex
import sys
from pathlib import Path

from config import LEARNING_RATES, LORA_TARGETS, MODES, RECIPES, TASKS, LoRAConfig, UserError
from device import PRECISIONS
from distributed import launch_command
from run_folder import OutputError, RunFolder, run_name

HERE = Path(__file__).resolve().parent
SCRIPT = "multitask_classifier.py"
SPLITS = ("train", "dev", "test")
MOVED = "no such file; name the folder of the run's data files with --data_dir"
# Flags of one command: never compared when a run is continued.
OF_ONE_COMMAND = {"resume", "overwrite", "debug", "runs_dir"}
# Flags that may differ when a run is continued: nothing computed depends on them.
FREE_WHEN_CONTINUING = {
    "save_every", "log_every", "use_gpu", "predictions_dir", "require_test",
    "data_dir",  # the files' content is compared, wherever they lie
} | {f"{task}_{what}" for task in TASKS for what in (*SPLITS, "dev_out", "test_out")}  # fmt: skip

# What other training scripts call a flag.
OTHER_NAMES = {
    "learning_rate": "lr", "rank": "lora_r", "alpha": "lora_alpha", "wd": "weight_decay",
    "dropout": "hidden_dropout_prob", "bs": "batch_size", "steps": "steps_per_epoch",
    "gradient_accumulation_steps": "accumulate", "name": "model_file_suffix",
    "device": "use_gpu", "output_dir": "runs_dir",
}  # fmt: skip


def nearest_flag(flag, flags):
    """The one of `flags` that was probably meant by `flag`, or None."""
    plain = {name.strip("-").lower().replace("-", "_"): name for name in flags}
    wanted = flag.strip("-").lower().replace("-", "_")
    near = difflib.get_close_matches(OTHER_NAMES.get(wanted, wanted), plain, n=1)
    return plain[near[0]] if near else None


class FlagParser(argparse.ArgumentParser):
    """An argument parser without abbreviations; its errors are one line and name the near flag."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args=None, namespace=None):
        """As argparse's, but raises `UserError` with the nearest flag for one that is unknown."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = nearest_flag(flag, self._option_string_actions)
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"unknown argument {unknown[0]}{hint} (--help lists all)")
        return namespace

    def error(self, message):
        """Raise `UserError`."""
        raise UserError(f"{message} (--help lists all)")


def number(kind, low, high, *, above=False):
    """An argparse type: an int or float from `low` (or above it) to `high`, finite."""

    expected = "a whole number" if kind is int else "a number"
    expected += " above" if above else " from" if high else " of at least"
    expected += f" {low:,} to {high:,}" if high else f" {low:,}"

    def parse(text):
        try:
            value = kind(text)
            good = math.isfinite(value) and value >= low and not (above and value == low)
            good = good and (high is None or value <= high)
        except (ValueError, OverflowError):  # no number, or an int beyond all floats
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}; expected {expected}")
        return value

    return parse


def make_parser():
    """All flags, by group."""
    parser = FlagParser(
        usage="%(prog)s [FLAG ...]",
        description="Fine-tune a hand-written BERT on several sentence tasks at once.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="python %(prog)s --fine-tune-mode LoRA --LoRA_r 32\n"
        "python %(prog)s --pretrained bundled --recipe best\n"
        "then `python evaluation.py`; README.md says more of each flag",
    )
    positive, natural = number(int, 1, None), number(int, 0, None)
    rate, share = number(float, 0, None, above=True), number(float, 0, 1)

    add = parser.add_argument_group("what is trained").add_argument
    add("--recipe", choices=RECIPES, metavar="NAME", help="preset flags, a row of the paper's "
        f"Table 1 or ours, 'best': {', '.join(RECIPES)}; a flag given beside it overrides it")
    add("--fine-tune-mode", choices=MODES, default="full-model",
        help="what is trained: the heads alone, everything, or LoRA adapters and the heads "
        "(default: %(default)s)")
    add("--tasks", nargs="+", choices=TASKS, metavar="TASK",
        help=f"of {', '.join(TASKS)} (default: all but cfimdb)",
        default=[name for name, task in TASKS.items() if task.default])
    add("--pretrained", metavar="ENCODER", help="folder, hub name, or 'bundled' "
        "(default: bert-base-uncased; where the hub is out of reach, the bundled MiniLM)")

    add = parser.add_argument_group("LoRA (only with --fine-tune-mode LoRA)").add_argument
    add("--LoRA_r", type=positive, default=LoRAConfig.r, metavar="R",
        help="rank (default: %(default)s)")
    add("--LoRA_alpha", type=rate, default=LoRAConfig.alpha, metavar="A",
        help="the low-rank path is scaled by A/R (default: %(default)g)")
    add("--LoRA_dropout", type=number(float, 0, 0.99), default=LoRAConfig.dropout,
        metavar="P", help="dropout on the input of the low-rank path (default: %(default)g)")
    add("--LoRA_targets", nargs="+", choices=LORA_TARGETS, metavar="LAYER",
        default=list(LORA_TARGETS), help=f"linear layers (default: all): {', '.join(LORA_TARGETS)}")

    add = parser.add_argument_group("heads and losses").add_argument
    for name, task in TASKS.items():
        add(f"--{name}_head", choices=task.heads, default=task.heads[0],
            help=f"{task.title} head (default: %(default)s)")
    add("--pooling", choices=("mean", "cls"), default="mean",
        help="a sentence's vector: mean over its tokens (default) or the first token")
    add("--pair_encoding", nargs="+", default=["separate"], metavar="[TASK=]HOW",
        help="'separate' (bi-encoder, default), 'joint' (cross-encoder: a pair is one sequence) or "
        "'both', for all pair tasks or as para=both sts=separate")
    add("--unsupervised_simcse", action="store_true", help="contrastive loss on sentences")
    add("--supervised_simcse", action="store_true", help="contrastive loss on paraphrase pairs")
    add("--simcse_tasks", nargs="+", choices=TASKS, metavar="TASK",
        help="tasks with the unsupervised loss (default: all of --tasks)")
    add("--r_drop", nargs="*", choices=[n for n, t in TASKS.items() if t.kind != "score"],
        default=[], metavar="TASK", help="R-Drop on these tasks: penalise different predictions "
        "under two dropout masks (default: none)")
    add("--swap_pairs", action="store_true",
        help="R-Drop's second pass has the two sentences of a pair in the other order")
    add("--loss_weights", nargs="+", default=[], metavar="LOSS=W",
        help="weights of the summed losses, as para=2, with SimCSE simcse_sst=0.1 (default: 1)")
    add("--calibration_examples", type=natural, default=2000, metavar="N",
        help="before each evaluation, fit each head's offset on N training examples of its task, "
        "since dropout shifts its outputs; 0 for none (default: %(default)s)")
    add("--gradient_surgery", nargs="?", choices=("sum", "mean"), const="sum", default=None,
        help="project conflicting task gradients (PCGrad), then sum (default) or average them")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", "--epoch", type=natural, default=10,
        help="of --steps_per_epoch each; 0 only evaluates (default: %(default)s)")
    add("--steps_per_epoch", type=positive, metavar="N", help="optimiser steps per epoch (default: "
        "the batches of the task that has most of them, over --accumulate, at most 2000)")
    add("--batch_size", type=positive, default=8,
        help="examples of each task a step, over all processes (default: %(default)s)")
    add("--task_batch_sizes", nargs="+", default=[], metavar="TASK=N",
        help="other sizes for single tasks, such as para=64")
    add("--accumulate", type=positive, default=1, metavar="N",
        help="batches per optimiser step; in-batch negatives stay those of one batch "
        "(default: %(default)s)")
    add("--lr", type=rate, help="peak learning rate of the encoder (heads in last-linear-layer; "
        f"default: {', '.join(f'{m} {r[0] or r[1]:g}' for m, r in LEARNING_RATES.items())})")
    add("--head_lr", type=rate, help="peak learning rate of the newly initialised heads (default: "
        f"{LEARNING_RATES['full-model'][1]:g} beside a trained encoder, "
        f"{LEARNING_RATES['last-linear-layer'][1]:g} beside a frozen one)")
    add("--layer_decay", type=number(float, 0.01, 1), default=1.0, metavar="D",
        help="each encoder layer learns at D times the rate of the layer above it, the embeddings "
        "at D times that of the lowest (default: %(default)g)")
    add("--freeze_word_embeddings", action=argparse.BooleanOptionalAction, default=False,
        help="full-model: train all but the word vectors, half of a small encoder's weights; "
        "--no-freeze_word_embeddings overrides a recipe that freezes them")
    add("--warmup", type=share, default=0.1, metavar="SHARE",
        help="share of the steps with rising learning rate, then linear decay "
        "(default: %(default)g)")
    add("--weight_decay", type=number(float, 0, None), default=1e-3,
        help="AdamW's, not on biases and LayerNorm (default: %(default)g)")
    add("--clip", type=number(float, 0, None), default=1.0, metavar="NORM",
        help="clip the gradient's norm to this; 0 for no limit (default: %(default)g)")
    add("--hidden_dropout_prob", type=number(float, 0, 0.99), metavar="P",
        help="dropout of the encoder and the heads (default: the encoder's own)")
    add("--max_length", type=number(int, 3, None), metavar="TOKENS",
        help="longest sequence (default: the encoder's limit)")
    add("--patience", type=natural, default=0, metavar="N",
        help="stop after N evaluations without a better overall score; 0 for never "
        "(default: %(default)s)")
    add("--seed", type=number(int, 0, 2**31), default=11711,
        help="seed of initial weights, data order and dropout (default: %(default)s)")

    add = parser.add_argument_group("the run").add_argument
    add("--model_file_suffix", metavar="NAME", help="the run is runs/<mode>-NAME")
    add("--runs_dir", default="runs", metavar="DIR",
        help="folder of all runs (default: %(default)s)")
    add("--predictions_dir", default="predictions", metavar="DIR",
        help="folder of the prediction files (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run from its last complete state")
    add("--overwrite", action="store_true", help="remove an earlier run of the same name")
    add("--save_every", type=natural, default=0, metavar="N",
        help="also save a state every N steps; 0: after each epoch only (default: %(default)s)")
    add("--log_every", type=positive, default=50, metavar="N",
        help="log every N steps (default: %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")

    add = parser.add_argument_group("hardware").add_argument
    add("--use_gpu", action="store_true",
        help="fail without a GPU; by default the best device that is there is used")
    add("--precision", choices=PRECISIONS, default="auto",
        help="%(default)s (default): bf16 where the hardware has it")
    add("--deterministic", action="store_true", help="the same bits on every run on CUDA; slower")

    add = parser.add_argument_group("data").add_argument
    add("--data_dir", metavar="DIR",
        help="folder of the data files (default: data, or the sample in data/sample)")
    add("--require_test", action="store_true", help="fail where a test file is missing")
    for name in TASKS:
        for split in SPLITS:
            add(f"--{name}_{split}", metavar="FILE", help=f"{name} {split} file")
        for split in ("dev", "test"):
            add(f"--{name}_{split}_out", metavar="FILE", help=f"{name} {split} predictions")
    return parser


def get_args(argv=None):
    """The command line, checked: `(args, RunFolder)`, with the words of it as `args.argv`.

    A run that is continued takes what is not given from its `run.json`. Raises `UserError` for a
    mistake.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    recipe = parser.parse_args(argv).recipe
    if recipe:
        parser.set_defaults(**RECIPES[recipe].flags)
    args = parser.parse_args(argv)
    args.argv = argv
    unset = object()  # a flag that keeps this value was not given
    blank = argparse.Namespace(**dict.fromkeys(vars(args), unset))
    given = vars(parser.parse_args(argv, namespace=blank))
    args.given = {name for name, value in given.items() if value is not unset}
    args.tasks = [name for name in TASKS if name in args.tasks]
    args.LoRA_targets = in_order(args.LoRA_targets)
    drop_inapplicable_flags(args)
    args.expanded_command = expanded_command(parser, args)
    name = run_name(args.fine_tune_mode, args.model_file_suffix or args.recipe)
    run = RunFolder(Path(args.runs_dir) / name)
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if args.resume and run.holds_run():
        take_flags_of_run(args, run.description())
    check_args(args)
    if run.holds_run() and not (args.resume or args.overwrite):
        command = shlex.join([*launch_command(SCRIPT), *argv])
        raise UserError(
            f"{run.path} holds a run; continue it with `{command} --resume` "
            f"or replace it with `{command} --overwrite`"
        )
    return args, run


def in_order(targets):
    """Kinds of linear layer in the order of `LORA_TARGETS`, each once."""
    return [name for name in LORA_TARGETS if name in targets]


def drop_inapplicable_flags(args):
    """Undo what a recipe has set for tasks or for a mode that the user has not chosen."""
    if args.recipe and args.fine_tune_mode != RECIPES[args.recipe].flags["fine_tune_mode"]:
        for name, value in (("lr", None), ("freeze_word_embeddings", False)):
            if name not in args.given:
                setattr(args, name, value)
    if "r_drop" not in args.given:
        trained = args.tasks if args.fine_tune_mode != "last-linear-layer" else []
        args.r_drop = [name for name in args.r_drop if name in trained]
    if "loss_weights" not in args.given:
        none = {f"r_drop_{name}" for name in TASKS if name not in args.r_drop}
        args.loss_weights = [v for v in args.loss_weights if v.partition("=")[0] not in none]
    if "pair_encoding" not in args.given:
        of_tasks = [v for v in args.pair_encoding if "=" not in v or v.split("=")[0] in args.tasks]
        args.pair_encoding = of_tasks or ["separate"]


def without_resume_flags(argv):
    """The command line without --resume and --overwrite, so that either can be appended."""
    return [word for word in argv if word not in ("--resume", "--overwrite")]


def expanded_command(parser, args):
    """The command line with the recipe's flags written out, None without a recipe.

    Flags of the recipe that were given otherwise, and LoRA's in another mode, are omitted.
    """
    if args.recipe is None:
        return None
    words = []
    for action in parser._actions:
        name = action.dest
        value = getattr(args, name, None)
        lost = name.startswith("LoRA_") and args.fine_tune_mode != "LoRA"
        lost = lost or value is None or value is False or value == []
        if name in RECIPES[args.recipe].flags and name not in args.given and not lost:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [action.option_strings[0], *(f"{v:g}" if isinstance(v, float) else str(v)
                                                  for v in values)]  # fmt: skip
    words += without_resume_flags(args.argv)
    return shlex.join([*launch_command(SCRIPT), *words])


def flags_of(description):
    """Every flag of a run by name; one that `description` does not have has its default."""
    flags = vars(make_parser().parse_args([])) | description["args"]
    return flags | {"LoRA_targets": in_order(flags["LoRA_targets"])}


def take_flags_of_run(args, description):
    """Fill in the flags of the run to continue; one that was given must be the run's.

    Afterwards `args.given` holds only flags that may differ: the others were checked at its start.
    """
    differences = []
    for name, value in flags_of(description).items():
        own = getattr(args, name, None)
        if name in OF_ONE_COMMAND or (name in FREE_WHEN_CONTINUING and name in args.given):
            continue
        was = {value, description["precision"]} if name == "precision" else (value,)  # of auto
        if name in args.given and own not in was:
            earlier = "not given" if value is None else " or ".join(sorted(map(str, was)))
            differences.append(f"--{name} is {own}, was {earlier}")
        setattr(args, name, value)
    if differences:
        raise UserError(f"--resume: not the run that was begun: {'; '.join(differences)}")
    args.given &= FREE_WHEN_CONTINUING | OF_ONE_COMMAND


def check_args(args):
    """Raise `UserError` for flags that contradict each other.

    Sets what follows from them: `joint`, `both`, `batch_sizes`, `contrasted` (the tasks with
    unsupervised SimCSE), `weights`, `encoder_rate` and `head_rate`.
    """
    mode, given = args.fine_tune_mode, args.given
    lora_flags = sorted(name for name in given if name.startswith("LoRA_"))
    if mode != "LoRA" and lora_flags:
        raise UserError(f"--{lora_flags[0]}: only with --fine-tune-mode LoRA, not {mode}")
    if mode != "full-model" and args.freeze_word_embeddings:
        raise UserError(f"--freeze_word_embeddings: only in full-model; {mode} freezes them anyway")
    args.joint, args.both = pair_encodings(args.pair_encoding, args.tasks)
    args.batch_sizes = batch_sizes(args)
    if args.simcse_tasks and not args.unsupervised_simcse:
        raise UserError("--simcse_tasks: only with --unsupervised_simcse")
    if args.supervised_simcse and "para" not in args.tasks:
        raise UserError("--supervised_simcse: needs the task para")
    for flag in ("simcse_tasks", "r_drop"):
        for name in getattr(args, flag) or []:
            if name not in args.tasks:
                raise UserError(f"--{flag} {name}: not among --tasks {' '.join(args.tasks)}")
    args.contrasted = list(args.simcse_tasks or args.tasks) if args.unsupervised_simcse else []
    for name in args.contrasted + ["para"] * args.supervised_simcse:
        if args.batch_sizes[name] < 2:
            raise UserError(
                f"--batch_size 1 of {name}: SimCSE needs other examples in the batch, at least 2"
            )
    if args.swap_pairs and not any(TASKS[name].is_pair for name in args.r_drop):
        raise UserError("--swap_pairs: only with --r_drop para, whose second pass it swaps")
    if mode == "last-linear-layer":
        check_frozen(args)
    check_output_paths(args)
    if args.gradient_surgery and args.accumulate > 1:
        raise UserError("--gradient_surgery: not with --accumulate; raise --batch_size")
    args.weights = loss_weights(args)
    encoder_lr, head_lr = LEARNING_RATES[mode]
    frozen_encoder = mode == "last-linear-layer"
    args.encoder_rate = 0.0 if frozen_encoder else args.lr or encoder_lr
    args.head_rate = args.head_lr or (args.lr if frozen_encoder else None) or head_lr


def check_frozen(args):
    """Raise `UserError` for flags that have no effect on a frozen encoder."""
    frozen = "the encoder is frozen and in eval mode in --fine-tune-mode last-linear-layer"
    if args.unsupervised_simcse or args.supervised_simcse:
        raise UserError(f"SimCSE: {frozen}; its losses could train nothing")
    if args.r_drop:
        raise UserError(f"--r_drop: {frozen}; its two passes would be one")
    if args.gradient_surgery:
        raise UserError(f"--gradient_surgery: {frozen}; tasks share no trained weights")
    if args.layer_decay < 1:
        raise UserError(f"--layer_decay: {frozen}; none of its layers learns")
    if {"lr", "head_lr"} <= args.given:
        raise UserError(f"--lr and --head_lr: {frozen}; both are the heads' rate")
    together = args.joint + args.both
    if args.tasks == ["sts"] and args.sts_head == "cosine" and not together:
        raise UserError(f"--sts_head cosine: {frozen}; nothing to train; use --sts_head linear")


def check_output_paths(args):
    """Raise `UserError` for prediction files that could not be written after hours of training.

    `OutputError` where only the permission is missing.
    """
    taken = {}
    for what, path in output_paths(args).items():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or (path.exists() and not path.is_file()):
            raise UserError(f"{path}: for predictions; expected a file, new or to be replaced")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: for predictions; {folder} is not writable")
        if (other := taken.setdefault(os.path.realpath(path), what)) != what:
            raise UserError(f"{path}: one file for several predictions ({other}, {what})")


def check_data_is_kept(args, data):
    """Raise `UserError` where predictions would replace a data file, of `data_paths`' answer."""
    files = {os.path.realpath(path) for of_task in data.values() for path in of_task.values()}
    for what, path in output_paths(args).items():
        if os.path.realpath(path) in files:
            raise UserError(f"{path}: for predictions ({what}), which would replace the data in it")


def output_paths(args):
    """Path of every prediction file, by task and split as text, such as "sst dev"."""
    return {
        f"{name} {split}": Path(
            getattr(args, f"{name}_{split}_out")
            or Path(args.predictions_dir) / TASKS[name].output_name(split)
        )
        for name in args.tasks
        for split in ("dev", "test")
    }


def batch_sizes(args):
    """Task -> examples in a batch, from `--batch_size` and `--task_batch_sizes`."""
    sizes = dict.fromkeys(args.tasks, args.batch_size)
    for value in args.task_batch_sizes:
        name, _, size = value.partition("=")
        if name not in sizes or not re.fullmatch("[1-9][0-9]{0,6}", size):
            raise UserError(
                f"--task_batch_sizes {value}; expected TASK=N with TASK of {', '.join(sizes)}"
            )
        sizes[name] = int(size)
    return sizes


def pair_encodings(values, tasks):
    """Pair tasks to encode jointly, and those to encode both ways, from `--pair_encoding`."""
    pairs = [name for name in tasks if TASKS[name].is_pair]
    how = dict.fromkeys(pairs, "separate")
    for value in values:
        name, _, choice = value.rpartition("=")
        if choice not in ("separate", "joint", "both") or (name and name not in how):
            raise UserError(
                f"--pair_encoding {value}; expected separate, joint or both, or TASK=separate, "
                f"TASK=joint, TASK=both with TASK of {', '.join(pairs)}"
            )
        how.update({name: choice} if name else dict.fromkeys(pairs, choice))
    return tuple(tuple(n for n in pairs if how[n] == choice) for choice in ("joint", "both"))


def loss_weights(args):
    """Every loss of the run -> its weight, 1 unless `--loss_weights` says otherwise.

    Raises `UserError` where one is given for a loss that the run does not have.
    """
    losses = [*args.tasks, *(f"r_drop_{name}" for name in args.r_drop)]
    losses += [f"simcse_{name}" for name in args.contrasted]
    losses += ["simcse_para_supervised"] * args.supervised_simcse
    weights = dict.fromkeys(losses, 1.0)
    for value in args.loss_weights:
        name, _, weight = value.partition("=")
        if name not in weights:
            if "loss_weights" not in args.given:
                continue  # recorded by a run that began before there was this check
            raise UserError(
                f"--loss_weights {value}: no such loss in this run; it has {', '.join(losses)}"
            )
        try:
            weights[name] = number(float, 0, None)(weight)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--loss_weights {value}; expected LOSS=WEIGHT") from error
    return weights


def in_sample(path):
    """Whether a data file is one of the generated sample."""
    return Path(path).parent.parts[-2:] == ("data", "sample")


def uses_sample(description):
    """Whether any data file of a run, by the values of its `run.json`, is one of the sample."""
    return any(
        in_sample(file["path"])
        for of_task in description["data"].values()
        for file in of_task.values()
    )


def paths_of_run(description):
    """Path of every file of a run, as in `data_paths`, by the values of its `run.json`.

    A run without a test file has the place beside its other files where one may have come since.
    """
    paths = {}
    for name, of_task in description["data"].items():
        paths[name] = {split: Path(file["path"]) for split, file in of_task.items()}
        paths[name].setdefault("test", paths[name]["dev"].with_name(TASKS[name].file_name("test")))
    return paths


def data_paths(args):
    """Path of every file: `{task: {split: Path}}`, and a warning or None.

    Where no file of the data folder is there and none was named, it is the sample's, all of it.
    """
    folder = Path(args.data_dir or "data")
    named = {
        (name, split): getattr(args, f"{name}_{split}")
        for name in args.tasks
        for split in SPLITS
        if getattr(args, f"{name}_{split}")
    }
    for (name, split), path in named.items():
        if split == "test" and not (Path(path).exists() or Path(path).is_symlink()):
            raise UserError(f"--{name}_test {path}: no such file")
    warning = None
    files = [folder / task.file_name(split) for task in TASKS.values() for split in SPLITS]
    missing = not any(map(os.path.lexists, files))  # a link to nothing is not missing: it is broken
    missing = missing and (folder.exists() or not folder.is_symlink())
    if not args.data_dir and not named and missing:
        warning = (
            f"none of the course's files is in {folder}/: using the small generated sample in "
            f"data/sample instead, good for a first run only (python data/prepare.py fetches them)"
        )
        folder = HERE / "data" / "sample"
    return {
        name: {
            split: Path(named.get((name, split), folder / TASKS[name].file_name(split)))
            for split in SPLITS
        }
        for name in args.tasks
    }, warning
