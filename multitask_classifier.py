"""Fine-tune a hand-written BERT on sentiment, paraphrase and similarity at once.

    python multitask_classifier.py --fine-tune-mode=LoRA --LoRA_r=32

Each step takes one batch of each task and sums their losses, with SimCSE's contrastive losses (Gao
et al. 2021), R-Drop (Liang et al. 2021) and masked language modelling if asked for. A run is a
folder under runs/ with its best model, prediction files and log. `python evaluation.py` evaluates
it, `--resume` resumes it.
"""

import random
import signal
import sys
import time
from collections import defaultdict
from contextlib import nullcontext, suppress

from runtime.script import NotFinite, Stopped, catch_signals, end_process, run_script, say
from training.flags import parse_command

if __name__ == "__main__":  # checks the flags before the slow imports; --help ends here, too
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if (code := run_script(parse_command)) or {"-h", "--help"} & set(sys.argv):
        sys.exit(code)

import torch
from torch.nn.parallel import DistributedDataParallel

from datasets import MultitaskBatches
from evaluation import calibrate, evaluate, masked_losses
from gradient_surgery import combine
from reporting import results
from runtime import distributed
from runtime.device import DTYPES, Compute, memory_errors, seed_everything, select_device
from runtime.distributed import check_stop, mean_over_processes
from runtime.files import write_files
from training import data_files, setup
from training.data_files import of_split
from training.log import Meter, log_step, not_finite, numbers_of_step, progress_bar, read_back
from training.plan import main_losses, make_plan
from training.run_folder import RunFolder, run_path
from training.saved_models import load_weights, save_best, undamaged_best
from training.setup import save_checkpoint

# ------------------------------------------------------------------------------ gradients of a step


def weighted_sum(losses, weights):
    """The total training loss: every loss times its weight, summed."""
    return sum(weights[name] * loss for name, loss in losses.items())


def prepare_step(model, batches, step, plan):
    """The micro-batches of a step, on the device: a list of `multitask_bert.Prepared`.

    A step has one, `--accumulate` of them, or with surgery between tasks one for each task.
    """
    count, seed = plan.flags.accumulate, plan.flags.seed
    if plan.flags.gradient_surgery not in (None, "main"):
        return [model.prepare({n: batch}, (seed, step)) for n, batch in batches[step].items()]
    return [model.prepare(batches[i], (seed, i)) for i in range(step * count, (step + 1) * count)]


def compute_gradients(model, micro_batches, step, plan, compute):
    """Run forward and backward of a step; the gradients are in the parameters' `.grad`.

    `model` is the `MultitaskBERT`, or its `DistributedDataParallel`; `micro_batches` come from
    `prepare_step`. Returns each loss as a detached scalar, and a dict of other scalars to log.
    """
    if plan.flags.gradient_surgery:
        return backward_with_surgery(model, micro_batches, step, plan, compute)
    return backward(model, micro_batches, step, plan, compute), {}


def backward(model, micro_batches, step, plan, compute):
    """The gradients of the weighted sum of all losses; returns each loss."""
    losses, weights = defaultdict(float), plan.weights_at(step)
    for number, prepared in enumerate(micro_batches):
        seed_everything(plan.flags.seed, step, number, distributed.rank())
        is_synced = number == len(micro_batches) - 1 or distributed.world_size() == 1
        with nullcontext() if is_synced else model.no_sync():  # DDP averages in the last one
            with compute.autocast():
                batch_losses = model(prepared)
            total = weighted_sum(batch_losses, weights)
            compute.scaler.scale(total / len(micro_batches)).backward()
        for name, loss in batch_losses.items():
            losses[name] += loss.detach() / len(micro_batches)
    return losses


def backward_with_surgery(model, micro_batches, step, plan, compute):
    """As `backward`, one pass per group of losses, with surgery on the encoder's gradients.

    Gradients are averaged over the processes here. Returns each loss, and the share of conflicts
    and the gradients' cosines.
    """
    shared = [p for p in model.bert.parameters() if p.requires_grad]
    losses, gradients, weights = {}, {}, plan.weights_at(step)
    for number, prepared in enumerate(micro_batches):
        seed_everything(plan.flags.seed, step, number, distributed.rank())
        with compute.autocast():
            batch_losses = model(prepared)
        for name, group in loss_groups(batch_losses, prepared, plan).items():
            total = compute.scaler.scale(weighted_sum(group, weights))
            total.backward(retain_graph=name == "main")
            gradients[name] = mean_over_processes(torch.cat([p.grad.flatten() for p in shared]))
            model.bert.zero_grad()
        losses |= {key: loss.detach() for key, loss in batch_losses.items()}
    order = random.Random(f"{plan.flags.seed} {step}")
    surgery = combine(plan.flags.gradient_surgery, gradients, order, model.cosine_targets)
    model.cosine_targets = surgery.targets
    parts = surgery.gradient.split([p.numel() for p in shared])
    for parameter, part in zip(shared, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not name.startswith("bert."):
            parameter.grad = mean_over_processes(parameter.grad)
    cosines = {f"cosine {a} {b}": value for (a, b), value in surgery.cosines.items()}
    return losses, {"conflicts": surgery.conflicts, **cosines}


def loss_groups(losses, prepared, plan):
    """The losses of a micro-batch in groups, each of which gives one gradient.

    With "main" these are the main losses, then the auxiliary ones; else all losses of the one task.
    """
    if plan.flags.gradient_surgery != "main":
        (task,) = prepared.batches
        return {task: losses}
    groups, main = {"main": {}, "auxiliary": {}}, main_losses(plan.flags)
    for name, loss in losses.items():
        groups["main" if name in main else "auxiliary"][name] = loss
    return groups


def wrap_in_ddp(model, batches, plan, compute):
    """The model that `compute_gradients` takes: with several processes in DDP, which averages.

    Surgery averages gradients by itself.
    """
    if distributed.world_size() == 1 or plan.flags.gradient_surgery:
        return model
    replica = DistributedDataParallel(model)
    # DDP rebuilds its buckets after the first backward. Discarding one pass gives new and resumed
    # runs the same bucket order.
    seed_everything(plan.flags.seed)
    with compute.autocast():
        losses = replica.train()(batches)
    sum(losses.values()).backward()
    replica.zero_grad()
    return replica


# --------------------------------------------------------------------------------------- the loop


def set_learning_rate(optimizer, step, plan):
    """Linear warm-up over the first `--warmup` share of all steps, then linear decay to 0."""
    total = plan.total_steps
    warmup = round(plan.flags.warmup * total)
    factor = (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def make_batches(data, plan):
    """The `MultitaskBatches` of a run: this process's share of each batch."""
    sizes, length = plan.epoch_sizes, plan.steps_per_epoch * plan.flags.accumulate
    shares = [{n: distributed.share(k, n) for n, k in epoch.items()} for epoch in sizes]
    return MultitaskBatches(of_split(data, "train"), sizes, plan.flags.seed, shares, length)


def train(run, model, optimizer, data, plan, compute):
    """Train from `run.progress` to the end of the plan.

    `data` maps a task and a split to a `TaskDataset`. Evaluates after each epoch and keeps the best
    model and the last checkpoints in `run`, a `RunFolder`. Raises `NotFinite` instead of a step
    with a loss or gradient that is not finite (fp16 first skips steps with such a gradient), and
    `Stopped` after the step in which a signal came.
    """
    flags, progress, scaler = plan.flags, run.progress, compute.scaler
    batches = make_batches(data, plan)
    replica = wrap_in_ddp(model, batches[0], plan, compute)
    upcoming = prepare_step(model, batches, progress.step, plan)
    meter = Meter(progress.totals)
    with progress_bar(run, plan) as bar:
        while not progress.is_finished(plan):
            if progress.needs_evaluation(plan):
                with suppress(Stopped):  # `check_stop` below raises it again, after saving
                    evaluate_and_keep_best(run, model, data, plan, compute)
                save_checkpoint(run, model, optimizer, compute)
                check_stop()
                continue

            # ---- begin
            step, micro_batches = progress.step, upcoming
            meter.start()
            model.train()
            model.encoded_sequences = model.encoded_tokens = 0
            set_learning_rate(optimizer, step, plan)

            # ---- forward and backward
            losses, extra = compute_gradients(replica, micro_batches, step, plan, compute)

            # ---- clip and step
            scaler.unscale_(optimizer)
            norm = clip_gradients(model, flags.clip)
            numbers, is_bad = numbers_of_step(losses, extra, norm, model, scaler)
            step_unless(optimizer, is_bad)
            optimizer.zero_grad()

            # ---- fetch the next batches while a GPU works, then wait for it
            upcoming = prepare_step(model, batches, step + 1, plan)
            done = read_back(numbers, losses, extra)
            if not done.is_finite(scaler):
                save_checkpoint(run, model, optimizer, compute)
                raise not_finite(model, done.losses, micro_batches, step, plan, compute)
            scaler.update()

            # ---- log and save
            progress.step += 1
            meter.add(done)
            bar.update()
            if progress.step % flags.log_every == 0 or progress.step == plan.total_steps:
                log_step(bar, run, meter, optimizer, plan, compute)
            if done.is_stopped or (flags.save_every and progress.step % flags.save_every == 0):
                save_checkpoint(run, model, optimizer, compute)
                check_stop()


def clip_gradients(model, limit):
    """Clip the norm of all gradients together to `limit`, 0 for none; returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))


def step_unless(optimizer, is_bad):
    """Step the optimiser unless `is_bad`, a scalar, is 1; CUDA is not waited for."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = is_bad  # where it is 1, the fused kernel changes nothing
        optimizer.step()
    elif not is_bad:
        optimizer.step()


def evaluate_and_keep_best(run, model, data, plan, compute):
    """Calibrate, evaluate on dev, log the scores, and keep the model if it is the best so far.

    Raises `Stopped`, with `run.progress` unchanged, if a signal comes in the middle.
    """
    began, progress = time.perf_counter(), run.progress
    try:
        scores, table = evaluate_on_dev(model, data, plan, compute)
    except NotFinite as error:
        more = "start again with --overwrite and a lower --lr"
        raise NotFinite(f"step {progress.step}: {error}; {more}") from error
    epoch = progress.step // plan.steps_per_epoch
    run.log(
        kind="eval",
        step=progress.step,
        epoch=epoch,
        **scores,
        evaluation_seconds=round(time.perf_counter() - began, 2),
        seconds=run.seconds(),
    )
    progress.evaluated = progress.step
    progress.misses += 1
    mark = ""
    if progress.best_score is None or scores["overall"] > progress.best_score:
        save_best(run, model, plan.lora, scores["dev"])
        progress.best_score, progress.misses, mark = scores["overall"], 0, "  (best so far)"
    say(f"\nepoch {epoch}/{plan.flags.epochs}, step {progress.step}{mark}")
    say(table)


def evaluate_on_dev(model, data, plan, compute):
    """Calibrate and evaluate on dev; returns what the log keeps, a dict, and a table of dev scores.

    The log keeps the overall score, and each task's metrics on dev and on the training examples of
    the calibration. Of masked language modelling alone, the overall score is minus its mean loss.
    """
    if not plan.tasks:
        dev = masked_losses(model, of_split(data, "dev"), compute)
        mean = sum(values["loss"] for values in dev.values()) / len(dev)
        table = f"masked loss on dev, mean of {', '.join(dev)}: {mean:.3f}"
        return {"overall": -mean, "dev": dev}, table
    data = {name: data[name] for name in plan.tasks}
    on_train = calibrate(model, of_split(data, "train"), plan.flags.calibration_examples, compute)
    dev = evaluate(model, of_split(data, "dev"), compute)
    for name, reason in results.undefined_correlations(dev).items():
        say(f"warning: {name}: {reason}; its correlation counts as 0")
    table = results.format_table(dev)
    if on_train:
        found = {name: result.score(name) for name, result in on_train.items()}
        table += f"\non training examples  {results.format_metrics(found)}"
    scores = {"overall": results.overall_score(dev)}
    for split, found in (("dev", dev), ("train", on_train)):
        scores[split] = {name: {"loss": r.loss, **r.metrics} for name, r in found.items()}
    return scores, table


# ---------------------------------------------------------------------------------------- the run


def predict_and_write(run, model, data, plan, compute):
    """Predict dev and test with the best model; write the prediction files and the scores.

    All files are written together at the end: if the disk is full, the old files remain.
    """
    load_weights(model, plan.lora, undamaged_best(run))
    course_files, run_files, folder = {}, {}, run.path / "predictions"
    data = {name: data[name] for name in plan.tasks}
    for split in ("dev", "test"):
        scores = evaluate(model, of_split(data, split), compute)
        paths = {name: data_files.output_path(plan.flags, name, split) for name in scores}
        course_files |= results.prediction_files(plan.flags.predictions_dir, scores, split, paths)
        run_files |= results.prediction_files(folder, scores, split)
        run_files |= results.score_files(folder, scores, split)
        if split == "dev":
            say(f"\n{run.describe_best()}:\n{results.format_table(scores)}")
    if distributed.rank() == 0:
        write_files(course_files | run_files)
        say("\n".join(f"wrote {path}" for path in course_files))


def main(argv=None):
    """Train, or resume training, from the command line."""
    command = parse_command(argv)
    device = select_device(command.flags.use_gpu, command.flags.use_cpu)
    with distributed.joined_processes(device) as device:
        fine_tune(command, device)


def fine_tune(command, device):
    """Set up the run of a checked command line on a device, train, predict."""
    flags, run = command.flags, RunFolder(run_path(command.flags))
    earlier = run.description() if flags.resume and run.holds_run() else None
    precision = earlier["precision"] if earlier else flags.precision
    compute = Compute(device, precision, flags.deterministic)
    if flags.recipe and not earlier:
        say(f"--recipe {flags.recipe} is: {command.expanded()}")
    if compute.warning:
        say(f"warning: {compute.warning}")

    # ---- seed, data, encoder, run folder: all is checked before weights load
    seed_everything(flags.seed)
    files = data_files.read_data(data_files.find_data(command, earlier), flags)
    examples = {name: len(of_task["train"].examples) for name, of_task in files.items()}
    plan = make_plan(flags, examples, distributed.world_size())
    encoder, tokenizer = setup.find_encoder(run, flags, earlier)
    setup.check_fit(plan, encoder, tokenizer)
    description = setup.describe_run(command, encoder, files, compute)
    if earlier:  # this call may leave flags out
        description |= {name: earlier.get(name) for name in ("command", "expanded_command")}
    with distributed.first_process_first():
        tensors = setup.open_run(run, flags.resume, description)
    setup.check_same_everywhere(description, run.progress.step)

    # ---- model, pretrained weights, LoRA, freezing, device
    model = setup.build_model(plan, encoder, tokenizer)
    data = data_files.tokenize_data(files, model)
    with memory_errors(device, "the model"):
        model.to(device)
    if compute.precision != "fp32" and plan.lora:  # other modes save these weights, in fp32
        model.bert.cast_frozen_linears(DTYPES[compute.precision])

    # ---- optimiser, resume, loop
    optimizer = setup.make_optimizer(model, plan)
    if tensors is None:  # last, after every check: it removes an earlier run
        run.start(description | {"parameters": setup.count_parameters(model)})
    else:
        setup.restore(model, optimizer, compute, run.progress, tensors)
        del tensors  # up to three times the model's size
    if flags.tensorboard:
        run.open_tensorboard()
    catch_signals()
    setup.announce(run, model, data, plan, compute)
    with memory_errors(device, *setup.describe_load(data, plan)):
        if plan.is_frozen and not run.progress.is_finished(plan):
            setup.encode_in_advance(model, make_batches(data, plan), plan, compute)
        train(run, model, optimizer, data, plan, compute)
        if plan.tasks:
            predict_and_write(run, model, data, plan, compute)
        else:
            say(f"\n{run.describe_best()}; train tasks from it: --start_from {run.path}")


if __name__ == "__main__":
    end_process(run_script(main))
