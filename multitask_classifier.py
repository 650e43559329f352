"""Fine-tune a hand-written BERT on sentiment, paraphrase and similarity at once.

    python multitask_classifier.py --fine-tune-mode=LoRA --LoRA_r=32

Each step takes one batch of each task and sums their losses, with SimCSE's contrastive losses
(Gao et al. 2021) and R-Drop (Liang et al. 2021) when asked for. A run is a folder under runs/; its
best model, prediction files and log lie there. `python evaluation.py` evaluates it, `--resume`
continues it.
"""

import math
import os
import random
import signal
import sys
import time
from collections import defaultdict
from contextlib import nullcontext

if __name__ == "__main__":  # Ctrl-C during the seconds of the imports below: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distributed
from arguments import check_data_is_kept, data_paths, get_args
from base_bert import STANDS_IN, STOOD_IN, load_encoder, load_encoder_of_run
from config import TASKS
from datasets import MultitaskBatches, TaskDataset
from device import (
    autocast,
    keep_freed_memory,
    seed_everything,
    select_device,
    select_precision,
)
from evaluation import (
    calibrate,
    evaluate,
    format_table,
    overall_score,
    prediction_files,
    score_files,
    undefined_correlations,
)
from gradient_surgery import pcgrad
from monitor import Meter, log_step, not_finite
from preparation import (
    announce,
    build_model,
    check_fit,
    check_same_everywhere,
    check_same_run,
    count_parameters,
    describe_run,
    encode_in_advance,
    load_training_state,
    make_optimizer,
    read_data,
    recorded_paths,
    training_state,
)
from run_folder import ReadOnlyRunFolder, write_files
from saved_models import load_weights, lora_config_of, save_model
from script import (
    NotFinite,
    Stopped,
    StopSignals,
    bar_size,
    memory_errors,
    run_script,
    say,
)


def set_learning_rate(optimizer, step, total, warmup):
    """Linear rise over the first `warmup` share of all steps, then linear decay to 0."""
    rising = round(warmup * total)
    factor = (step + 1) / rising if step < rising else (total - step) / max(1, total - rising)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


# ------------------------------------------------------------------------------------- the loop

FRESH_STATE = {
    "step": 0,  # optimiser steps done
    "evaluated": -1,  # step of the last evaluation
    "best_step": None,
    "best_score": None,  # overall dev score of the best model
    "misses": 0,  # evaluations since then
    "totals": {},
    "scaler": {},
}


def backward(model, step_batches, args, step, precision, scaler):
    """The gradient of the summed loss of a step, left in the parameters' `.grad`.

    `model` may be DDP's replica; `step_batches` are the step's batches, one unless accumulated.
    Returns each loss as a detached scalar, and an empty dict (surgery has more to log).
    """
    device = next(model.parameters()).device
    losses = defaultdict(float)
    for micro, batches in enumerate(step_batches):
        seed_everything(args.seed, step, micro, distributed.rank())
        last = micro == len(step_batches) - 1
        with nullcontext() if last or distributed.world_size() == 1 else model.no_sync():
            with autocast(device, precision):
                of_batch = model(batches)
            total = sum(args.weights[name] * loss for name, loss in of_batch.items())
            scaler.scale(total / len(step_batches)).backward()
        for name, loss in of_batch.items():
            losses[name] += loss.detach() / len(step_batches)
    return losses, {}


def backward_with_surgery(model, step_batches, args, step, precision, scaler):
    """As `backward`, one task at a time, with the encoder's conflicting gradients projected.

    A task's SimCSE and R-Drop losses belong to it. Returns the losses, and the share of conflicts
    and the cosines of the gradients to log.
    """
    device = next(model.parameters()).device
    shared = [p for p in model.bert.parameters() if p.requires_grad]
    losses, gradients = {}, {}
    (batches,) = step_batches
    for number, (name, batch) in enumerate(batches.items()):
        seed_everything(args.seed, step, number, distributed.rank())
        with autocast(device, precision):
            of_task = model({name: batch})
        total = sum(args.weights[key] * loss for key, loss in of_task.items())
        scaler.scale(total).backward()
        gradient = torch.cat([p.grad.flatten() for p in shared])
        gradients[name] = distributed.mean_over_processes(gradient)
        for parameter in shared:
            parameter.grad = None
        losses |= {key: loss.detach() for key, loss in of_task.items()}
    order = random.Random(f"{args.seed} {step}")
    surgery = pcgrad(gradients, order, args.gradient_surgery)
    parts = surgery.gradient.split([p.numel() for p in shared])
    for parameter, part in zip(shared, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not name.startswith("bert."):
            parameter.grad = distributed.mean_over_processes(parameter.grad)
    cosines = {f"cosine {a} {b}": value for (a, b), value in surgery.cosines.items()}
    return losses, {"conflicts": surgery.conflicts, **cosines}


def fix_order_of_sums(replica, batches, args, precision):
    """Run one pass and discard it, over the same batch in a new and in a continued run.

    From its second pass on DDP adds gradients up in the order in which they came in the first. A
    continued run has to add them in that order at once, to be the unbroken run to the last bit.
    """
    seed_everything(args.seed)
    with autocast(next(replica.parameters()).device, precision):
        losses = replica.train()(batches)
    sum(losses.values()).backward()
    replica.zero_grad()


def train(args, run, model, batches, dev, optimizer, precision, state, save_best, signals):
    """Train from `state`, a dict as `FRESH_STATE`, to the end; both it and the model change.

    `batches` is a `MultitaskBatches`, `dev` maps a task to its `TaskDataset`, `save_best(folder)`
    writes the model, `signals` is a `StopSignals`. Evaluates after each epoch and keeps the best
    model and the last states in `run`, a `RunFolder`. Raises `NotFinite` before a step with a loss
    or gradient that is not finite, `Stopped` after the step in which a signal came.
    """
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    meter = Meter(state["totals"])
    compute_gradient, replica = backward, model
    if args.gradient_surgery:
        compute_gradient = backward_with_surgery  # averages over processes by itself
    elif distributed.world_size() > 1:
        replica = DistributedDataParallel(model, broadcast_buffers=False)
        fix_order_of_sums(replica, batches[0], args, precision)
    trained = [p for p in model.parameters() if p.requires_grad]
    bar = tqdm(total=args.total_steps, initial=state["step"], unit="step",
               disable=distributed.rank() > 0 or not sys.stderr.isatty(),
               smoothing=0.1, **bar_size())  # fmt: skip

    def save():
        state.update(totals=dict(meter.totals), scaler=scaler.state_dict())
        run.save_state(state, training_state(model, optimizer))
        signals.check()
        meter.restart()

    with bar:
        while True:
            step = state["step"]
            at_epoch_end = (step % args.steps_per_epoch == 0 and step > 0) or args.total_steps == 0
            if at_epoch_end and state["evaluated"] < step:
                evaluate_and_keep(args, run, model, batches.datasets, dev, precision, state,
                                  save_best, save, signals)  # fmt: skip
            if step == args.total_steps or 0 < args.patience <= state["misses"]:
                return

            # ---- fetch
            first = step * args.accumulate
            step_batches = [batches[i] for i in range(first, first + args.accumulate)]
            set_learning_rate(optimizer, step, args.total_steps, args.warmup)
            counted = model.encoded_sequences, model.encoded_tokens

            # ---- forward and backward: the summed loss
            model.train()
            losses, extra = compute_gradient(replica, step_batches, args, step, precision, scaler)

            # ---- clip and step
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained, args.clip or float("inf"))
            sentences, tokens = model.encoded_sequences, model.encoded_tokens
            own = [sentences - counted[0], tokens - counted[1], signals.number or 0]
            values = torch.stack([*losses.values(), norm, *norm.new_tensor(own)])
            values = distributed.mean_over_processes(values).tolist()
            *values, norm, sentences, tokens, stop = values
            values = dict(zip(losses, values, strict=True))
            # fp16's scaler skips steps without a finite gradient and halves its scale, down to 1.
            may_skip = scaler.is_enabled() and scaler.get_scale() >= 1
            if not all(map(math.isfinite, [*values.values(), 0.0 if may_skip else norm])):
                save()
                raise not_finite(model, values, step_batches, args, step, precision)
            if not math.isfinite(norm):
                extra = {}  # a skipped step's gradients have no cosines
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            # ---- log and save
            state["step"] = step = step + 1
            processes = distributed.world_size()
            meter.add(values | extra, sentences * processes, tokens * processes)
            bar.update()
            if step % args.log_every == 0 or step == args.total_steps:
                log_step(run, bar, meter, step, args, optimizer, device)
                meter = Meter()
            if stop or (args.save_every and step % args.save_every == 0):
                save()


def evaluate_and_keep(
    args, run, model, train_sets, dev, precision, state, save_best, save, signals
):
    """Calibrate, evaluate on dev, log it, keep the model if it is the best so far, save the state.

    `train_sets` maps a task to the `TaskDataset` to calibrate on; the others are as in `train`,
    whose `save()` writes the state. A signal in the middle saves the state before the evaluation,
    which --resume then repeats.
    """
    began = time.perf_counter()
    try:
        calibrate(model, train_sets, args.calibration_examples, precision, signals.check)
        results = evaluate(model, dev, precision, signals.check)
    except Stopped:
        save()
        raise
    except NotFinite as error:
        raise NotFinite(f"step {state['step']}: {error}; try a lower --lr") from error
    step, score = state["step"], overall_score(results)
    for name in undefined_correlations(results):
        say(f"warning: {name}: all dev predictions are the same; its correlation counts as 0")
    run.log(
        kind="eval",
        step=step,
        epoch=step // args.steps_per_epoch,
        overall=score,
        dev={name: {"loss": r.loss, **r.metrics} for name, r in results.items()},
        evaluation_seconds=round(time.perf_counter() - began, 2),
        seconds=run.seconds(),
    )
    state.update(evaluated=step, misses=state["misses"] + 1)
    is_best = state["best_score"] is None or score > state["best_score"]
    if is_best:
        state.update(best_step=step, best_score=score, misses=0)
        run.save_best(step, save_best)
    mark = "  (best so far)" if is_best else ""
    say(f"\nepoch {step // args.steps_per_epoch}/{args.epochs}, step {step}{mark}")
    say(format_table(results))
    save()


# ---------------------------------------------------------------------------------------- the run


def prepare_run(args, run, description):
    """Lock the run's folder and return the state to go on from, None for a run that begins."""
    run.open()
    if not (args.resume and run.holds_run()):
        if args.resume:
            say(f"{run.path}: nothing to continue; starting at step 0")
        return None
    earlier = run.description()
    check_same_run(earlier, description)
    if earlier.get("threads") != description["threads"]:
        say(f"warning: {description['threads']} threads, were {earlier.get('threads')}: the result "
            "will not be that of an unbroken run to the last bit")  # fmt: skip
    state = run.load_state()
    if state is None:
        say(f"{run.path}: no state was ever completed; starting at step 0")
        return None
    run.forget_metrics_after(state.values["step"], state.values["evaluated"])
    say(f"{run.path}: continuing at step {state.values['step']}")
    return state


def write_results(args, run, model, datasets, precision, signals):
    """Predict dev and test with the best model and write the prediction files and the scores.

    All files are written once all are known: a full disk leaves those of an earlier run as a whole.
    """
    texts, wrote = {}, []
    for split in ("dev", "test"):
        of_split = {name: files[split] for name, files in datasets.items() if split in files}
        results = evaluate(model, of_split, precision, signals.check)
        named = {name: getattr(args, f"{name}_{split}_out") for name in results}
        predictions = prediction_files(args.predictions_dir, results, split, named)
        wrote += predictions
        texts |= predictions | prediction_files(run.path / "predictions", results, split)
        texts |= score_files(run.path / "predictions", results, split)
        if split == "dev":
            say(f"\nbest model, step {run.best_step()}:\n{format_table(results)}")
    if distributed.rank() == 0:
        write_files(texts)
        say("\n".join(f"wrote {path}" for path in wrote))


def main(argv=None):
    """Train, or continue to train, from the command line."""
    args, run = get_args(argv)
    keep_freed_memory()
    device = distributed.start(select_device(args.use_gpu))
    distributed.quiet_unless_first()
    shares = {name: distributed.share(size, name) for name, size in args.batch_sizes.items()}
    if args.expanded_command:
        say(f"--recipe {args.recipe} is: {args.expanded_command}")
    earlier = run.description() if args.resume and run.holds_run() else None
    asked = earlier["precision"] if earlier else args.precision
    precision, warning = select_precision(asked, device)
    if warning:
        say(f"warning: {warning}")
    # ---- seed
    seed_everything(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # ---- data
    paths, warning = recorded_paths(args, earlier) if earlier else data_paths(args)
    check_data_is_kept(args, paths)
    if warning:
        say(f"warning: {warning}")
    files = read_data(paths, args.require_test)
    if earlier:
        encoder, tokenizer = load_encoder_of_run(run.path, earlier)
    else:
        encoder, tokenizer = load_encoder(args.pretrained)
    if encoder.substituted:
        say("warning: " + (STOOD_IN if earlier else STANDS_IN))
    if distributed.rank() > 0:
        run = ReadOnlyRunFolder(run.path)
    check_fit(args, encoder, tokenizer)
    description = describe_run(args, encoder, files, device, precision)
    with distributed.first_process_first():
        state = prepare_run(args, run, description)
    check_same_everywhere(description, state)
    # ---- model, pretrained weights, LoRA, freeze
    model = build_model(args, encoder, tokenizer)
    datasets = {
        name: {
            split: TaskDataset(file, TASKS[name], tokenizer, model.config.max_length)
            for split, file in of_task.items()
        }
        for name, of_task in files.items()
    }
    train_sets = {name: of_task["train"] for name, of_task in datasets.items()}
    batches = MultitaskBatches(train_sets, args.batch_sizes, args.seed, shares)
    largest = math.ceil(batches.largest() / args.accumulate)
    args.steps_per_epoch = args.steps_per_epoch or min(2000, largest)
    args.total_steps = args.epochs * args.steps_per_epoch
    # ---- device, optimiser, continue
    with memory_errors(device, "the model"):
        model.to(device)
    if precision == "bf16" and args.fine_tune_mode == "LoRA":  # in other modes they are saved: fp32
        model.bert.keep_frozen_in(torch.bfloat16)
    optimizer = make_optimizer(model, args)
    values = dict(FRESH_STATE)
    if state:
        load_training_state(model, optimizer, state.tensors)
        values |= state.values
    else:  # only now, after every check: it removes an earlier run
        run.start(description | {"parameters": count_parameters(model)})
    # ---- loop
    lora = lora_config_of(vars(args))
    signals = StopSignals()
    announce(args, run, model, encoder, datasets, device, precision)
    longest = max(d["train"].longest() for d in datasets.values())
    batch = max(args.batch_sizes.values())
    lower = "lower --batch_size (with --accumulate the step stays as large) or --max_length"
    with memory_errors(device, f"batches of {batch} × up to {longest} tokens", lower):
        ended = values["evaluated"] == args.total_steps or 0 < args.patience <= values["misses"]
        if model.frozen and not ended:
            encode_in_advance(model, batches, args, precision, signals.check)
        train(
            args, run, model, batches, {name: d["dev"] for name, d in datasets.items()}, optimizer,
            precision, values, lambda folder: save_model(model, tokenizer, encoder, lora, folder),
            signals,
        )  # fmt: skip
        load_weights(model, lora, run.best)
        write_results(args, run, model, datasets, precision, signals)
    distributed.finish()


if __name__ == "__main__":
    sys.exit(run_script(main))
