"""What is seen of a step: its mean losses and speed, or which loss became NaN or infinite."""

import math
import re
import time

import distributed
from device import autocast, peak_memory_mib, seed_everything
from script import NotFinite, say


class Meter:
    """Mean losses and speed since the last logged step."""

    def __init__(self, totals=None):
        self.totals = totals or {}  # of each value: its sum, and the number of steps that had it
        self.restart()

    def restart(self):
        """Begin to count time anew, after an evaluation or a save."""
        self.began, self.sentences, self.tokens = time.perf_counter(), 0, 0

    def add(self, values, sentences, tokens):
        """Count one step."""
        for name, value in values.items():
            total, steps = self.totals.get(name, (0.0, 0))
            self.totals[name] = [total + value, steps + 1]
        self.sentences, self.tokens = self.sentences + sentences, self.tokens + tokens

    def means(self):
        """Mean of each value."""
        return {name: total / steps for name, (total, steps) in self.totals.items()}

    def speed(self):
        """Sentences and tokens encoded per second."""
        seconds = max(1e-9, time.perf_counter() - self.began)
        return {
            "sentences_per_s": round(self.sentences / seconds, 1),
            "tokens_per_s": round(self.tokens / seconds),
        }


def log_step(run, bar, meter, step, args, optimizer, device):
    """A line of `metrics.jsonl`, the progress bar, and a plain line where there is no terminal."""
    means, speed = meter.means(), meter.speed()
    losses = {name: value for name, value in means.items() if name in args.weights}
    extra = {name: value for name, value in means.items() if name not in args.weights}
    rate = max(group["lr"] for group in optimizer.param_groups)
    run.log(kind="train", step=step, losses=losses, **extra, lr=rate, **speed,
            peak_memory_mib=peak_memory_mib(device), seconds=run.seconds())  # fmt: skip
    shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
    bar.set_postfix_str(f"{shown}  {speed['sentences_per_s']:.0f} sentences/s")
    if bar.disable:
        say(f"step {step}/{args.total_steps}  {shown}  {speed['sentences_per_s']:.0f} sentences/s")


def not_finite(model, losses, step_batches, args, step, precision):
    """The `NotFinite` of a step: which loss, or whose gradient, and the ids of its task's batch."""
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    what = f"loss {', '.join(bad)}"
    if not bad:
        bad = bad_gradients(model, step_batches, args, step, precision)
        bad = sorted(set(" ".join(distributed.gather_texts(" ".join(bad))).split())) or list(losses)
        what = f"gradient of the loss {', '.join(bad)}"
    tasks = {re.sub("^(simcse|r_drop)_|_supervised$", "", name) for name in bad}
    ids = "; ".join(
        f"{name}: {' '.join(distributed.gather_texts(' '.join(batch[name].ids)))}"
        for batch in step_batches
        for name in batch
        if name in tasks
    )
    return NotFinite(
        f"step {step + 1}: {what} is not finite; the weights, saved, are those before the step; "
        f"try a lower --lr; batch {ids}"
    )


def bad_gradients(model, step_batches, args, step, precision):
    """Names of the losses whose gradient is not finite: each one's is computed again, by itself."""
    device = next(model.parameters()).device
    bad = set()
    if args.gradient_surgery:  # it encodes task by task
        step_batches = [{name: batch} for name, batch in step_batches[0].items()]
    for number, batches in enumerate(step_batches):
        seed_everything(args.seed, step, number, distributed.rank())
        with autocast(device, precision):
            losses = model(batches)
        for name, loss in losses.items():
            if not loss.requires_grad:  # such as a cosine over a frozen encoder
                continue
            model.zero_grad()
            loss.backward(retain_graph=True)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not all(gradient.isfinite().all() for gradient in gradients):
                bad.add(name)
    return sorted(bad)
