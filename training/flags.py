"""The command line: its flags, their checks, and the flags of a run that is resumed.

The flags of the course starter and of the paper keep their names. Nothing here needs torch, so
that `--help` and a wrong flag are answered at once.
"""

import argparse
import difflib
import os
import shlex
import sys
from dataclasses import dataclass

from config import (
    LEARNING_RATES,
    LORA_TARGETS,
    LORA_VARIANTS,
    MODES,
    PRECISIONS,
    RECIPES,
    TASKS,
    LoRAConfig,
    PALConfig,
    UserError,
)
from runtime.script import launch_command
from training.plan import AUXILIARY_WEIGHT, check_flags, layer_range, make_plan, number
from training.run_folder import RunFolder, run_path

SCRIPT = "multitask_classifier.py"
SPLITS = ("train", "dev", "test")
# Flags of one call: never compared when a run is resumed.
OF_ONE_COMMAND = {"resume", "overwrite", "debug", "runs_dir", "require_test"}
OF_ONE_COMMAND |= {"use_gpu", "use_cpu", "model_file_suffix"}  # the suffix only finds the run
# Flags that may differ when a run is resumed: training does not depend on them. The content of the
# data files is compared, wherever they lie.
FREE_WHEN_RESUMING = {
    *("save_every", "log_every", "tensorboard", "predictions_dir", "data_dir"),
    *(f"{task}_{what}" for task in TASKS for what in (*SPLITS, "dev_out", "test_out")),
}
# Names of flags in other training scripts.
OTHER_NAMES = {"learning_rate": "lr", "rank": "lora_r", "alpha": "lora_alpha", "wd": "weight_decay"}
OTHER_NAMES |= {"dropout": "hidden_dropout_prob", "bs": "batch_size", "steps": "steps_per_epoch"}
OTHER_NAMES |= {"gradient_accumulation_steps": "accumulate", "name": "model_file_suffix"}
OTHER_NAMES |= {"output_dir": "runs_dir", "option": "fine_tune_mode"}


class FlagParser(argparse.ArgumentParser):
    """An argument parser without abbreviations. Its errors are `UserError`s."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args=None, namespace=None):
        """As argparse's; the error for an unknown flag names the nearest one."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            plain = {plain_name(flag): flag for flag in self._option_string_actions}
            wanted = plain_name(unknown[0].split("=")[0])
            near = difflib.get_close_matches(OTHER_NAMES.get(wanted, wanted), plain, n=1)
            hint = f"; did you mean {plain[near[0]]}?" if near else ""
            self.error(f"unknown argument {unknown[0]}{hint}")
        return namespace

    def attach_texts(self, argv, flags):
        """Join each text to its flag, as `--sentence=TEXT`: a text may begin with a dash."""
        words = []
        for word in sys.argv[1:] if argv is None else argv:
            if words and words[-1] in flags and word not in self._option_string_actions:
                words[-1] += f"={word}"
            else:
                words.append(word)
        return words

    def error(self, message):
        """Raise `UserError`."""
        raise UserError(f"{message} (--help lists all)")


def add_device_flags(parser):
    """Add --use_gpu and --use_cpu, one of which may be given, to a parser or a group of flags."""
    add = parser.add_mutually_exclusive_group().add_argument
    usual = "by default the best available device is used"
    add("--use_gpu", action="store_true", help=f"fail without a GPU; {usual}")
    add("--use_cpu", action="store_true", help="use the CPU even if there is a GPU")


def plain_name(flag):
    """A flag in lower case, without leading dashes, with underscores inside."""
    return flag.strip("-").lower().replace("-", "_")


def is_utf8(text):
    """Whether a word of the command line can be written as UTF-8; a raw byte in it cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# fmt: off
def make_parser():
    """All flags, by group."""
    parser = FlagParser(
        usage="%(prog)s [FLAG ...]",
        description="Fine-tune a hand-written BERT on several sentence tasks at once.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="python %(prog)s --fine-tune-mode LoRA --LoRA_r 32\n"
        "python %(prog)s --pretrained bundled --recipe best\n"
        "then: python evaluation.py",
    )
    positive, natural = number(int, 1), number(int, 0)
    rate, share = number(float, 0, above=True), number(float, 0, 1)

    add = parser.add_argument_group("what is trained").add_argument
    add("--recipe", choices=RECIPES, metavar="NAME", help="preset flags, a row of the paper's "
        f"Table 1 or ours, 'best': {', '.join(RECIPES)}; a flag given beside it replaces its "
        "whole value, so --loss_weights para=2 also drops its R-Drop weights; another "
        "--fine-tune-mode drops its --lr and --freeze_word_embeddings")
    add("--fine-tune-mode", choices=MODES, default="full-model", help="what is trained: the heads "
        "alone, everything, LoRA adapters and the heads, or projected attention layers, LayerNorms "
        "and the heads (default: %(default)s)")
    add("--tasks", nargs="+", choices=TASKS, metavar="TASK",
        default=[name for name, task in TASKS.items() if task.default],
        help=f"any of {', '.join(TASKS)} (default: all but cfimdb)")
    add("--pretrained", metavar="ENCODER", help="a folder, OWNER/NAME of a BERT on the "
        "hub, or 'bundled' (default: bert-base-uncased; if the hub is out of reach, the bundled "
        "MiniLM)")
    add("--start_from", metavar="RUN", help="start from the best model of this run, not with "
        "--pretrained: its encoder, its adapters (merged unless both runs use LoRA), and the heads "
        "that fit")

    add = parser.add_argument_group("LoRA (only with --fine-tune-mode LoRA)").add_argument
    add("--LoRA_r", type=positive, default=LoRAConfig.r, metavar="R",
        help="rank (default: %(default)s)")
    add("--LoRA_alpha", type=rate, default=LoRAConfig.alpha, metavar="A",
        help="the low-rank path is scaled by A/R (default: %(default)g)")
    add("--LoRA_variant", choices=LORA_VARIANTS, default=LoRAConfig.variant,
        help="rslora: scaled by A/√R instead; dora: also learn the magnitude of each row of the "
        "adapted weight (default: %(default)s)")
    add("--LoRA_lr_ratio", type=rate, default=1.0, metavar="X", help="LoRA+: the matrices B, and "
        "dora's magnitudes, learn at X times --lr; its authors use 16 (default: %(default)g)")
    add("--LoRA_dropout", type=number(float, 0, 0.99), default=LoRAConfig.dropout, metavar="P",
        help="dropout on the input of the low-rank path (default: %(default)g)")
    add("--LoRA_targets", nargs="+", choices=LORA_TARGETS, metavar="LAYER",
        default=list(LORA_TARGETS), help=f"linear layers (default: all): {', '.join(LORA_TARGETS)}")
    add("--LoRA_layers", nargs="+", type=layer_range, metavar="I-J", help="encoder layers that are "
        "adapted, such as 6-11, the lowest being 0 (default: all)")

    add = parser.add_argument_group("projected attention layers (PALs)").add_argument
    add("--pals", action="store_true", help="full-model: train each task's own projected attention "
        "layers too; --fine-tune-mode PAL trains these and the LayerNorms of a frozen encoder")
    add("--PAL_size", type=positive, metavar="S", help="dimensions of their attention, a multiple "
        "of --PAL_heads (default: 204 for bert-base, in proportion for other encoders)")
    add("--PAL_heads", type=positive, default=PALConfig.heads, metavar="H",
        help="heads of their attention (default: %(default)s)")

    add = parser.add_argument_group("heads and losses",
        "The head 'linear' is one linear layer; of a pair it takes u, v, |u - v| and\n"
        "u * v of the two vectors u and v, and para calls it 'features'; 'ffn' has a\n"
        "hidden layer before it; 'dot' and 'cosine' compare u with v;\n"
        "'features+cosine' is the sum of those two heads.").add_argument
    for name, task in TASKS.items():
        add(f"--{name}_head", choices=task.heads, default=task.heads[0],
            help=f"{task.title} head (default: %(default)s)")
    add("--pooling", choices=("mean", "cls"), default="mean",
        help="a sentence's vector: mean over its tokens (default) or the first token")
    add("--pair_encoding", nargs="+", default=["separate"], metavar="[TASK=]HOW",
        help="'separate' (bi-encoder, default), 'joint' (cross-encoder: a pair is one sequence, "
        "with a linear head) or 'both', for all pair tasks or as para=both sts=separate")
    add("--unsupervised_simcse", action="store_true", help="contrastive loss on sentences")
    add("--supervised_simcse", action="store_true", help="contrastive loss on paraphrase pairs")
    add("--simcse_tasks", nargs="+", choices=TASKS, metavar="TASK",
        help="tasks with the unsupervised loss (default: all of --tasks)")
    add("--r_drop", nargs="*", choices=[n for n, t in TASKS.items() if t.kind != "score"],
        default=[], metavar="TASK", help="R-Drop on these tasks: penalise different predictions "
        "under two dropout masks (default: none)")
    add("--swap_pairs", action="store_true",
        help="R-Drop's second pass has the two sentences of a pair in the other order")
    add("--mlm", nargs="+", choices=TASKS, default=[], metavar="TASK",
        help="masked language modelling on the training sentences of these tasks (default: none); "
        "with --loss_weights sst=0 the task sst has no head and is not evaluated; if no task has a "
        "head, the best model is the one with the lowest masked loss on dev")
    add("--loss_weights", nargs="+", default=[], metavar="LOSS=W",
        help="weights of the summed losses, as para=2, simcse_sst=0.1, mlm_sst=0.1 (default: 1)")
    add("--calibration_examples", type=natural, default=2000, metavar="N",
        help="before each evaluation, fit each head's offset on N training examples of its task, "
        "since dropout shifts its outputs; 0 for none (default: %(default)s)")
    add("--gradient_surgery", nargs="?", choices=("sum", "mean", "main", "vaccine"), const="sum",
        default=None, help="project conflicting task gradients (PCGrad), then sum (default) or "
        "average them; 'main': project those of the auxiliary losses alone (SimCSE, --mlm), which "
        f"weigh {AUXILIARY_WEIGHT:g} each unless --loss_weights says otherwise (MTRec); 'vaccine': "
        "raise the tasks' cosines to their moving averages, then sum (GradVac)")
    add("--main_tasks", nargs="+", choices=TASKS, metavar="TASK", help="with --gradient_surgery "
        "main: the losses of all other tasks are auxiliary too (default: all of --tasks are main)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", "--epoch", type=natural, default=10,
        help="each of --steps_per_epoch steps; 0: only evaluate (default: %(default)s)")
    add("--steps_per_epoch", type=positive, metavar="N", help="optimiser steps per epoch (default: "
        "one pass over the task with most batches, divided by --accumulate, but at most 2000)")
    add("--batch_size", type=positive, default=8,
        help="examples of each task per batch, over all processes (default: %(default)s)")
    add("--task_batch_sizes", nargs="+", default=[], metavar="TASK=N",
        help="other sizes for single tasks, such as para=64; not with --sampling")
    add("--sampling", choices=("equal", "proportional", "annealed"), default="equal",
        help="how the examples of a step are shared between the tasks: equal (default); "
        "proportional to a task's N training examples; annealed: to N^a, a from 1 in the first "
        "epoch to 0.2 in the last; a task's losses weigh as much as its share")
    add("--accumulate", type=positive, default=1, metavar="N",
        help="batches per optimiser step, whose losses are averaged; SimCSE compares within one "
        "batch; not with --gradient_surgery (default: %(default)s)")
    add("--lr", type=rate, help="peak learning rate of the encoder; in LoRA of the adapters, in "
        "PAL of the LayerNorms, in last-linear-layer of the heads ("
        f"default: {', '.join(f'{m} {r[0] or r[1]:g}' for m, r in LEARNING_RATES.items())})")
    add("--head_lr", type=rate, help="peak learning rate of what is new, heads and PALs (default: "
        f"{LEARNING_RATES['full-model'][1]:g}, in last-linear-layer "
        f"{LEARNING_RATES['last-linear-layer'][1]:g})")
    add("--layer_decay", type=number(float, 0.01, 1), default=1.0, metavar="D",
        help="each encoder layer learns at D times the rate of the layer above it, the embeddings "
        "at D times that of the lowest (default: %(default)g)")
    add("--freeze_word_embeddings", action=argparse.BooleanOptionalAction, default=False,
        help="full-model: train all but the word vectors, half of a small encoder's weights; "
        "--no-freeze_word_embeddings overrides a recipe that freezes them")
    add("--warmup", type=share, default=0.1, metavar="SHARE",
        help="share of the steps with rising learning rate, then linear decay "
        "(default: %(default)g)")
    add("--weight_decay", type=number(float, 0), default=1e-3,
        help="of AdamW; none on biases and LayerNorm (default: %(default)g)")
    add("--clip", type=number(float, 0), default=1.0, metavar="NORM",
        help="clip the gradient's norm to this; 0 for no limit (default: %(default)g)")
    add("--hidden_dropout_prob", type=number(float, 0, 0.99), metavar="P",
        help="dropout of the encoder and the heads (default: the encoder's own)")
    add("--max_length", type=number(int, 3), metavar="TOKENS",
        help="longest sequence (default: the encoder's limit)")
    add("--patience", type=natural, default=0, metavar="N",
        help="stop after N evaluations without a better overall score; 0 for never "
        "(default: %(default)s)")
    add("--seed", type=number(int, 0, 2**31), default=11711,
        help="seed of initial weights, data order and dropout (default: %(default)s)")

    add = parser.add_argument_group("the run").add_argument
    add("--model_file_suffix", metavar="NAME",
        help="the run is runs/<mode>-NAME (default: the recipe's name, if there is one)")
    add("--runs_dir", default="runs", metavar="DIR",
        help="folder of all runs (default: %(default)s)")
    add("--predictions_dir", default="predictions", metavar="DIR",
        help="folder of the prediction files (default: %(default)s)")
    add("--resume", action="store_true", help="resume a run from its last checkpoint; give its "
        "mode, suffix or recipe, and --runs_dir again; of its other flags only paths and logging "
        "may change")
    add("--overwrite", action="store_true", help="remove an earlier run of the same name")
    add("--save_every", type=natural, default=0, metavar="N",
        help="also save a checkpoint every N steps; 0: after each epoch only "
        "(default: %(default)s)")
    add("--log_every", type=positive, default=50, metavar="N",
        help="log every N steps (default: %(default)s)")
    add("--tensorboard", action="store_true", help="also write the log for TensorBoard, into the "
        "run's tensorboard/ (needs the package tensorboard)")
    add("--debug", action="store_true", help="show the traceback of an error")

    group = parser.add_argument_group("hardware")
    add_device_flags(group)
    add = group.add_argument
    add("--precision", choices=PRECISIONS, default="auto",
        help="%(default)s (default): bf16 if the hardware has it, fp16 on older CUDA GPUs, else "
        "fp32; on CUDA fp32 is TF32 unless --deterministic")
    add("--deterministic", action="store_true", help="the same bits on every run on CUDA; slower")

    add = parser.add_argument_group("data").add_argument
    add("--data_dir", metavar="DIR",
        help="folder of the data files (default: data, or the sample in data/sample)")
    add("--require_test", action="store_true", help="fail if a test file is missing")
    for name in TASKS:
        for split in SPLITS:
            add(f"--{name}_{split}", metavar="FILE", help=f"{name} {split} file")
        for split in ("dev", "test"):
            add(f"--{name}_{split}_out", metavar="FILE", help=f"{name} {split} predictions")
    return parser
# fmt: on


def default_flags():
    """Every flag's default by name."""
    return vars(make_parser().parse_args([]))


def flag_words(name, value):
    """The words that set a flag by its name in the parser's namespace."""
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [f"--{'fine-tune-mode' if name == 'fine_tune_mode' else name}", *map(str, values)]


# --------------------------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Command:
    """A checked command line: every flag, the words typed, and the names of the flags in them.

    When a run is resumed, `given` has only those flags that may differ from the run's.
    """

    flags: argparse.Namespace
    argv: list
    given: set

    def words(self, recipe=()):
        """The command that starts the run again, without --resume and --overwrite."""
        kept = [word for word in self.argv if word not in ("--resume", "--overwrite")]
        return [*launch_command(SCRIPT), *recipe, *kept]

    def expanded(self):
        """The command with the recipe's flags written out, as text; None without a recipe."""
        if self.flags.recipe is None:
            return None
        recipe, left_out = [], self.given | unused_heads(self.flags).keys()
        for name in RECIPES[self.flags.recipe].flags:
            value = getattr(self.flags, name)
            is_unused = name.startswith("LoRA_") and self.flags.fine_tune_mode != "LoRA"
            if not is_unused and name not in left_out and value not in (None, False, []):
                recipe += flag_words(name, value)
        return shlex.join(self.words(recipe))


def parse_command(argv=None):
    """Parse and check the command line (`sys.argv` by default); returns a `Command`.

    With `--resume`, flags that are not given come from the run's `run.json`. Raises `UserError`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    recipe = parser.parse_args(argv).recipe
    if recipe:
        parser.set_defaults(**RECIPES[recipe].flags)
    flags = parser.parse_args(argv)
    for path in (os.getcwd(), *argv):
        if not is_utf8(path):
            raise UserError(f"{path!a}: not UTF-8; rename the folder, or set PYTHONUTF8=1")
    given = names_given(parser, argv)
    for flag in ("tasks", "mlm", "r_drop", "simcse_tasks", "main_tasks"):
        if chosen := getattr(flags, flag):  # their order means nothing
            setattr(flags, flag, [name for name in TASKS if name in chosen])
    flags.LoRA_targets = [name for name in LORA_TARGETS if name in flags.LoRA_targets]
    if flags.LoRA_layers:
        flags.LoRA_layers = sorted({layer for part in flags.LoRA_layers for layer in part})
    drop_inapplicable_flags(flags, given)
    if flags.resume and flags.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    run = RunFolder(run_path(flags))
    is_resumed = flags.resume and run.holds_run()
    if is_resumed:
        given = take_flags_of_run(flags, given, run.description())
    check_flags(flags, given)
    if not is_resumed:  # a recipe's heads
        vars(flags).update((h, d) for h, d in unused_heads(flags).items() if h not in given)
    if flags.start_from and os.path.realpath(flags.start_from) == os.path.realpath(run.path):
        raise UserError(f"--start_from {run.path}: this run itself; add --model_file_suffix NAME")
    command = Command(flags, argv, given)
    if run.holds_run() and not (flags.resume or flags.overwrite):
        words = shlex.join([*launch_command(SCRIPT), *argv])
        raise UserError(
            f"{run.path} holds a run; resume it with `{words} --resume` "
            f"or replace it with `{words} --overwrite`"
        )
    return command


def unused_heads(flags):
    """The head flags, with defaults, of pairs encoded as one sequence: their head is linear."""
    return {f"{name}_head": TASKS[name].heads[0] for name in make_plan(flags, {}).joint}


def names_given(parser, argv):
    """Names of the flags that the words of `argv` set."""
    unset = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv)), unset))
    values = vars(parser.parse_args(argv, namespace=blank))
    return {name for name, value in values.items() if value is not unset}


def drop_inapplicable_flags(flags, given):
    """Undo a recipe's flags that do not apply to the chosen tasks or mode."""
    if flags.recipe and flags.fine_tune_mode != RECIPES[flags.recipe].flags["fine_tune_mode"]:
        for name, value in (("lr", None), ("freeze_word_embeddings", False)):
            if name not in given:
                setattr(flags, name, value)
    if "r_drop" not in given:
        trained = flags.tasks if flags.fine_tune_mode != "last-linear-layer" else []
        flags.r_drop = [name for name in flags.r_drop if name in trained]
    if "loss_weights" not in given:
        unused = {f"r_drop_{name}" for name in TASKS if name not in flags.r_drop}
        flags.loss_weights = [w for w in flags.loss_weights if w.split("=")[0] not in unused]
    if "pair_encoding" not in given:
        known = [w for w in flags.pair_encoding if "=" not in w or w.split("=")[0] in flags.tasks]
        flags.pair_encoding = known or ["separate"]


def take_flags_of_run(flags, given, description):
    """Fill in the flags of the run to resume; raises `UserError` where a given one differs.

    Returns the given names that were not compared.
    """
    differences = []
    for name, value in description["args"].items():
        if name in OF_ONE_COMMAND or (name in FREE_WHEN_RESUMING and name in given):
            continue
        allowed = {value, description["precision"]} if name == "precision" else (value,)
        if name in given and getattr(flags, name) not in allowed:
            earlier = "not given" if value is None else " or ".join(sorted(map(str, allowed)))
            differences.append(f"--{name} is {getattr(flags, name)}, was {earlier}")
        setattr(flags, name, value)
    if differences:
        more = "; to train longer, begin a new run with --start_from and the old one's folder"
        more = more if any(text.startswith("--epochs") for text in differences) else ""
        found = "; ".join(differences) + more
        raise UserError(f"--resume: the run was begun with other settings: {found}")
    return given & (FREE_WHEN_RESUMING | OF_ONE_COMMAND)
