"""Finished runs: their saved scores, and ensembles of several runs."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import TASKS, UserError
from datasets import read_task_file
from reporting import results
from runtime.files import file_sha256
from runtime.hub import FELL_BACK
from runtime.script import say
from training.data_files import uses_sample
from training.flags import default_flags
from training.run_folder import RunFolder
from training.saved_models import plan_of


@dataclass
class FinishedRun:
    """What tables and figures need of a finished run."""

    path: str
    description: dict  # run.json
    lines: list  # of metrics.jsonl
    dev: dict  # task -> `TaskResult` of the best model
    overall: float  # its score on dev
    row: str = ""  # label of its row in the tables, which runs of several seeds share
    is_namesake: bool = False  # whether another run of the report has the same folder name

    @property
    def name(self):
        """The folder's name; its whole path if another run has the same name."""
        return self.path if self.is_namesake else Path(self.path).resolve().name

    @property
    def args(self):
        """Every flag of the run."""
        return self.description["args"]

    def logged(self, key):
        """Values of `key` in the training lines that have it."""
        return [line[key] for line in self.lines if line["kind"] == "train" and key in line]


def finished_run(run):
    """Read a `RunFolder`. Raises `UserError` if dev scores or evaluations are missing."""
    dev, lines = read_run_scores(run, "dev"), run.metrics()
    evaluated = [set(line.get("dev", ())) for line in lines if line.get("kind") == "eval"]
    if not any(set(dev) <= tasks for tasks in evaluated):
        raise UserError(f"{run.metrics_file}: no evaluation of all tasks; the run is unfinished")
    description = run.description()
    description["args"] = default_flags() | description["args"]  # of an older version, fewer
    return FinishedRun(str(run.path), description, lines, dev, results.overall_score(dev))


def read_run_scores(run, split):
    """Results of a finished run by task, from its `predictions/` alone; test files may be missing.

    Raises `UserError` where the run has no scores of the dev set.
    """
    description, folder = run.description(), run.path / "predictions"
    found = {}
    for name in plan_of(run, predicts=True).tasks:
        path = folder / f"{name}-{split}-scores.tsv"
        if path.exists():
            found[name] = results.read_scores(folder, name, split)
        elif split == "dev":
            raise UserError(
                f"{path}: no such file, so the run is not finished; finish it with "
                f"`{description['command']} --resume`"
            )
    return found


def dev_texts(run, name):
    """Sentences by id from the run's dev file, empty if it is missing or has changed."""
    file = run.description["data"][name]["dev"]
    with contextlib.suppress(OSError, UserError):
        if file_sha256(file["path"]) == file["sha256"]:
            examples = read_task_file(file["path"], TASKS[name], "dev").examples
            return {example.id: example.sentences for example in examples}
    return {}


def print_caveats(run):
    """Warn if a run used a substitute encoder, or the generated sample as its data."""
    description = run.description()
    if description["encoder"]["substituted"]:
        say(f"warning: {run.path}: {FELL_BACK}")
    if uses_sample(description):
        say(f"warning: {run.path}: its data is the small generated sample")


def average_results(runs):
    """The ensemble of several runs' results: mean probabilities and scores, task by task.

    `runs` maps a run's name to its results (task -> `TaskResult`); each task is averaged over the
    runs that have it. Raises `UserError` where ids or labels differ.
    """
    averaged = {}
    for name in TASKS:
        members = {run: found[name] for run, found in runs.items() if name in found}
        if not members:
            continue
        (first_run, first), *others = members.items()
        for run, result in others:
            if result.ids != first.ids:
                raise UserError(f"{run}: other {name} examples than {first_run}; ids differ")
            if not np.array_equal(result.labels, first.labels):
                raise UserError(f"{run}: other {name} labels than {first_run}")
        scores = np.mean([result.scores for result in members.values()], axis=0, dtype=np.float64)
        scores = scores.astype(np.float32)
        averaged[name] = results.result_of_scores(TASKS[name], first.ids, scores, first.labels)
    return averaged


def evaluate_ensemble(paths, predictions_dir):
    """Print the dev scores of several runs and of their ensemble; write its prediction files.

    Raises `UserError` where a run is unfinished or does not fit the others.
    """
    runs = {str(path): RunFolder(path) for path in paths}
    if len({run.path.resolve() for run in runs.values()}) < len(paths):
        raise UserError("--checkpoint: a run is named twice; expected different runs")
    dev = {name: read_run_scores(run, "dev") for name, run in runs.items()}
    test = {name: read_run_scores(run, "test") for name, run in runs.items()}
    averaged = {"dev": average_results(dev), "test": average_results(test)}
    for name in runs:
        if missing := sorted(set(dev[name]) & set(averaged["test"]) - set(test[name])):
            raise UserError(
                f"{name}: no test predictions for {', '.join(missing)}, which other runs have"
            )
    for name in [name for name in averaged["dev"] if name not in averaged["test"]]:
        say(f"warning: no run has test predictions for {name}")
    for run in runs.values():
        print_caveats(run)
    counts = Counter(task for found in dev.values() for task in found)
    together = f"ensemble of {len(runs)} runs"
    if set(counts.values()) != {len(runs)}:
        of_task = (f"{task} of {counts[task]}" for task in TASKS if task in counts)
        together += f" ({', '.join(of_task)})"
    for name, found in {**dev, together: averaged["dev"]}.items():
        say(f"{name}\n{results.format_table(found)}\n")
    results.write_predictions(predictions_dir, averaged)
