"""Predict and evaluate: a run, an ensemble of runs, your own texts; export; report on runs.

    python evaluation.py                                   # the newest run
    python evaluation.py --checkpoint runs/LoRA
    python evaluation.py --checkpoint runs/a runs/b        # their ensemble
    python evaluation.py --report runs/a runs/b            # tables and figures
    python evaluation.py --sentence "A film to fall in love with."
    python evaluation.py --predict texts.txt > predictions.tsv
    python evaluation.py --export my-encoder               # one plain encoder, LoRA merged

The first three print the dev scores, and write the prediction files of dev and test in the course's
format. An ensemble and a report need no model.
"""

import csv
import itertools
import math
import os
import signal
import sys
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from config import PRECISIONS, TASKS, UserError
from runtime.script import NotFinite, bar_size, end_process, is_first, run_script, say
from training.flags import FlagParser, add_device_flags, is_utf8

if __name__ == "__main__":  # Ctrl-C during the seconds of the imports below: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bert import to_device
from datasets import Example, TaskDataset, read_task_file
from heads import task_loss
from multitask_bert import MASKED
from reporting import results
from reporting.ensemble import evaluate_ensemble, finished_run, print_caveats
from reporting.report import write_report
from reporting.texts import labelled_rows, read_chunks, table_header, table_rows
from runtime import distributed
from runtime.device import Compute, is_memory_error, memory_errors, select_device
from runtime.files import file_sha256, open_whole, output_errors
from training.data_files import NOT_FOUND, of_split, paths_of_run, tokenize_data
from training.run_folder import RunFolder, newest_run
from training.saved_models import export_run, load_run, plan_of

# ----------------------------------------------------------------------------------------- predict


@torch.no_grad()
def head_outputs(model, dataset, compute, rows=None):
    """The head's outputs for a `TaskDataset`, (examples, num_classes) fp32 on the CPU.

    In eval mode. With `rows` only those are predicted; the others are 0. Raises `NotFinite` for an
    output that is not a finite number, `Stopped` if a signal comes.
    """
    model.eval()
    outputs = torch.zeros(len(dataset), dataset.task.num_classes, device=model.device)
    # One context for all batches: converted weights are reused.
    with evaluation_memory(model, compute), compute.autocast():
        for _, batch_rows, batch in shared_batches(dataset, compute.batch_tokens, rows):
            found = predict_in_parts(model, dataset, batch_rows, batch)
            outputs[to_device(batch_rows, model.device)] = found
    outputs = distributed.sum_over_processes(outputs).cpu()
    if bad := int((~outputs.isfinite()).any(1).sum()):
        name = dataset.task.name
        raise NotFinite(f"{name}: the model's outputs for {bad} examples are not finite")
    return outputs


def evaluation_memory(model, compute):
    """The `memory_errors` of evaluation batches."""
    tokens = compute.batch_tokens
    return memory_errors(model.device, f"evaluation batches of up to {tokens:,} tokens")


def shared_batches(dataset, batch_tokens, rows=None):
    """Yield (number, rows, `TaskBatch`): this process's part of `batches_of`. Raises `Stopped`."""
    for number, batch in enumerate(dataset.batches_of(batch_tokens, rows)):
        turn = number % distributed.world_size()
        if turn == 0:
            distributed.check_stop()
        if turn == distributed.rank():
            yield number, *batch


def predict_in_parts(model, dataset, rows, batch):
    """`model.predict` of the batch at `rows`; one too large for the memory is halved."""
    try:
        return model.predict(dataset.task.name, batch)
    except RuntimeError as error:
        if len(rows) == 1 or not is_memory_error(error):
            raise
    halves = [(half, dataset.batch(half)) for half in np.array_split(rows, 2)]
    return torch.cat([predict_in_parts(model, dataset, *half) for half in halves])


def predict_dataset(model, dataset, compute):
    """Predict a whole `TaskDataset`; returns a `TaskResult`, with metrics if it has labels."""
    ids = [example.id for example in dataset.examples]
    outputs = head_outputs(model, dataset, compute)
    return result_of_outputs(dataset.task, ids, outputs, dataset.labels)


def result_of_outputs(task, ids, outputs, labels):
    """The `TaskResult` of outputs (n, num_classes), measured if there are labels (n,), a tensor."""
    if task.kind == "classes":
        scores = F.softmax(outputs, dim=-1).numpy()
    elif task.kind == "binary":
        scores = torch.sigmoid(outputs).numpy()
    else:
        scores = outputs.clamp(task.low, task.high).numpy()
    if labels is None:
        return results.result_of_scores(task, ids, scores)
    result = results.result_of_scores(task, ids, scores, labels.numpy())
    result.loss = float(task_loss(task, outputs, labels))
    return result


def predict_sentences(model, name, texts, compute):
    """Predict `texts`, tuples of one or two sentences, with the head `name`: a `TaskResult`."""
    examples = [Example(str(row), text, None) for row, text in enumerate(texts)]
    dataset = TaskDataset(examples, TASKS[name], model.tokenizer, model.config.max_length)
    return predict_dataset(model, dataset, compute)


def evaluate(model, datasets, compute):
    """Predict every dataset of `datasets` (task -> `TaskDataset`); returns task -> `TaskResult`."""
    return {name: predict_dataset(model, data, compute) for name, data in datasets.items()}


@torch.no_grad()
def masked_losses(model, datasets, compute):
    """Mean loss of masked language modelling on datasets (task -> `TaskDataset`).

    The same tokens are masked every time. Returns `{mlm_<task>: {"loss": …}}`; raises `NotFinite`.
    """
    model.eval()
    losses = {}
    for name in model.config.mlm:
        total = torch.zeros(2, device=model.device)  # summed loss, masked tokens
        with evaluation_memory(model, compute), compute.autocast():
            for number, _, batch in shared_batches(datasets[name], compute.batch_tokens):
                sentences, masked = model.mask(name, batch, (0, number), first_row=0)
                parts, packed = model.arrange({(name, MASKED): sentences})
                places, ids = model.locate({name: masked}, parts, packed)[name]
                states = model.token_states(packed)
                total += torch.stack(model.masked_loss(states, places, ids))
        loss, count = distributed.sum_over_processes(total).tolist()
        if not math.isfinite(loss):
            raise NotFinite(f"mlm_{name}: the model's loss on dev is not finite")
        losses[f"mlm_{name}"] = {"loss": loss / max(1, count)}
    return losses


# --------------------------------------------------------------------------------------- calibrate


def calibrate(model, train_sets, count, compute):
    """Fit the offsets that `model.predict` adds to the heads' outputs, on training examples.

    Training uses dropout, prediction does not. Dropout lowers the cosine of two vectors, so an
    uncorrected head predicts "paraphrase" too often. `train_sets` maps a task to its `TaskDataset`.
    The same `count` examples are used every time; 0 changes nothing. Returns task -> `TaskResult`
    of these examples, calibrated.
    """
    if not count:
        return {}
    found = {}
    for name, dataset in train_sets.items():
        rows = np.random.default_rng(0).permutation(len(dataset))[:count]
        offset = model.get_buffer(f"offset_{name}").zero_()
        outputs, labels = head_outputs(model, dataset, compute, rows)[rows], dataset.labels[rows]
        offset.copy_(best_offset(dataset.task, outputs, labels))
        ids = [dataset.examples[row].id for row in rows]
        found[name] = result_of_outputs(dataset.task, ids, outputs + offset.cpu(), labels)
    return found


def best_offset(task, outputs, labels):
    """The vector (num_classes,) that lowers the loss most when added to `outputs`.

    `outputs` are (n, num_classes), `labels` (n,). A normal prior keeps it finite where all labels
    are the same.
    """
    outputs, labels = outputs.double(), labels.double()
    offset = torch.zeros(task.num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([offset], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        prior = offset.square().sum() / (2 * len(labels))
        total = task_loss(task, outputs + offset, labels) + prior
        total.backward()
        return total

    optimizer.step(loss)
    return offset.detach()


# -------------------------------------------------------------------------------------- the script


def evaluate_run(run, compute, data_dir=None):
    """Dev and test results of a run's best model: `{"dev": {task: TaskResult}, "test": {…}}`.

    Uses the run's own data files, in `data_dir` if that is given. Raises `UserError` if one has
    changed.
    """
    files = files_to_predict(run, data_dir)
    model, _ = load_run(run, compute.device)
    data = tokenize_data(files, model)
    return {split: evaluate(model, of_split(data, split), compute) for split in ("dev", "test")}


def files_to_predict(run, data_dir):
    """A run's dev and test files, checked: `{task: {split: TaskFile}}`."""
    description, files = run.description(), {}
    paths = paths_of_run(description)
    for name in plan_of(run, predicts=True).tasks:
        files[name] = {}
        for split in ("dev", "test"):
            path = paths[name][split]
            path = Path(data_dir) / path.name if data_dir else path
            if not os.path.lexists(path):
                if split == "dev":
                    raise UserError(f"{path}: {NOT_FOUND}")
                say(f"warning: {path}: no such file; no test predictions for {name}")
                continue
            files[name][split] = read_task_file(path, TASKS[name], split)
            recorded = description["data"][name].get(split)
            if recorded and file_sha256(path) != recorded["sha256"]:
                raise UserError(
                    f"{path}: changed since {run.path} was trained on it; "
                    f"predict other texts with --predict FILE"
                )
            for warning in files[name][split].warnings:
                say(f"warning: {warning}")
    return files


def fitting_tasks(run, count):
    """The run's tasks, rows of `TASKS`, of `count` sentences. Raises `UserError` if none."""
    names = plan_of(run, predicts=True).tasks
    fitting = [TASKS[name] for name in names if len(TASKS[name].sentences) == count]
    if not fitting:
        kind, hint = "pair", "add a second sentence (--sentence2, or a second column)"
        if count == 2:
            kind, hint = "single-sentence", "leave the second sentence out"
        raise UserError(f"{run.path}: this run has {kind} tasks only ({', '.join(names)}): {hint}")
    return fitting


def predict_text(run, sentences, compute):
    """Print what a run's best model predicts for one sentence, or for a pair of them."""
    tasks = fitting_tasks(run, len(sentences))
    model, _ = load_run(run, compute.device)
    for task in tasks:
        result = predict_sentences(model, task.name, [sentences], compute)
        text = f"{task.name:<8}{task.title}: {task.format(result.predictions[0])}"
        if task.kind != "score":
            of = "probabilities of 0 to" if task.kind == "classes" else "probability of"
            scores = " ".join(f"{score:.3f}" for score in result.scores[0])
            text += f"  ({of} {task.high:g}: {scores})"
        say(text)


def predict_file(run, flags, table, compute):
    """Write what a run's best model predicts for each row of `--predict` to an open file.

    Only some rows are in memory at a time; of labelled rows, predictions and labels stay there.
    Prints the scores on these.
    """
    chunks = read_chunks(flags.predict)
    if (first := next(chunks, None)) is None:
        raise UserError(f"{flags.predict}: only a header; expected rows below it")
    count = len(first[0].sentences)
    tasks = fitting_tasks(run, count)
    labelled = {task: [] for task in tasks if task.label in first[0].labels}
    model, _ = load_run(run, compute.device)
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(table_header(count, tasks))
    with tqdm(unit=" rows", disable=not (is_first() and sys.stderr.isatty()), **bar_size()) as bar:
        for chunk in itertools.chain([first], chunks):
            texts = [text.sentences for text in chunk]
            found = {task: predict_sentences(model, task.name, texts, compute) for task in tasks}
            model.vector_cache.clear()
            with output_errors(flags.out or "standard output"):
                writer.writerows(table_rows(texts, found))
            for task, parts in labelled.items():
                parts.append(labelled_rows(chunk, task, found[task]))
            bar.update(len(texts))
    for task, parts in labelled.items():
        predictions, labels = np.concatenate(parts, axis=1)
        metrics = results.measure(task, predictions, labels) if len(labels) else {}
        rows = f"{len(labels):,} rows with a {task.label} from {task.low:g} to {task.high:g}"
        say(f"{task.name}: {rows}  {results.format_metrics(metrics)}")


USES = ("sentence", "predict", "export", "report")  # flags that ask for something other than scores


# fmt: off
def make_parser():
    """All flags of this script."""
    parser = FlagParser(
        usage="%(prog)s [FLAG ...]",
        description="Evaluate a run or an ensemble of runs, predict on texts, export a model, or "
        "write a report.",
    )
    add = parser.add_argument
    add("--checkpoint", nargs="+", metavar="RUN", help="folder of a run (default: the newest in "
        "--runs_dir); several folders: their ensemble, for each task the mean of the scores saved "
        "by the runs that have it")
    add("--runs_dir", default="runs", metavar="DIR",
        help="folder of all runs (default: %(default)s)")
    add("--report", nargs="+", metavar="RUN", help="write tables, figures and errors of these runs")
    add("--report_dir", default="report", help="folder of the report (default: %(default)s)")
    add("--sentence", help="predict on this text instead of on files")
    add("--sentence2", help="second sentence: paraphrase and similarity of the two")
    add("--predict", metavar="FILE", help="predict each row of a file and write a tab-separated "
        "table: with columns 'sentence' or 'sentence1' and 'sentence2' (tabs or commas), else one "
        "sentence a line, or two with a tab between; '-': standard input; if it has the label "
        "column of a task, the scores on it are printed, too")
    add("--out", metavar="FILE", help="of --predict: the table (default: standard output)")
    add("--export", metavar="DIR", help="write the best model, if it has no PALs, into a new "
        "folder as one plain encoder (LoRA merged) with pooling files and heads: for transformers, "
        "sentence-transformers and --pretrained")
    add("--predictions_dir", default="predictions", metavar="DIR",
        help="folder of the prediction files (default: %(default)s)")
    add("--data_dir", metavar="DIR", help="where the run's data files lie now (default: where "
        "they lay when it was trained)")
    add_device_flags(parser)
    add("--precision", choices=PRECISIONS, help="of the prediction (default: the run's own)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser
# fmt: on


def parse_flags(argv=None):
    """The checked command line. Raises `UserError` for flags that exclude each other."""
    parser = make_parser()
    flags = parser.parse_args(parser.attach_texts(argv, ("--sentence", "--sentence2")))
    uses = [name for name in USES if getattr(flags, name) is not None]
    if len(uses) > 1:
        parser.error(f"--{uses[0]} and --{uses[1]} exclude each other")
    if flags.sentence2 is not None and flags.sentence is None:
        parser.error("--sentence2: only with --sentence")
    if flags.out is not None and flags.predict is None:
        parser.error("--out: only with --predict")
    if flags.out == "-":  # standard output, as without the flag
        flags.out = None
    if flags.out is not None and os.path.realpath(flags.out) == os.path.realpath(flags.predict):
        parser.error(f"--out {flags.out}: the file of --predict; expected another name")
    if flags.out is not None and Path(flags.out).exists() and not Path(flags.out).is_file():
        parser.error(f"--out {flags.out}: expected the name of a file")
    for word in sys.argv[1:] if argv is None else argv:
        if not is_utf8(word):
            parser.error(f"{word!a}: not UTF-8")
    if uses == ["report"] and flags.checkpoint:
        parser.error("--report and --checkpoint exclude each other")
    if uses and len(flags.checkpoint or []) > 1:
        parser.error(f"--{uses[0]} takes one run")
    if flags.data_dir and (uses or len(flags.checkpoint or []) > 1):
        parser.error("--data_dir: only to evaluate one run")
    return flags


def main(argv=None):
    """Evaluate one run or several, predict texts, export a model, or write a report."""
    flags = parse_flags(argv)
    if flags.report:
        runs = [finished_run(RunFolder(path)) for path in flags.report]
        for path in write_report(runs, flags.report_dir):
            say(f"wrote {path}")
    elif flags.checkpoint and len(flags.checkpoint) > 1:
        evaluate_ensemble(flags.checkpoint, flags.predictions_dir)
    else:
        run = RunFolder(flags.checkpoint[0] if flags.checkpoint else newest_run(flags.runs_dir))
        if flags.export is not None:
            export_run(run, flags.export)
            say(f"wrote {flags.export}")
            return
        device = select_device(flags.use_gpu, flags.use_cpu)
        with distributed.joined_processes(device) as device:
            description = run.description()
            precision = flags.precision or description["precision"]
            compute = Compute(device, precision, description["args"].get("deterministic"))
            with memory_errors(device, "the model"):
                use_run(run, compute, flags)


def use_run(run, compute, flags):
    """Predict a text or a file with a run, or evaluate it."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr if flags.predict is not None and is_first() else stdout):
        if compute.warning:
            say(f"warning: {compute.warning}")
        say(f"run {run.path}, {run.describe_best()}, {compute.device}, {compute.precision}")
        print_caveats(run)
        if flags.sentence is not None:
            sentences = [text for text in (flags.sentence, flags.sentence2) if text is not None]
            predict_text(run, tuple(sentences), compute)
        elif flags.predict is not None:
            with open_table(flags.out, stdout) as table:
                predict_file(run, flags, table, compute)
        else:
            scores = evaluate_run(run, compute, flags.data_dir)
            say(results.format_table(scores["dev"]))
            if is_first():
                results.write_predictions(flags.predictions_dir, scores)


@contextmanager
def open_table(path, stdout):
    """The file that predictions go to: `path`, or standard output if it is None."""
    if path is not None and is_first():
        with open_whole(path) as file:
            yield file
        say(f"wrote {path}")
        return
    stdout.reconfigure(encoding="utf-8")
    with suppress(BrokenPipeError):  # nobody reads on, as in `| head`
        yield stdout
        with output_errors("standard output"):
            stdout.flush()


if __name__ == "__main__":
    end_process(run_script(main))
