"""Tables and figures of finished runs, from their folders alone: no model is loaded.

    python evaluation.py --report runs/LoRA runs/full-model

Writes report/report.md with the paper's tables and figures and some more, and report.html, which
also lists every dev error and compares two runs. Scores come from a run's `predictions/`, times and
losses from `metrics.jsonl`, the rest from `run.json`.
"""

import argparse
import json
import os
import re
import shlex
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import RECIPES, TASKS, overall_tasks
from reporting.ensemble import dev_texts
from reporting.figures import cosine_pictures, loss_pictures, scatter_picture, write_pictures
from reporting.html import format_page
from reporting.results import TaskResult, overall_score, pearson, worst_errors
from runtime.files import write_files
from training.data_files import uses_sample
from training.flags import default_flags
from training.model_card import NOT_LISTED
from training.plan import make_plan
from training.setup import identity

ERRORS_SHOWN = 8
LONGEST_TEXT = 160  # characters of a sentence in a table
# Flags in which the runs of one row may differ: names and paths. The files' content is compared.
MAY_DIFFER = NOT_LISTED | {"seed"}
# Flags of the training budget: a run that differs in these alone is still that row of the paper.
BUDGET = {"epochs", "steps_per_epoch", "patience", "batch_size", "task_batch_sizes", "accumulate"}
BUDGET |= {"lr", "head_lr", "precision", "deterministic", "calibration_examples"}


class Table(NamedTuple):
    """A table: plain cells; caption and notes are Markdown."""

    caption: str
    header: list
    cells: list
    notes: tuple = ()

    @property
    def numeric(self):
        """Whether a column holds numbers, for each column."""
        columns = zip(*self.cells, strict=True) if self.cells else [[]] * len(self.header)
        return [all(re.match(r"[-–\d]", cell) for cell in column) for column in columns]


def recipe_of(run):
    """Name of a run's recipe; None without one, or if other flags make it another strategy."""
    name = run.args["recipe"]
    if name is None:
        return None
    recipe, expected = RECIPES[name].flags, default_flags() | RECIPES[name].flags
    compared = recipe.keys() | (expected.keys() - MAY_DIFFER - BUDGET)
    return name if all(run.args[flag] == expected[flag] for flag in compared) else None


def group_runs(runs):
    """The rows of the tables: label -> runs that differ only in seed and name."""
    groups = {}
    for run in runs:
        flags = {name: value for name, value in run.args.items() if name not in MAY_DIFFER}
        key = json.dumps([flags, identity(run.description)], sort_keys=True)
        groups.setdefault(key, []).append(run)
    recipes = [recipe_of(group[0]) for group in groups.values()]
    rows = {}
    for group, recipe in zip(groups.values(), recipes, strict=True):
        names = [run.name for run in group]
        stems = {re.sub(r"[-_](seed|s)?\d+$", "", n) for n in names} if len(names) > 1 else {*names}
        prefix = os.path.commonprefix(names).rstrip("-_.") or names[0]  # noqa: RUF071
        stem = (stems.pop() if len(stems) == 1 else "") or prefix
        label = recipe if recipe and recipes.count(recipe) == 1 else stem
        label = group[0].path if label in rows else label
        rows[label] = group
        for run in group:
            run.row = label
    return rows


def by_value(runs, describe):
    """`describe(run)` of all runs as text: once if all are equal, else each with its runs."""
    found = {}
    for run in runs:
        found.setdefault(describe(run), []).append(run.name)
    texts = [f"{value} ({', '.join(names)})" for value, names in found.items()]
    return "; ".join(texts) if len(found) > 1 else next(iter(found))


def provenance(runs):
    """The end of every caption: the encoder, substituted or not, and the data, sample or not."""

    def encoder(run):
        about, how = run.description["encoder"], "as asked for"
        if about["substituted"]:
            how = "**substituted**, since bert-base-uncased could not be reached"
        if start := run.args.get("start_from"):
            how += f", then the best model of `{start}`"
        return f"`{about['name']}` ({how})"

    def data(run):
        counts = [f"{n} {f['train']['examples']:,}" for n, f in run.description["data"].items()]
        kind = "the files named in `run.json`, not the sample"
        if uses_sample(run.description):
            kind = "the **generated sample**"
        return f"{kind}; training examples: {', '.join(counts)}"

    return f"Encoder: {by_value(runs, encoder)}. Data: {by_value(runs, data)}."


def paraphrase_notes(runs):
    """Notes that belong beside every paraphrase score."""
    runs, notes = [run for run in runs if "para" in run.dev], []
    counts = {run.description["data"]["para"]["train"]["examples"] for run in runs}
    few = " and ".join(f"{count:,}" for count in sorted(counts) if count < 200_000)
    if few:
        notes.append(f"Paraphrase: trained on {few} pairs; the paper had about 283,000.")
    if any("all-MiniLM-L6-v2" in run.description["encoder"]["name"] for run in runs):
        notes.append(
            "all-MiniLM-L6-v2 was itself trained contrastively on Quora duplicates (its model "
            "card), which raises its paraphrase score by an unknown amount."
        )
    return tuple(notes)


# ------------------------------------------------------------------------------------------ tables


def bootstrap_interval(results, draws=1000, seed=224):
    """95 % percentile bootstrap interval (Efron 1979) of the overall score, an array (2,)."""
    from scipy.stats import bootstrap

    # SciPy wants two rows or more: a single example is drawn as two copies of itself.
    counts = [len(results[name].labels) for name in overall_tasks(results)]
    rows = [np.arange(max(count, 2), dtype=np.int32) % count for count in counts]
    settings = {"method": "percentile", "n_resamples": draws, "vectorized": False}
    settings["rng"] = np.random.default_rng(seed)
    drawn = bootstrap(rows, partial(overall_of_rows, results), **settings)
    return np.array(drawn.confidence_interval)


def overall_of_rows(results, *rows):
    """Overall score of some dev examples: `rows` are an array of row numbers for each task."""
    drawn = {}
    for name, chosen in zip(overall_tasks(results), rows, strict=True):
        task, result = TASKS[name], results[name]
        predictions, labels = result.predictions[chosen], result.labels[chosen]
        is_score = task.kind == "score"
        value = pearson(predictions, labels) if is_score else np.mean(predictions == labels)
        drawn[name] = TaskResult([], predictions, None, metrics={task.metric: value})
    return overall_score(drawn)


def spread(values, form="{:.3f}"):
    """One value, or mean ± standard deviation (n - 1) of several; a dash if one is missing."""
    if not values or None in values:
        return "–"
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(np.std(values, ddof=1))}"


def scores_table(rows):
    """Table 1: dev scores by strategy, beside the paper's overall score."""
    runs = [run for group in rows.values() for run in group]
    tasks = [name for name in TASKS if any(name in run.dev for run in runs)]
    cells, notes = [], list(paraphrase_notes(runs))
    for label, group in rows.items():
        scores = [[r.dev[n].score(n) if n in r.dev else None for r in group] for n in tasks]
        overall, interval, paper = spread([run.overall for run in group]), "–", "–"
        if len(group) == 1:
            interval = "{:.3f} to {:.3f}".format(*bootstrap_interval(group[0].dev))
        if recipe := RECIPES.get(recipe_of(group[0])):
            paper = f"{recipe.paper_score:.3f}" if recipe.paper_score else "–"
            notes.append(f"*{escape(label)}*: {recipe.description}.")
        cells.append([label, str(len(group)), *map(spread, scores), overall, interval, paper])
    if len({dev_files(run) for run in runs}) > 1:
        notes.append("Overall scores of rows with other tasks or dev files are not comparable.")
    metrics = [f"{name} {TASKS[name].metric}" for name in tasks]
    header = ["strategy", "runs", *metrics, "overall", "95 % interval", "paper's overall"]
    caption = (
        "Dev scores by strategy. Overall: mean of the accuracies and (1 + correlation) / 2. "
        "Several runs: mean ± standard deviation over seeds. A single run: 95 % bootstrap interval "
        "of its overall score, its dev examples drawn anew. The paper used bert-base-uncased and "
        "the course's full training data; its best scores are 0.732 on dev and 0.740 on test. "
    )
    return Table(caption + provenance(runs), header, cells, tuple(notes))


def dev_files(run):
    """The tasks of the overall score, each with the hash of its dev file."""
    data = run.description["data"]
    return tuple((name, data[name]["dev"]["sha256"]) for name in overall_tasks(run.dev))


def minutes(run):
    """Minutes from the start to the last logged line."""
    return max(line["seconds"] for line in run.lines) / 60


def median(values):
    """The median, None of no values."""
    return float(np.median(values)) if values else None


# Columns of table 2 that are averaged over seeds: a run's value, None if unknown, and its format.
COSTS = {
    "minutes": (minutes, "{:.1f}"),
    "sentences/s": (lambda run: median(run.logged("sentences_per_s")) or None, "{:,.0f}"),
    "tokens/s": (lambda run: median(run.logged("tokens_per_s")) or None, "{:,.0f}"),
    "peak memory (MiB)": (lambda run: max(run.logged("peak_memory_mib"), default=None), "{:,.0f}"),
}


def batch_of(run):
    """Examples of each task in an optimiser step; if that changes, of the first and last epoch."""
    examples = {name: f["train"]["examples"] for name, f in run.description["data"].items()}
    flags = argparse.Namespace(**run.args)
    plan, texts = make_plan(flags, examples, run.description.get("processes", 1)), {}
    for sizes in (plan.epoch_sizes[0], plan.epoch_sizes[-1]):
        sizes = {name: size * flags.accumulate for name, size in sizes.items()}
        text = ", ".join(f"{size} {name}" for name, size in sizes.items())
        texts[text if len(set(sizes.values())) > 1 else str(min(sizes.values()))] = None
    return " to ".join(texts)


def cost_table(rows):
    """Table 2: time, speed, memory and trained parameters."""
    runs, cells = [run for group in rows.values() for run in group], []
    for label, group in rows.items():
        steps = by_value(group, lambda run: f"{max(line['step'] for line in run.lines):,}")
        costs = [spread([cost(run) for run in group], form) for cost, form in COSTS.values()]
        parameters = [f"{group[0].description['parameters'][key]:,}" for key in ("trained", "all")]
        hardware = by_value(group, lambda run: "{device}, {precision}".format(**run.description))
        cells.append([label, steps, batch_of(group[0]), *costs, *parameters, hardware])
    header = ["strategy", "steps", "batch", *COSTS, "trained parameters", "of all", "hardware"]
    caption = (
        "Cost of training. Batch: examples of each task in an optimiser step, of the first epoch "
        "to the last if sampling is annealed. Minutes: from the "
        "start to the last logged line, evaluations included. Speeds: medians of the logged lines, "
        "without padding; each encoded sequence counts, a jointly encoded pair as one; a dash if a "
        "frozen encoder's sentences were all encoded before the first step. Peak memory: allocated "
        "on a GPU, else of the whole process. "
    )
    return Table(caption + provenance(runs), header, cells)


def shorten(text):
    """A text on one line, of bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1].rstrip() + "…"


def error_table(run, name):
    """The most confident dev errors of one task: text, prediction, truth."""
    task, result, texts = TASKS[name], run.dev[name], dev_texts(run, name)
    columns, missing = task.sentences, ""
    if not texts:
        columns, texts = ["id"], {example: [example] for example in result.ids}
        missing = " The dev file is missing or has changed, so ids are shown instead of texts."
    worst, distance, digits = "most confident", "confidence", 0
    if task.kind == "score":
        worst, distance, digits = "largest", "off by", 2
    cells = []
    for row, by in worst_errors(task, result)[:ERRORS_SHOWN]:
        predicted, truth = f"{result.predictions[row]:.{digits}f}", f"{result.labels[row]:.3g}"
        cells.append([*map(shorten, texts[result.ids[row]]), predicted, truth, f"{by:.2f}"])
    header = [*columns, "predicted", "truth", distance]
    caption = f"The {worst} dev errors of `{run.name}` in {task.title} (`{name}`).{missing}"
    notes = paraphrase_notes([run]) if name == "para" else ()
    return Table(f"{caption} {provenance([run])}", header, cells, notes)


def confusion_table(run, name):
    """Truth by prediction for a task of several classes, counts."""
    from sklearn.metrics import confusion_matrix

    task, result = TASKS[name], run.dev[name]
    classes = range(task.num_classes)
    counts = confusion_matrix(result.labels, result.predictions, labels=classes)
    recalls = [f"{recall:.2f}" for recall in counts.diagonal() / counts.sum(1).clip(1)]
    cells = [[f"truth {i}", *map(str, counts[i]), recalls[i]] for i in classes]
    caption = (
        f"Confusion matrix of `{run.name}` in {task.title} (`{name}`) on dev. Examples by label "
        f"(rows) and prediction (columns), 0 the most negative. {provenance([run])}"
    )
    return Table(caption, ["", *map(str, classes), "recall"], cells)


# ------------------------------------------------------------------------------------ the document


def escape(cell):
    """A cell's text with its Markdown signs escaped."""
    return re.sub(r"([\\|*_`<>\[\]~$#&])", r"\\\1", cell)


def format_table(number, table):
    """A table as Markdown, with caption and notes; columns of numbers are aligned right."""
    rule = "|" + "|".join("---:" if is_number else "---" for is_number in table.numeric) + "|"
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in [table.header, *table.cells]]
    notes = [f"\n{note}" for note in table.notes]
    caption = f"**Table {number}.** {table.caption}"
    return "\n".join([caption, "", lines[0], rule, *lines[1:], *notes, ""])


def format_picture(number, picture, runs):
    """A picture as Markdown, linked to its PDF, with caption."""
    return (
        f"[![{picture.alt}]({picture.name}.png)]({picture.name}.pdf)\n\n"
        f"**Figure {number}.** {picture.caption} {provenance(runs)}\n"
    )


def best_run(runs, name):
    """Of the runs with task `name` and the most tasks, the one with the best overall score."""
    having = [run for run in runs if name in run.dev]
    return max(having, key=lambda run: (len(run.dev), run.overall))


def write_report(runs, folder):
    """Write the report of `runs` (`FinishedRun`) into `folder`; returns its documents' paths."""
    runs = list({Path(run.path).resolve(): run for run in runs}.values())
    names = Counter(run.name for run in runs)
    for run in runs:
        run.is_namesake = names[run.name] > 1
    folder, rows = Path(folder), group_runs(runs)
    tasks = [name for name in TASKS if any(name in run.dev for run in runs)]
    best = {name: best_run(runs, name) for name in tasks}
    pictures = loss_pictures(runs)
    pictures += [scatter_picture(r, n) for n, r in best.items() if TASKS[n].kind == "score"]
    pictures += cosine_pictures(runs)
    write_pictures(pictures, folder)

    tables = {"scores": [scores_table(rows)], "cost": [cost_table(rows)]}
    tables["errors"] = [error_table(run, name) for name, run in best.items()]
    of_classes = {name: run for name, run in best.items() if TASKS[name].kind == "classes"}
    tables["confusion"] = [confusion_table(run, name) for name, run in of_classes.items()]
    numbered = enumerate((table for section in tables.values() for table in section), start=1)
    scores, cost, *errors = (format_table(*pair) for pair in numbered)
    images = [format_picture(number, p, runs) for number, p in enumerate(pictures, start=1)]
    best_names = ", ".join(dict.fromkeys(f"`{run.name}`" for run in best.values()))
    words = ["--report", *(run.path for run in runs)]
    words += [] if folder == Path("report") else ["--report_dir", str(folder)]
    command = shlex.join(["python", "evaluation.py", *words])
    commands = [run.description["expanded_command"] or run.description["command"] for run in runs]
    parts = [
        f"# Report\n\nMade by `{command}`. Each picture links to its PDF.\n",
        f"## Scores\n\n{scores}",
        "\n    ".join(["Commands of the runs:\n", *commands]) + "\n",
        f"## Cost\n\n{cost}",
        "## Figures\n",
        *images,
        f"## Errors\n\nEach task's run with the best overall dev score: {best_names}.\n",
        *errors,
    ]
    about = {"command": command, "commands": commands, "provenance": provenance(runs)}
    page = format_page(about, tables, pictures, runs)
    documents = {folder / "report.md": "\n".join(parts), folder / "report.html": page}
    write_files(documents)
    return list(documents)
