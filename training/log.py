"""Training metrics, and diagnosis of losses that are not finite."""

import math
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from bert import to_device
from runtime import distributed, script
from runtime.device import peak_memory_mib, seed_everything
from runtime.script import NotFinite, bar_size, say
from training.plan import task_of


class Step(NamedTuple):
    """The numbers of one step, the same on every process."""

    losses: dict  # name -> mean over the processes
    extra: dict  # name -> other values to log; none where the gradient is not finite
    norm: float  # of the gradient, before clipping
    scale: float  # of fp16's gradients, else 1
    sentences: float  # encoded by all processes together
    tokens: float
    is_stopped: bool  # whether a process got a signal

    def is_finite(self, scaler):
        """Whether training may go on.

        fp16's scaler skips a step whose gradient is not finite and halves its scale, down to 1.
        """
        is_skipped = scaler.is_enabled() and self.scale >= 1
        return all(map(math.isfinite, [*self.losses.values(), 0.0 if is_skipped else self.norm]))


def numbers_of_step(losses, extra, norm, model, scaler):
    """All numbers of a step in one tensor on the device, averaged over the processes.

    Also returns a scalar on the device: 1 if a loss or the norm is not finite, else 0.
    """
    counts = [model.encoded_sequences, model.encoded_tokens, script.received["number"] or 0]
    counts = to_device(np.array(counts, dtype=np.float32), norm.device)
    scale = scaler.scale(norm.new_ones(()))
    values = torch.stack([*losses.values(), norm, *extra.values(), scale])
    numbers = distributed.mean_over_processes(torch.cat([values, counts]))
    losses_and_norm = numbers[: len(losses) + 1]
    return numbers, (~losses_and_norm.isfinite()).any().float()


def read_back(numbers, losses, extra):
    """Copy the numbers of a step from the device: the one place where a step waits for it."""
    *values, scale, sentences, tokens, signal = numbers.tolist()
    count, processes = len(losses), distributed.world_size()
    losses = dict(zip(losses, values[:count], strict=True))
    norm = values[count]
    extra = dict(zip(extra, values[count + 1 :], strict=True)) if math.isfinite(norm) else {}
    return Step(losses, extra, norm, scale, sentences * processes, tokens * processes, signal > 0)


class Meter:
    """Mean losses and speed since the last logged step.

    `totals` maps a value's name to its sum and the number of steps that had it. The dict is shared
    with the run's progress, so that a checkpoint has it.
    """

    def __init__(self, totals):
        self.totals = totals
        self.seconds = self.sentences = self.tokens = 0
        self.began = 0.0

    def start(self):
        """Begin to time a step."""
        self.began = time.perf_counter()

    def add(self, step):
        """Count a `Step`."""
        for name, value in (step.losses | step.extra).items():
            total, steps = self.totals.get(name, (0.0, 0))
            self.totals[name] = [total + value, steps + 1]
        self.sentences, self.tokens = self.sentences + step.sentences, self.tokens + step.tokens
        self.seconds += time.perf_counter() - self.began

    def take(self):
        """Mean of each value, and sentences and tokens per second; then begin again."""
        means = {name: total / steps for name, (total, steps) in self.totals.items()}
        seconds = max(1e-9, self.seconds)
        speed = {
            "sentences_per_s": round(self.sentences / seconds, 1),
            "tokens_per_s": round(self.tokens / seconds),
        }
        self.totals.clear()
        self.seconds = self.sentences = self.tokens = 0
        return means, speed


def progress_bar(run, plan):
    """tqdm's bar over the steps of the run; hidden in other processes, or without a terminal."""
    is_hidden = distributed.rank() > 0 or not sys.stderr.isatty()
    steps = {"initial": run.progress.step, "total": plan.total_steps, "unit": "step"}
    return tqdm(**steps, smoothing=0.1, disable=is_hidden, **bar_size())


def log_step(bar, run, meter, optimizer, plan, compute):
    """Write a line of `metrics.jsonl`; show losses and speed at the bar, in a file as text."""
    step, (means, speed), group = run.progress.step, meter.take(), optimizer.param_groups[0]
    factor = group["lr"] / group["peak_lr"]
    losses = {name: value for name, value in means.items() if name in plan.loss_weights}
    run.log(
        kind="train",
        step=step,
        losses=losses,
        **{name: value for name, value in means.items() if name not in losses},
        lr=plan.encoder_lr * factor,
        head_lr=plan.head_lr * factor,
        **speed,
        peak_memory_mib=peak_memory_mib(compute.device),
        seconds=run.seconds(),
    )
    shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
    if speed["sentences_per_s"]:  # nothing is encoded any more of a frozen encoder
        shown += f"  {speed['sentences_per_s']:.0f} sentences/s"
    bar.set_postfix_str(shown)
    if bar.disable or not sys.stdout.isatty():  # a log file has the lines, too
        say(f"step {step}/{plan.total_steps}  {shown}")


# ------------------------------------------------------------------------------------- diagnosis


def not_finite(model, losses, micro_batches, step, plan, compute):
    """The `NotFinite` of a step: which loss or whose gradient, and the ids of its task's batch."""
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    what = f"loss {', '.join(bad)}"
    if not bad:
        bad = bad_gradients(model, micro_batches, step, plan, compute)
        bad = sorted(set(" ".join(distributed.gather_texts(" ".join(bad))).split())) or list(losses)
        what = f"gradient of the loss {', '.join(bad)}"
    ids = "; ".join(
        f"{name}: {' '.join(distributed.gather_texts(' '.join(batch.ids)))}"
        for prepared in micro_batches
        for name, batch in prepared.batches.items()
        if name in (task_of(loss, plan.flags.tasks) for loss in bad)
    )
    return NotFinite(
        f"step {step + 1}: {what} is not finite; the weights from before the step are saved; "
        f"start again with --overwrite and a lower --lr; batch {ids}"
    )


def bad_gradients(model, micro_batches, step, plan, compute):
    """Names of the losses with a gradient that is not finite; each is computed again, alone."""
    bad = set()
    for number, prepared in enumerate(micro_batches):
        seed_everything(plan.flags.seed, step, number, distributed.rank())
        with compute.autocast():
            losses = model(prepared)
        for name, loss in losses.items():
            if not loss.requires_grad:  # such as a cosine over a frozen encoder
                continue
            model.zero_grad()
            loss.backward(retain_graph=True)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not all(gradient.isfinite().all() for gradient in gradients):
                bad.add(name)
    return sorted(bad)
