"""How good is a model, and what does it predict?

    python evaluation.py                                   # the newest run
    python evaluation.py --checkpoint runs/LoRA
    python evaluation.py --checkpoint runs/a runs/b        # their ensemble
    python evaluation.py --report runs/a runs/b            # tables and figures
    python evaluation.py --sentence "A film to fall in love with."

Prints the dev scores and writes the prediction files of dev and test in the course's format.
"""

import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the seconds of the imports below: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F

import distributed
from arguments import MOVED, FlagParser, paths_of_run, uses_sample
from base_bert import STOOD_IN, file_sha256
from config import TASKS, UserError, overall_tasks
from datasets import Example, TaskDataset, TaskFile, read_task_file
from device import PRECISIONS, autocast, select_device, select_precision
from multitask_bert import task_loss
from report import Run, write_report
from run_folder import RunFolder, newest_run, write_files
from saved_models import load_run
from script import NotFinite, memory_errors, run_script

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 16384}  # tokens of one evaluation batch


@dataclass
class TaskResult:
    """Predictions for one file, in the file's order."""

    ids: list
    predictions: np.ndarray  # (n,) class, 0.0 or 1.0, or score, as the prediction file prints it
    scores: np.ndarray  # (n, classes) probabilities, or (n, 1) probability of 1 or score
    labels: np.ndarray | None = None  # (n,), None for a test file
    loss: float | None = None  # mean over the file
    metrics: dict = field(default_factory=dict)

    def score(self, task):
        """The metric that counts for the task: accuracy or Pearson correlation."""
        return self.metrics[TASKS[task].metric]


# -------------------------------------------------------------------------------- predict, measure


@torch.no_grad()
def head_outputs(model, dataset, precision, check_stop=lambda: None, rows=None):
    """What the head says of a `TaskDataset`, (examples, num_classes) fp32 on the CPU.

    In eval mode and in batches of `BATCH_TOKENS`. With `rows` only those are predicted; the others
    are 0. Raises `NotFinite` where an output is no finite number.
    """
    device = next(model.parameters()).device
    model.eval()
    outputs = torch.zeros(len(dataset), dataset.task.num_classes, device=device)
    most = BATCH_TOKENS[device.type]
    batches = dataset.batches_of(most, rows)
    memory = memory_errors(device, f"evaluation batches of up to {most:,} tokens")
    with memory, autocast(device, precision):  # once: it keeps the weights that it converts
        for number, (batch_rows, batch) in enumerate(batches):
            if number % distributed.world_size() == 0:
                check_stop()
            if number % distributed.world_size() != distributed.rank():
                continue  # the share of another process
            outputs[torch.as_tensor(batch_rows)] = model.predict(dataset.task.name, batch)
    outputs = distributed.sum_over_processes(outputs).cpu()
    if bad := int((~outputs.isfinite()).any(1).sum()):
        name = dataset.task.name
        raise NotFinite(f"{name}: the model's outputs for {bad} examples are not finite")
    return outputs


def predict_dataset(model, dataset, precision, check_stop=lambda: None):
    """Predict a whole `TaskDataset`; returns a `TaskResult`."""
    task, outputs = dataset.task, head_outputs(model, dataset, precision, check_stop)
    ids = [example.id for example in dataset.examples]
    result = TaskResult(ids, *to_predictions(task, outputs))
    if dataset.labels is not None:
        result.labels = dataset.labels.numpy()
        result.loss = float(task_loss(task, outputs, dataset.labels))
        result.metrics = measure(task, result.predictions, result.labels)
    return result


def to_predictions(task, outputs):
    """A head's raw outputs (n, num_classes) as predictions (n,) and scores (n, …)."""
    if task.kind == "classes":
        scores = F.softmax(outputs, dim=-1).numpy()
    elif task.kind == "binary":
        scores = torch.sigmoid(outputs).numpy()
    else:
        scores = outputs.clamp(task.low, task.high).numpy()
    return scores_to_predictions(task, scores), scores


def scores_to_predictions(task, scores):
    """Probabilities or scores (n, …) as the predictions (n,) of the course's files."""
    if task.kind == "classes":
        return scores.argmax(-1)
    return scores[:, 0].round() if task.kind == "binary" else scores[:, 0]


def measure(task, predictions, labels):
    """Metrics of predictions (n,) against labels (n,): accuracy and macro-F1, or correlations.

    A correlation with constant predictions is undefined and counts as 0.
    """
    if task.kind == "score":
        return {
            "pearson": correlation(predictions, labels),
            "spearman": correlation(ranks(predictions), ranks(labels)),
        }
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0)),
    }


def correlation(a, b):
    """Pearson correlation of two arrays (n,); 0 where one is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1])


def ranks(values):
    """Ranks of `values` (n,), ties sharing their mean rank: what Spearman correlates."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def evaluate(model, datasets, precision, check_stop=lambda: None):
    """Predict every dataset of `datasets` (task -> `TaskDataset`); returns task -> `TaskResult`."""
    return {
        name: predict_dataset(model, dataset, precision, check_stop)
        for name, dataset in datasets.items()
    }


def calibrate(model, train_sets, examples, precision, check_stop=lambda: None):
    """Fit what `model.predict` adds to each head's outputs, on training examples in eval mode.

    A head is trained on vectors with dropout, which lowers the cosine of two of them, and predicts
    on vectors without it: uncorrected, it says "paraphrase" too often. `train_sets` maps a task to
    its `TaskDataset`, of which `examples` are used, the same ones every time; 0 leaves the model
    as it is.
    """
    if not examples:
        return
    for name, dataset in train_sets.items():
        rows = np.random.default_rng(0).permutation(len(dataset))[:examples]
        offset = model.get_buffer(f"offset_{name}").zero_()
        outputs = head_outputs(model, dataset, precision, check_stop, rows)[rows]
        offset.copy_(best_offset(dataset.task, outputs, dataset.labels[rows]))


def best_offset(task, outputs, labels):
    """The vector (num_classes,) which, added to `outputs` (n, num_classes), has the least loss.

    Against `labels` (n,), with a standard normal prior, which keeps it finite where all are alike.
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


def overall_score(results):
    """Mean over the leaderboard's tasks of accuracy or (1 + correlation) / 2."""
    values = [
        (1 + results[name].score(name)) / 2
        if TASKS[name].kind == "score"
        else results[name].score(name)
        for name in overall_tasks(results)
    ]
    return float(np.mean(values))


def format_table(results):
    """The dev scores as lines of text."""
    lines = [f"{'task':<8}{'examples':>9}{'loss':>8}  metrics"]
    for name, result in results.items():
        metrics = "  ".join(f"{key} {value:.3f}" for key, value in result.metrics.items())
        loss = "" if result.loss is None else f" {result.loss:.3f}"
        lines.append(f"{name:<8}{len(result.ids):>9}{loss:>8}  {metrics}")
    return "\n".join([*lines, f"overall  {overall_score(results):.3f}"])


def undefined_correlations(results):
    """Tasks whose predictions are constant, so that their correlation is undefined."""
    return [
        name
        for name, result in results.items()
        if TASKS[name].kind == "score" and np.ptp(result.predictions) == 0
    ]


# -------------------------------------------------------------------------------- prediction files


def format_predictions(task, result):
    """The course's prediction file, byte for byte."""
    rows = zip(result.ids, result.predictions, strict=True)
    return f"id \t {task.header} \n" + "".join(f"{i} , {task.format(p)} \n" for i, p in rows)


def prediction_files(folder, results, split, paths=None):
    """The text of `<task>-<split>-output.csv` by path; `paths` (task -> path) override names."""
    files = {}
    for name, result in results.items():
        task = TASKS[name]
        path = (paths or {}).get(name) or Path(folder) / task.output_name(split)
        files[path] = format_predictions(task, result)
    return files


def write_predictions(folder, results):
    """Write and name the prediction files of `results` (split -> task -> `TaskResult`)."""
    files = {}
    for split, of_split in results.items():
        files |= prediction_files(folder, of_split, split)
    write_files(files)
    for path in files:
        print(f"wrote {path}")


def score_files(folder, results, split):
    """The text of `<task>-<split>-scores.tsv` by path.

    Columns: id, label, prediction, then the probabilities or the score.
    """
    texts = {}
    for name, result in results.items():
        labels = [""] * len(result.ids) if result.labels is None else result.labels
        columns = [f"score_{i}" for i in range(result.scores.shape[1])]
        lines = ["\t".join(["id", "label", "prediction", *columns])]
        for row in zip(result.ids, labels, result.predictions, result.scores, strict=True):
            lines.append("\t".join(map(str, [*row[:3], *row[3]])))
        texts[Path(folder) / f"{name}-{split}-scores.tsv"] = "\n".join(lines) + "\n"
    return texts


def read_scores(folder, name, split):
    """Read a file of `score_files` back as a `TaskResult`."""
    path = Path(folder) / f"{name}-{split}-scores.tsv"
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        scores = np.array([[np.float32(x) for x in row[3:]] for row in rows])
        result = TaskResult(
            [row[0] for row in rows], scores_to_predictions(TASKS[name], scores), scores
        )
        if rows and rows[0][1]:
            result.labels = np.array([np.float32(row[1]) for row in rows])
            result.metrics = measure(TASKS[name], result.predictions, result.labels)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not a file of scores: {error}") from error
    return result


# ---------------------------------------------------------------------------------- several runs


def read_run_scores(run, split):
    """Results of a finished run by task, from its `predictions/` alone; test files may be missing.

    Raises `UserError` where the run has no scores of the dev set.
    """
    description, folder = run.description(), run.path / "predictions"
    found = {}
    for name in description["args"]["tasks"]:
        path = folder / f"{name}-{split}-scores.tsv"
        if path.exists():
            found[name] = read_scores(folder, name, split)
        elif split == "dev":
            raise UserError(
                f"{path}: no such file: the run is not finished; it is written at its end: "
                f"{description['command']} --resume"
            )
    return found


def average_results(runs):
    """The ensemble of several runs' results: mean probabilities and scores, task by task.

    `runs` maps a run's name to its results (task -> `TaskResult`); each task is averaged over the
    runs that have it. Raises `UserError` where ids or labels differ.
    """
    averaged = {}
    for task in TASKS:
        members = {name: results[task] for name, results in runs.items() if task in results}
        if members:
            averaged[task] = average_task(TASKS[task], members)
    return averaged


def average_task(task, members):
    """`average_results` for one task; `members` maps a run's name to its `TaskResult`."""
    (first_name, first), *others = members.items()
    for name, result in others:
        if result.ids != first.ids:
            raise UserError(f"{name}: other {task.name} examples than {first_name}; ids differ")
        if not np.array_equal(result.labels, first.labels):
            raise UserError(f"{name}: other {task.name} labels than {first_name}")
    scores = np.mean([result.scores for result in members.values()], axis=0, dtype=np.float64)
    scores = scores.astype(np.float32)
    averaged = TaskResult(first.ids, scores_to_predictions(task, scores), scores, first.labels)
    if first.labels is not None:
        averaged.metrics = measure(task, averaged.predictions, averaged.labels)
    return averaged


def evaluate_ensemble(paths, predictions_dir):
    """Print the dev scores of several runs and of their ensemble, write its prediction files."""
    runs = {str(path): RunFolder(path) for path in paths}
    if len({run.path.resolve() for run in runs.values()}) < len(paths):
        raise UserError("--checkpoint: a run is named twice; expected different runs")
    of_splits = {}
    for split in ("dev", "test"):
        results = {name: read_run_scores(run, split) for name, run in runs.items()}
        averaged = of_splits[split] = average_results(results)
        for name, run in runs.items():
            missing = set(run.description()["args"]["tasks"]) & set(averaged) - set(results[name])
            if missing:
                raise UserError(
                    f"{name}: no {split} predictions for {', '.join(sorted(missing))}; "
                    "expected them, since other runs have them"
                )
        if split == "dev":
            for run in runs.values():
                print_caveats(run)
            for name, of_run in (results | {name_ensemble(results): averaged}).items():
                print(f"{name}\n{format_table(of_run)}\n")
    write_predictions(predictions_dir, of_splits)


def name_ensemble(runs):
    """What an ensemble is called: how many runs it has, and for each task where that differs."""
    counts = Counter(task for results in runs.values() for task in results)
    name = f"ensemble of {len(runs)} runs"
    if set(counts.values()) == {len(runs)}:
        return name
    return f"{name} ({', '.join(f'{task} of {counts[task]}' for task in TASKS if task in counts)})"


def finished_run(run):
    """A finished run, a `RunFolder`, as the `report.Run` that tables and figures are made of.

    Raises `UserError` where the run has no scores of the dev set.
    """
    dev, lines = read_run_scores(run, "dev"), run.metrics()
    evaluated = [set(line.get("dev", ())) for line in lines if line.get("kind") == "eval"]
    if not any(set(dev) <= tasks for tasks in evaluated):
        raise UserError(f"{run.metrics_file}: no evaluation in it; the run is not whole")
    return Run(str(run.path), run.description(), lines, dev, overall_score(dev))


# ------------------------------------------------------------------------------------- the script


def evaluate_run(run, device, precision, data_dir=None):
    """Dev and test results of a run's best model: `{"dev": {task: TaskResult}, "test": {…}}`.

    On the run's own files, which lie in `data_dir` now where that is given. Raises `UserError`
    where one has changed.
    """
    model, tokenizer, description = load_run(run, device)
    results, paths = {"dev": {}, "test": {}}, paths_of_run(description)
    for split, of_split in results.items():
        for name in model.config.tasks:
            recorded, path = description["data"][name].get(split), paths[name][split]
            if data_dir:
                path = Path(data_dir) / path.name
            if not path.exists() and split == "test":
                print(f"warning: {path}: no such file; no test predictions for {name}")
                continue
            if not path.exists():
                raise UserError(f"{path}: {MOVED}")
            task_file = read_task_file(path, TASKS[name], split)
            if recorded and file_sha256(path) != recorded["sha256"]:
                raise UserError(f"{path}: changed since {run.path} was trained on it")
            dataset = TaskDataset(task_file, TASKS[name], tokenizer, model.config.max_length)
            of_split[name] = predict_dataset(model, dataset, precision)
    return results


def print_caveats(run):
    """Say where a run has a stand-in for the encoder, or the generated sample for the data."""
    description = run.description()
    if description["encoder"]["substituted"]:
        print(f"warning: {run.path}: {STOOD_IN}")
    if uses_sample(description):
        print(f"warning: {run.path}: its data is the small generated sample")


def predict_sentences(model, tokenizer, name, texts, precision):
    """What head `name` says of `texts`, tuples of one or two sentences: a `TaskResult`."""
    examples = [Example(str(row), text, None) for row, text in enumerate(texts)]
    file = TaskFile(Path("text"), examples, [], len(examples))
    dataset = TaskDataset(file, TASKS[name], tokenizer, model.config.max_length)
    return predict_dataset(model, dataset, precision)


def predict_text(run, sentence, sentence2, device, precision):
    """Print what a run's best model says of a sentence, or of a pair of them."""
    tasks = run.description()["args"]["tasks"]
    sentences = (sentence,) if sentence2 is None else (sentence, sentence2)
    fitting = [name for name in tasks if len(TASKS[name].sentences) == len(sentences)]
    if not fitting:
        hint = "two sentences: add" if sentence2 is None else "one sentence: omit"
        raise UserError(f"{run.path}: trained on {', '.join(tasks)}, of {hint} --sentence2")
    model, tokenizer, _ = load_run(run, device)
    for name in fitting:
        task = TASKS[name]
        result = predict_sentences(model, tokenizer, name, [sentences], precision)
        scores = " ".join(f"{score:.3f}" for score in result.scores[0])
        print(f"{name:<8}{task.title}: {task.format(result.predictions[0])}  ({scores})")


def get_args(argv=None):
    """The command line."""
    parser = FlagParser(
        usage="%(prog)s [FLAG ...]",
        description="Evaluate a run or an ensemble of runs, predict on a text, or write a report.",
    )
    add = parser.add_argument
    add("--checkpoint", nargs="+", metavar="RUN", help="folder of a run (default: the newest under "
        "runs/); several folders: their ensemble, from the scores that each run saved")
    add("--report", nargs="+", metavar="RUN", help="write tables and figures of these runs")
    add("--report_dir", default="report", help="folder of the report (default: %(default)s)")
    add("--sentence", help="predict on this text instead of on files")
    add("--sentence2", help="second sentence: paraphrase and similarity of the two")
    add("--predictions_dir", default="predictions", metavar="DIR",
        help="folder of the prediction files (default: %(default)s)")
    add("--data_dir", metavar="DIR", help="where the run's data files lie now (default: where "
        "they lay when it was trained)")
    add("--use_gpu", action="store_true", help="fail without a GPU")
    add("--precision", choices=PRECISIONS, help="(default: the run's own)")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.sentence2 is not None and args.sentence is None:
        parser.error("--sentence2 goes with --sentence")
    for flag, text in (("--sentence", args.sentence), ("--sentence2", args.sentence2)):
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            parser.error(f"{flag} {text!a}: not UTF-8")
    if args.sentence is not None and (args.report or len(args.checkpoint or []) > 1):
        parser.error("--sentence takes one run")
    if args.report and args.checkpoint:
        parser.error("--report and --checkpoint exclude each other")
    if args.data_dir and (args.report or args.sentence or len(args.checkpoint or []) > 1):
        parser.error("--data_dir goes with the evaluation of one run")
    return args


def main(argv=None):
    """Evaluate a run or an ensemble of runs, predict on a text, or write a report."""
    args = get_args(argv)
    if args.report:
        runs = [finished_run(RunFolder(path)) for path in args.report]
        print(f"wrote {write_report(runs, args.report_dir)}")
        return
    if args.checkpoint and len(args.checkpoint) > 1:
        evaluate_ensemble(args.checkpoint, args.predictions_dir)
        return
    run = RunFolder(args.checkpoint[0] if args.checkpoint else newest_run())
    device = distributed.start(select_device(args.use_gpu))
    distributed.quiet_unless_first()
    asked = args.precision or run.description()["precision"]
    precision, warning = select_precision(asked, device)
    if warning:
        print(f"warning: {warning}")
    print(f"run {run.path}, {run.describe_best()}, {device}, {precision}")
    print_caveats(run)
    with memory_errors(device, "the model"):
        if args.sentence is not None:
            predict_text(run, args.sentence, args.sentence2, device, precision)
            return
        results = evaluate_run(run, device, precision, args.data_dir)
    distributed.finish()
    print(format_table(results["dev"]))
    if distributed.is_first():
        write_predictions(args.predictions_dir, results)


if __name__ == "__main__":
    sys.exit(run_script(main))
