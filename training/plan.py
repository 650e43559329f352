"""The plan of a run: what follows from its flags and the size of its data.

The flags are what the user asked for, and `run.json` stores them as they are. The plan is derived
from them, once, and never changes.
"""

import argparse
import importlib.util
import math
from dataclasses import dataclass

from config import LEARNING_RATES, TASKS, LoRAConfig, PALConfig, UserError

MOST_STEPS = 2000  # of an epoch, unless --steps_per_epoch says otherwise
AUXILIARY_WEIGHT = 0.3  # of the auxiliary losses of --gradient_surgery main (Bi et al. 2022)


def number(kind, low, high=None, *, above=False):
    """An argparse type: a finite int or float from `low` (or above it) to `high`."""
    expected = "a whole number" if kind is int else "a number"
    expected += " above" if above else " from" if high else " of at least"
    expected += f" {low:,} to {high:,}" if high else f" {low:,}"

    def parse(text):
        try:
            value = kind(text)
            is_good = math.isfinite(value) and low <= value and not (above and value == low)
            is_good = is_good and (high is None or value <= high)
        except (ValueError, OverflowError):  # not a number, or an int beyond all floats
            is_good = False
        if not is_good:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}; expected {expected}")
        return value

    return parse


def layer_range(text):
    """An argparse type: the numbers of encoder layers, written as 6-11, or of one layer."""
    first, dash, last = (part.strip() for part in text.partition("-"))
    parse = number(int, 0, 999)
    layers = list(range(parse(first), parse(last if dash else first) + 1))
    if not layers:
        raise argparse.ArgumentTypeError(f"{text!r}; expected the lower layer first")
    return layers


def pair_encoding(text):
    """An argparse type: one of the ways to encode a pair."""
    if text not in ("separate", "joint", "both"):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; expected separate, joint or both")
    return text


@dataclass(frozen=True)
class Plan:
    """What follows from the flags; `flags` is the parser's namespace, for everything else."""

    flags: argparse.Namespace
    joint: tuple  # pair tasks encoded as one sequence
    both: tuple  # pair tasks encoded as one sequence and as two
    tasks: list  # those with a head; with --mlm a task of weight 0 has none
    batch_sizes: dict  # task -> examples in a batch before --sampling, over all processes
    epoch_sizes: list  # for each epoch such a dict after --sampling; the last for all later ones
    simcse_tasks: tuple  # tasks with unsupervised SimCSE
    loss_weights: dict  # every loss of the run -> its weight in the sum, before --sampling
    encoder_lr: float  # peak learning rates
    head_lr: float
    steps_per_epoch: int
    total_steps: int

    @property
    def is_frozen(self):
        """Whether the encoder is frozen and only the heads are trained."""
        return self.flags.fine_tune_mode == "last-linear-layer"

    def weights_at(self, step):
        """Every loss of the run -> its weight in a step.

        A loss is a mean over its task's examples. With `--sampling` its weight is multiplied by the
        task's batch size over the mean of all tasks', so that every example counts the same.
        """
        if self.flags.sampling == "equal":
            return self.loss_weights
        sizes = self.epoch_sizes[min(step // self.steps_per_epoch, len(self.epoch_sizes) - 1)]
        equal = sum(sizes.values()) / len(sizes)
        weights = self.loss_weights.items()
        return {loss: w * (sizes[task_of(loss, sizes)] / equal) for loss, w in weights}

    @property
    def lora(self):
        """The run's `LoRAConfig`, None in the other modes."""
        flags = self.flags
        if flags.fine_tune_mode != "LoRA":
            return None
        targets = tuple(flags.LoRA_targets)
        layers = tuple(flags.LoRA_layers) if flags.LoRA_layers else None
        sizes = flags.LoRA_r, flags.LoRA_alpha, flags.LoRA_dropout
        return LoRAConfig(*sizes, targets, flags.LoRA_variant, layers)

    @property
    def pals(self):
        """The run's `PALConfig`, None where it has no projected attention layers."""
        flags = self.flags
        has_pals = flags.pals or flags.fine_tune_mode == "PAL"
        return PALConfig(flags.PAL_size, flags.PAL_heads) if has_pals else None


def make_plan(flags, examples, processes=1):
    """Derive the `Plan`. `examples` maps a task to the number of its training examples.

    Where it is empty, --sampling is ignored, and --steps_per_epoch is 1 by default. Raises
    `UserError` for a value that names no task or loss of the run, or is invalid.
    """
    pairs = [name for name in flags.tasks if TASKS[name].is_pair]
    encodings = dict.fromkeys(pairs, "separate")
    expected = "separate, joint or both, or TASK=… with TASK of"
    encodings |= keyed_values(flags, "pair_encoding", pairs, pair_encoding, expected)
    sizes = dict.fromkeys(flags.tasks, flags.batch_size)
    count = number(int, 1, 10**7 - 1)
    expected = "TASK=N, N from 1, with TASK of"
    sizes |= keyed_values(flags, "task_batch_sizes", flags.tasks, count, expected)
    simcse_tasks = (flags.simcse_tasks or flags.tasks) if flags.unsupervised_simcse else ()
    contrasted = [*simcse_tasks, *["para"] * flags.supervised_simcse]
    epoch_sizes = sample_sizes(flags, sizes, examples, contrasted, processes)
    batches = max([math.ceil(n / epoch_sizes[0][name]) for name, n in examples.items()], default=1)
    encoder_lr, head_lr = LEARNING_RATES[flags.fine_tune_mode]
    is_frozen = flags.fine_tune_mode == "last-linear-layer"
    steps = flags.steps_per_epoch or min(MOST_STEPS, math.ceil(batches / flags.accumulate))
    weights = loss_weights(flags, simcse_tasks)
    return Plan(
        flags=flags,
        joint=tuple(name for name in pairs if encodings[name] == "joint"),
        both=tuple(name for name in pairs if encodings[name] == "both"),
        tasks=[name for name in flags.tasks if weights[name] or not flags.mlm],
        batch_sizes=sizes,
        epoch_sizes=epoch_sizes,
        simcse_tasks=tuple(simcse_tasks),
        loss_weights=weights,
        encoder_lr=0.0 if is_frozen else flags.lr or encoder_lr,
        head_lr=flags.head_lr or (is_frozen and flags.lr) or head_lr,
        steps_per_epoch=steps,
        total_steps=flags.epochs * steps,
    )


def keyed_values(flags, flag, keys, parse, expected):
    """The words `KEY=VALUE` of a flag as a dict. Only `pair_encoding` may leave the key out."""
    values = {}
    for word in getattr(flags, flag):
        key, _, text = word.rpartition("=")
        is_known = key in keys or (not key and flag == "pair_encoding")
        try:
            value = parse(text)
        except argparse.ArgumentTypeError:
            is_known = False
        if not is_known:
            raise UserError(f"--{flag} {word}; expected {expected} {', '.join(keys)}")
        values |= {key: value} if key else dict.fromkeys(keys, value)
    return values


def sample_sizes(flags, sizes, examples, contrasted, processes):
    """For each epoch, task -> examples in a batch, by `--sampling`; the last for all later ones.

    A batch as large as `sizes` together is shared out in proportion to N^a, N the training examples
    of a task; a is 1, or annealed from 1 to 0.2. (Stickland & Murray 2019 draw one task a step
    instead, with these probabilities; see `Plan.weights_at`.) Shares are multiples of `processes`,
    at least 1 example, or 2 of a task in `contrasted`.
    """
    if flags.sampling == "equal" or not examples:
        return [sizes]
    epochs = max(1, flags.epochs) if flags.sampling == "annealed" else 1
    exponents = [1 - 0.8 * epoch / max(1, epochs - 1) for epoch in range(epochs)]
    total = sum(sizes.values())
    least = {n: processes * math.ceil((1 + (n in contrasted)) / processes) for n in sizes}
    weights = [{name: examples[name] ** exponent for name in sizes} for exponent in exponents]
    return [share_out(total, of_epoch, least, processes) for of_epoch in weights]


def share_out(total, weights, least, unit):
    """Share out `total` by weight: largest remainder, in multiples of `unit`, `least` or more."""
    shares, whole = dict(least), sum(weights.values())
    while sum(shares.values()) + unit <= total:
        missing = {name: total * weights[name] / whole - shares[name] for name in shares}
        shares[max(missing, key=missing.get)] += unit
    return shares


def loss_weights(flags, simcse_tasks):
    """Every loss of the run -> its weight: 1, unless `--loss_weights` says otherwise.

    With `--gradient_surgery main` the auxiliary losses weigh `AUXILIARY_WEIGHT`.
    """
    losses = [*flags.tasks, *(f"r_drop_{name}" for name in flags.r_drop)]
    losses += [f"simcse_{name}" for name in simcse_tasks]
    losses += ["simcse_para_supervised"] * flags.supervised_simcse
    losses += [f"mlm_{name}" for name in flags.mlm]
    expected = "LOSS=WEIGHT, WEIGHT from 0, with LOSS of this run's losses"
    given = keyed_values(flags, "loss_weights", losses, number(float, 0), expected)
    main = main_losses(flags) if flags.gradient_surgery == "main" else losses
    return {name: 1.0 if name in main else AUXILIARY_WEIGHT for name in losses} | given


def main_losses(flags):
    """The main losses of `--gradient_surgery main`: the main tasks', with their R-Drop."""
    tasks = flags.main_tasks or flags.tasks
    return {*tasks, *(f"r_drop_{name}" for name in tasks)}


def task_of(loss, tasks):
    """The task of a loss such as `simcse_para_supervised`, one of `tasks`."""
    return next(name for name in tasks if f"_{name}_" in f"_{loss}_")


# ---------------------------------------------------------------------------------- contradictions


def check_flags(flags, given):
    """Raise `UserError` for flags that contradict each other; `given` are those of the command."""
    mode = flags.fine_tune_mode
    lora_flags = sorted(name for name in given if name.startswith("LoRA_"))
    if mode != "LoRA" and lora_flags:
        raise UserError(f"--{lora_flags[0]}: only with --fine-tune-mode LoRA, not {mode}")
    if mode != "full-model" and flags.pals:
        raise UserError(f"--pals: only with --fine-tune-mode full-model, not {mode}")
    pal_flags = sorted(name for name in given if name.startswith("PAL_"))
    if mode != "PAL" and not flags.pals and pal_flags:
        raise UserError(f"--{pal_flags[0]}: only with --fine-tune-mode PAL or --pals")
    if flags.PAL_size and flags.PAL_size % flags.PAL_heads:
        raise UserError(
            f"--PAL_size {flags.PAL_size}: expected a multiple of --PAL_heads, {flags.PAL_heads}"
        )
    if mode != "full-model" and flags.freeze_word_embeddings:
        raise UserError(f"--freeze_word_embeddings: only in full-model; {mode} freezes them anyway")
    if flags.simcse_tasks and not flags.unsupervised_simcse:
        raise UserError("--simcse_tasks: only with --unsupervised_simcse")
    if flags.supervised_simcse and "para" not in flags.tasks:
        raise UserError("--supervised_simcse: needs the task para")
    for flag in ("simcse_tasks", "r_drop", "main_tasks", "mlm"):
        for name in getattr(flags, flag) or []:
            if name not in flags.tasks:
                raise UserError(f"--{flag} {name}: not among --tasks {' '.join(flags.tasks)}")
    if flags.start_from and flags.pretrained:
        raise UserError("--start_from and --pretrained exclude each other: both name an encoder")
    if flags.swap_pairs and not any(TASKS[name].is_pair for name in flags.r_drop):
        raise UserError("--swap_pairs: only with --r_drop para, whose second pass it swaps")
    if flags.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard")
    if flags.gradient_surgery not in (None, "main") and len(flags.tasks) == 1:
        raise UserError("--gradient_surgery: needs two tasks or more; one has no conflict")
    if flags.gradient_surgery and flags.accumulate > 1:
        raise UserError("--gradient_surgery: not with --accumulate; raise --batch_size")
    if flags.sampling != "equal" and flags.task_batch_sizes:
        raise UserError("--task_batch_sizes: not with --sampling, which shares out the batch")
    if flags.main_tasks and flags.gradient_surgery != "main":
        raise UserError("--main_tasks: only with --gradient_surgery main")
    plan = make_plan(flags, {})
    if flags.gradient_surgery == "main" and plan.loss_weights.keys() <= main_losses(flags):
        raise UserError(
            "--gradient_surgery main: no auxiliary loss; add SimCSE, --mlm or --main_tasks"
        )
    if flags.gradient_surgery == "main" and not main_losses(flags) & set(plan.tasks):
        raise UserError("--gradient_surgery main: no main task has a head (--loss_weights, --mlm)")
    for name in plan.joint:
        if f"{name}_head" in given and getattr(flags, f"{name}_head") != "linear":
            raise UserError(
                f"--{name}_head: the head of a pair encoded as one sequence is linear; expected "
                f"--pair_encoding {name}=separate or {name}=both"
            )
    check_tasks_without_head(plan)
    for name in plan.simcse_tasks + ("para",) * flags.supervised_simcse:
        if plan.batch_sizes[name] < 2:
            raise UserError(
                f"--batch_size 1 of {name}: SimCSE needs other examples in the batch, at least 2"
            )
    if plan.is_frozen:
        check_frozen(plan, given)


def check_tasks_without_head(plan):
    """Raise `UserError` where a task without a head has no loss, or one that needs the head."""
    for name in (name for name in plan.flags.tasks if name not in plan.tasks):
        losses = (f"mlm_{name}", f"simcse_{name}", f"simcse_{name}_supervised")
        if name in plan.flags.r_drop or not any(map(plan.loss_weights.get, losses)):
            needed = f"{name} has no head then: it needs --mlm {name} or SimCSE, and no --r_drop"
            raise UserError(f"--loss_weights {name}=0 with --mlm: {needed}; or omit it in --tasks")


def check_frozen(plan, given):
    """Raise `UserError` for flags that have no effect on a frozen encoder."""
    flags = plan.flags
    frozen = "the encoder is frozen and in eval mode in --fine-tune-mode last-linear-layer"
    if flags.unsupervised_simcse or flags.supervised_simcse:
        raise UserError(f"SimCSE: {frozen}; its losses would have no effect")
    if flags.r_drop:
        raise UserError(f"--r_drop: {frozen}; both passes would be identical")
    if flags.mlm:
        raise UserError(f"--mlm: {frozen}; the texts would not change it")
    if flags.gradient_surgery:
        raise UserError(f"--gradient_surgery: {frozen}; tasks share no trained weights")
    if flags.layer_decay < 1:
        raise UserError(f"--layer_decay: {frozen}; none of its layers learns")
    if {"lr", "head_lr"} <= given:
        raise UserError(f"--lr and --head_lr: {frozen}; both are the heads' rate")
    if flags.tasks == ["sts"] and flags.sts_head == "cosine" and not plan.joint + plan.both:
        raise UserError(f"--sts_head cosine: {frozen}; nothing to train; use --sts_head linear")
