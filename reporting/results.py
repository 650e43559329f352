"""Predictions, metrics, and their files."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import TASKS, UserError, overall_tasks
from runtime.files import write_files
from runtime.script import say


@dataclass
class TaskResult:
    """Predictions for a file, in its order, or for some of its examples."""

    ids: list
    predictions: np.ndarray  # (n,) class, 0.0 or 1.0, or score, as the prediction file prints it
    scores: np.ndarray  # (n, classes) probabilities, or (n, 1) probability of 1 or score
    labels: np.ndarray | None = None  # (n,), None for a test file
    loss: float | None = None  # mean over the examples
    metrics: dict = field(default_factory=dict)

    def score(self, task):
        """The metric that counts for the task: accuracy or Pearson correlation."""
        return self.metrics[TASKS[task].metric]


def measure(task, predictions, labels):
    """Metrics of predictions (n,) against labels (n,): accuracy and macro-F1, or correlations."""
    if task.kind == "score":
        from scipy.stats import rankdata  # ties share their mean rank

        spearman = pearson(rankdata(predictions), rankdata(labels))
        return {"pearson": pearson(predictions, labels), "spearman": spearman}
    from sklearn.metrics import f1_score

    macro_f1 = f1_score(labels, predictions, average="macro", zero_division=0)
    return {"accuracy": float(np.mean(predictions == labels)), "macro_f1": float(macro_f1)}


def pearson(a, b):
    """Pearson correlation of two arrays (n,). It is undefined, and 0, where one is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1])


def overall_score(results):
    """Mean over the leaderboard's tasks of accuracy or (1 + correlation) / 2."""
    scores = {name: results[name].score(name) for name in overall_tasks(results)}
    values = [(1 + s) / 2 if TASKS[name].kind == "score" else s for name, s in scores.items()]
    return float(np.mean(values))


def undefined_correlations(results):
    """Why correlations are undefined: task -> which side is the same in all rows of its file."""
    reasons = {}
    for name, result in results.items():
        sides = {"predictions": result.predictions, "labels": result.labels}
        constant = [side for side, values in sides.items() if np.ptp(values) == 0]
        if TASKS[name].kind == "score" and constant:
            reasons[name] = f"all dev {' and '.join(constant)} are the same"
    return reasons


def format_metrics(metrics):
    """Metrics by name as text."""
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def format_table(results):
    """The dev scores as lines of text."""
    lines = [f"{'task':<8}{'examples':>9}{'loss':>8}  metrics"]
    for name, result in results.items():
        metrics = format_metrics(result.metrics)
        loss = "" if result.loss is None else f" {result.loss:.3f}"
        lines.append(f"{name:<8}{len(result.ids):>9}{loss:>8}  {metrics}")
    return "\n".join([*lines, f"overall  {overall_score(results):.3f}"])


def scores_to_predictions(task, scores):
    """Turn probabilities or scores (n, …) into the predictions (n,) of the course's files."""
    if task.kind == "classes":
        return scores.argmax(-1)
    return scores[:, 0].round() if task.kind == "binary" else scores[:, 0]


def result_of_scores(task, ids, scores, labels=None):
    """The `TaskResult` of probabilities or scores (n, …), measured if there are labels (n,)."""
    predictions = scores_to_predictions(task, scores)
    metrics = {} if labels is None else measure(task, predictions, labels)
    return TaskResult(ids, predictions, scores, labels, metrics=metrics)


def worst_errors(task, result):
    """All errors, worst first: (row, probability of the wrong answer or distance)."""
    wrong = np.abs(result.predictions - result.labels)
    if task.kind != "score":
        scores = result.scores
        sure = scores.max(1) if task.kind == "classes" else np.maximum(scores, 1 - scores)[:, 0]
        wrong = np.where(wrong > 0, sure, 0)
    order = np.argsort(-wrong, kind="stable")
    return [(int(row), float(wrong[row])) for row in order if wrong[row] > 0]


def prediction_files(folder, results, split, paths=None):
    """Text of each of the course's prediction files by path; `paths`: task -> another path."""
    files = {}
    for name, result in results.items():
        task = TASKS[name]
        rows = zip(result.ids, result.predictions, strict=True)
        text = "".join(f"{i} , {task.format(prediction)} \n" for i, prediction in rows)
        path = (paths or {}).get(name) or Path(folder) / task.output_name(split)
        files[path] = f"id \t {task.header} \n{text}"
    return files


def write_predictions(folder, results):
    """Write the prediction files of `results` (split -> task -> `TaskResult`); print their paths.

    Raises `OutputError`; then every earlier file is as it was.
    """
    files = {}
    for split, of_split in results.items():
        files |= prediction_files(folder, of_split, split)
    write_files(files)
    for path in files:
        say(f"wrote {path}")


def score_files(folder, results, split):
    """Text of each `<task>-<split>-scores.tsv` by path: id, label, prediction, then the scores."""
    texts = {}
    for name, result in results.items():
        labels = [""] * len(result.ids) if result.labels is None else result.labels
        names = [f"score_{i}" for i in range(result.scores.shape[1])]
        rows = zip(result.ids, labels, result.predictions, *result.scores.T, strict=True)
        lines = ["\t".join(map(str, row)) for row in [("id", "label", "prediction", *names), *rows]]
        texts[Path(folder) / f"{name}-{split}-scores.tsv"] = "\n".join(lines) + "\n"
    return texts


def read_scores(folder, name, split):
    """Read a file of `score_files` back as a `TaskResult`. Raises `UserError` if it is damaged."""
    task, path = TASKS[name], Path(folder) / f"{name}-{split}-scores.tsv"
    try:
        _, *lines = path.read_text(encoding="utf-8").splitlines()
        ids, labels, _, *columns = zip(*(line.split("\t") for line in lines), strict=True)
        scores = np.array(columns, dtype=np.float32).T
        labels = np.array(labels, dtype=np.float32) if labels[0] else None
        return result_of_scores(task, list(ids), scores, labels)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not a file of scores: {error}") from error
