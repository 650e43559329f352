"""Tables and figures of one or more runs, from their folders alone: no model is loaded.

    python evaluation.py --report runs/LoRA runs/full-model

Writes report/report.md with the paper's tables 1 to 5, its figures 1 to 4 and two that it lacks,
each as PNG and PDF. Scores come from a run's `predictions/`, times and losses from its
`metrics.jsonl`, everything else from `run.json`.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arguments import FREE_WHEN_CONTINUING, OF_ONE_COMMAND, SPLITS, flags_of, uses_sample
from base_bert import file_sha256
from config import RECIPES, TASKS, UserError, overall_tasks
from datasets import read_task_file
from figures import cosine_pictures, loss_pictures, scatter_picture, write_pictures
from run_folder import write_file

BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 1000, 224
ERRORS_SHOWN = 8
LONGEST_TEXT = 160  # characters of a sentence in a table
# Flags in which the runs of one row may differ: names and places, whose content is compared.
NAMES = {"seed", "model_file_suffix", "recipe", "pretrained", "data_dir", "expanded_command"}
NAMES |= {f"{task}_{split}" for task in TASKS for split in SPLITS}
NAMES |= FREE_WHEN_CONTINUING | OF_ONE_COMMAND
# Flags of the training budget: a run that differs in these alone is still that row of the paper.
BUDGET = {"epochs", "steps_per_epoch", "patience", "batch_size", "task_batch_sizes", "accumulate",
          "lr", "head_lr", "precision", "deterministic", "calibration_examples"}  # fmt: skip


@dataclass
class Run:
    """What a report needs of one run."""

    path: str
    description: dict  # run.json
    lines: list  # of metrics.jsonl
    dev: dict  # task -> results of the best model: ids, labels, predictions, scores, metrics
    overall: float  # its score on dev
    row: str = ""  # label of its row in the tables: those of several seeds share one

    @property
    def name(self):
        """The folder's name."""
        return Path(self.path).resolve().name

    @property
    def args(self):
        """The flags of the run."""
        return self.description["args"]

    @property
    def recipe(self):
        """Name of its recipe, None without one or where other flags make it another strategy."""
        name = self.args.get("recipe")
        if name not in RECIPES:
            return None
        own, recipe = flags_of(self.description), RECIPES[name].flags
        expected = flags_of({"args": recipe})
        flags = recipe.keys() | (expected.keys() - NAMES - BUDGET)
        return name if all(own[flag] == expected[flag] for flag in flags) else None

    def logged(self, key):
        """Values of `key` in the training lines, as far as they have it."""
        return [line[key] for line in self.lines if line["kind"] == "train" and key in line]


class Table(NamedTuple):
    """A table: plain cells; caption and notes are Markdown."""

    caption: str
    header: list
    cells: list
    notes: tuple = ()


# -------------------------------------------------------------------------------- rows, provenance


def group_runs(runs):
    """The rows of the tables: label -> runs that differ only in seed and name."""
    groups = {}
    for run in runs:
        flags = flags_of(run.description)
        flags = {name: value for name, value in flags.items() if name not in NAMES}
        files = [file["sha256"] for of_task in run.description["data"].values()
                 for file in of_task.values()]  # fmt: skip
        same = (flags, files, run.description["encoder"]["sha256"], run.description["precision"])
        groups.setdefault(repr(same), []).append(run)
    recipes = [group[0].recipe for group in groups.values()]
    rows = {}
    for group, recipe in zip(groups.values(), recipes, strict=True):
        label = group[0].name
        if recipe and recipes.count(recipe) == 1:
            label = recipe
        elif len(group) > 1:
            label = re.sub(r"[-_.]?(seed|s)?\d+$", "", label)
        label = group[0].path if label in rows else label
        rows[label] = group
        for run in group:
            run.row = label
    return rows


def tasks_of(runs):
    """The tasks that any of the runs has, in the tables' order."""
    return [name for name in TASKS if any(name in run.dev for run in runs)]


def by_value(runs, describe):
    """`describe(run)` of all runs as text: once where all agree, else each with its runs."""
    found = {}
    for run in runs:
        found.setdefault(describe(run), []).append(run.name)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in found.items())


def describe_encoder(run):
    """Name of the encoder, and whether it stands in for another."""
    encoder = run.description["encoder"]
    stand_in = "**substituted**, since bert-base-uncased could not be reached"
    return f"`{encoder['name']}` ({stand_in if encoder['substituted'] else 'as asked for'})"


def describe_data(run):
    """Whether the data is the generated sample, and how much of it there was for training."""
    sample, data = uses_sample(run.description), run.description["data"].items()
    kind = "the **generated sample**" if sample else "the files named in `run.json`, no sample"
    counts = (f"{name} {of_task['train']['examples']:,}" for name, of_task in data)
    return f"{kind}; training examples: {', '.join(counts)}"


def provenance(runs):
    """The end of every caption: encoder, substituted or not, and data, sample or not."""
    return f"Encoder: {by_value(runs, describe_encoder)}. Data: {by_value(runs, describe_data)}."


def paraphrase_notes(runs):
    """What has to stand beside every paraphrase score."""
    runs, notes = [run for run in runs if "para" in run.dev], []
    seen = [run.description["data"]["para"]["train"]["examples"] for run in runs]
    if few := [number for number in seen if number < 200_000]:
        counts = " and ".join(f"{number:,}" for number in sorted(set(few)))
        notes.append(f"Paraphrase: training saw {counts} pairs, the paper's some 283,000.")
    if any("MiniLM" in run.description["encoder"]["name"] for run in runs):
        notes.append(
            "all-MiniLM-L6-v2 was itself trained contrastively on Quora duplicates (its model "
            "card), which flatters its paraphrase score by an unknown amount."
        )
    return tuple(notes)


# ---------------------------------------------------------------------------------- tables 1 and 2


def bootstrap_interval(results, draws=BOOTSTRAP_DRAWS, seed=BOOTSTRAP_SEED):
    """95 % interval of the overall score when each task's dev examples are drawn anew.

    The percentile bootstrap (Efron 1979) over `draws` draws: an array of its two ends, (2,).
    """
    generator = np.random.default_rng(seed)
    scores = []
    for name in overall_tasks(results):
        x, y = (np.asarray(v, float) for v in (results[name].predictions, results[name].labels))
        rows = generator.integers(0, len(x), size=(draws, len(x)))
        if TASKS[name].kind == "score":
            scores.append((1 + correlations(x[rows], y[rows])) / 2)
        else:
            scores.append((x == y)[rows].mean(1))
    return np.quantile(np.mean(scores, axis=0), [0.025, 0.975])


def correlations(x, y):
    """Pearson correlation of each row of x and of y, (draws, n) -> (draws,); 0 if undefined."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    size = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.divide((x * y).sum(1), size, out=np.zeros(len(x)), where=size > 0)


def spread(values, form="{:.3f}"):
    """One value, or mean ± standard deviation (n - 1) of several; a dash where one is missing."""
    if not values or None in values:
        return "–"
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(np.std(values, ddof=1))}"


def scores_table(rows):
    """Table 1: dev scores by strategy, the paper's overall beside ours."""
    runs = [run for group in rows.values() for run in group]
    tasks = tasks_of(runs)
    header = ["strategy", "runs", *(f"{name} {TASKS[name].metric}" for name in tasks), "overall",
              "95 % interval", "paper's overall"]  # fmt: skip
    cells, notes = [], []
    for label, group in rows.items():
        scores = [
            [run.dev[name].score(name) if name in run.dev else None for run in group]
            for name in tasks
        ]
        interval = "–"
        if len(group) == 1:
            interval = "{:.3f} to {:.3f}".format(*bootstrap_interval(group[0].dev))
        recipe = RECIPES.get(group[0].recipe)
        paper = f"{recipe.paper:.3f}" if recipe and recipe.paper else "–"
        overall = spread([run.overall for run in group])
        cells.append([label, str(len(group)), *map(spread, scores), overall, interval, paper])
        if recipe:
            notes.append(f"*{escape(label)}*: {recipe.reading}.")
    if len({tuple(overall_tasks(run.dev)) for run in runs}) > 1:
        notes.append("Overall scores of rows with different tasks are not comparable.")
    caption = (
        "Dev scores by strategy. Overall: mean of the accuracies and (1 + correlation) / 2. "
        "Several runs: mean ± standard deviation over seeds; a single run: 95 % bootstrap interval "
        "of its overall, its dev examples drawn anew. The paper's figures are those of "
        "bert-base-uncased with the course's full training data; its best is 0.732 on dev and "
        f"0.740 on test. {provenance(runs)}"
    )
    return Table(caption, header, cells, (*paraphrase_notes(runs), *notes))


def cost_table(rows):
    """Table 2: time, speed, memory and trained parameters."""
    runs = [run for group in rows.values() for run in group]
    header = ["strategy", "steps", "batch", "minutes", "sentences/s", "tokens/s",
              "peak memory (MiB)", "trained parameters", "of all", "hardware"]  # fmt: skip
    cells = []
    for label, group in rows.items():
        parameters = group[0].description.get("parameters", {})
        memory = [max(run.logged("peak_memory_mib"), default=None) for run in group]
        cells.append([
            label,
            f"{max([0, *group[0].logged('step')]):,}",
            examples_a_step(group[0].args),
            spread([minutes(run) for run in group], "{:.1f}"),
            spread([median(run.logged("sentences_per_s")) or None for run in group], "{:,.0f}"),
            spread([median(run.logged("tokens_per_s")) or None for run in group], "{:,.0f}"),
            spread(memory, "{:,.0f}"),
            *(f"{parameters[key]:,}" if key in parameters else "–" for key in ("trained", "all")),
            by_value(group, lambda run: "{device}, {precision}".format(**run.description)),
        ])  # fmt: skip
    caption = (
        "What it cost. Batch: examples of each task in an optimiser step. Minutes: from the start "
        "to the last logged line, evaluations included. Speeds: medians of the logged lines, "
        "without padding; each encoded sequence counts, a jointly encoded pair as one; "
        "a dash where a frozen encoder's sentences were all encoded before the first step. Peak "
        f"memory: allocated on a GPU, else of the whole process. {provenance(runs)}"
    )
    return Table(caption, header, cells)


def examples_a_step(args):
    """Examples of each task in an optimiser step, as text: one number where all are the same."""
    sizes = args.get("batch_sizes") or dict.fromkeys(args["tasks"], args["batch_size"])
    sizes = {name: size * args["accumulate"] for name, size in sizes.items()}
    if len(set(sizes.values())) == 1:
        return str(next(iter(sizes.values())))
    return ", ".join(f"{size} {name}" for name, size in sizes.items())


def minutes(run):
    """Minutes from the start to the last logged line, None where a line lacks its time."""
    seconds = [line.get("seconds") for line in run.lines]
    return None if not seconds or None in seconds else max(seconds) / 60


def median(values):
    """The median, None of no values."""
    return float(np.median(values)) if values else None


# -------------------------------------------------------------------------- tables 3 to 5: errors


def worst_errors(task, result):
    """The most confident errors, worst first: (row, probability of the wrong answer).

    For a score it is the largest distances from the label.
    """
    scores = result.scores
    if task.kind == "score":
        wrong = np.abs(result.predictions - result.labels)
    else:
        sure = scores.max(1) if task.kind == "classes" else np.maximum(scores, 1 - scores)[:, 0]
        wrong = np.where(result.predictions == result.labels, 0, sure)
    order = [row for row in np.argsort(-wrong, kind="stable") if wrong[row] > 0]
    return [(int(row), float(wrong[row])) for row in order[:ERRORS_SHOWN]]


def dev_texts(run, name):
    """Sentences by id from the run's dev file, None where it is not there as it was."""
    file = run.description["data"][name]["dev"]
    try:
        if file_sha256(file["path"]) == file["sha256"]:
            examples = read_task_file(file["path"], TASKS[name], "dev").examples
            return {example.id: example.sentences for example in examples}
    except (OSError, UserError):
        pass
    return None


def error_table(run, name):
    """The most confident dev errors of one task: text, prediction, truth."""
    task, result, texts = TASKS[name], run.dev[name], dev_texts(run, name)
    is_score = task.kind == "score"
    cells = [
        [
            *map(shorten, texts[result.ids[row]] if texts else [result.ids[row]]),
            f"{result.predictions[row]:.{2 if is_score else 0}f}",
            f"{result.labels[row]:.3g}",
            f"{by:.2f}",
        ]
        for row, by in worst_errors(task, result)
    ]
    header = [*(task.sentences if texts else ["id"]), "predicted", "truth"]
    missing = "" if texts else " The dev file is not there as it was: ids stand for the texts."
    caption = (
        f"The {'largest' if is_score else 'most confident'} dev errors of `{run.name}` in "
        f"{task.title} (`{name}`).{missing} {provenance([run])}"
    )
    notes = paraphrase_notes([run]) if name == "para" else ()
    return Table(caption, [*header, "off by" if is_score else "probability"], cells, notes)


def confusion_table(run, name):
    """Truth by prediction for a task of several classes, counts."""
    task, result = TASKS[name], run.dev[name]
    counts = np.zeros((task.num_classes, task.num_classes), dtype=int)
    np.add.at(counts, (result.labels.astype(int), result.predictions.astype(int)), 1)
    recall = counts.diagonal() / counts.sum(1).clip(1)
    cells = [
        [f"truth {label}", *map(str, row), f"{right:.2f}"]
        for label, (row, right) in enumerate(zip(counts, recall, strict=True))
    ]
    caption = (
        f"Confusion matrix of `{run.name}` in {task.title} (`{name}`) on dev: examples by label "
        f"(rows) and prediction (columns), 0 the most negative. {provenance([run])}"
    )
    return Table(caption, ["", *map(str, range(task.num_classes)), "recall"], cells)


def shorten(text):
    """A text of one line and bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1].rstrip() + "…"


# ------------------------------------------------------------------------------------ the document


def escape(cell):
    """A cell's text such that Markdown shows it as it is."""
    return re.sub(r"([\\|*_`<>\[\]~$#&])", r"\\\1", cell)


def format_table(number, table):
    """A table with caption and notes; columns of numbers are aligned right."""
    columns = zip(*table.cells, strict=True) if table.cells else [[]] * len(table.header)
    numeric = [all(re.match(r"[-–\d]", cell) for cell in column) for column in columns]
    header, *cells = (
        "| " + " | ".join(map(escape, row)) + " |" for row in [table.header, *table.cells]
    )
    rule = "|" + "|".join("---:" if is_number else "---" for is_number in numeric) + "|"
    lines = [f"**Table {number}.** {table.caption}", "", header, rule, *cells]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes), ""])


def format_picture(number, picture, runs):
    """A picture, linked to its PDF, and caption."""
    return (
        f"[![{picture.alt}]({picture.name}.png)]({picture.name}.pdf)\n\n"
        f"**Figure {number}.** {picture.caption} {provenance(runs)}\n"
    )


def best_run(runs, name):
    """Of the runs with task `name`, and of these those with most tasks, the best by overall."""
    having = [run for run in runs if name in run.dev]
    return max(having, key=lambda run: (len(run.dev), run.overall))


def write_report(runs, folder):
    """Write the report of `runs` (a list of `Run`) into `folder`; returns `report.md`'s path."""
    runs = list({Path(run.path).resolve(): run for run in runs}.values())
    folder, rows = Path(folder), group_runs(runs)
    tasks = tasks_of(runs)
    best = {name: best_run(runs, name) for name in tasks}
    pictures = loss_pictures(runs)
    pictures += [scatter_picture(best[n], n) for n in tasks if TASKS[n].kind == "score"]
    pictures += cosine_pictures(runs)
    write_pictures(pictures, folder)

    tables = [scores_table(rows), cost_table(rows)]
    tables += [error_table(best[name], name) for name in tasks]
    tables += [confusion_table(best[n], n) for n in tasks if TASKS[n].kind == "classes"]
    scores, cost, *errors = (format_table(*numbered) for numbered in enumerate(tables, start=1))
    images = [format_picture(number, p, runs) for number, p in enumerate(pictures, start=1)]
    errors_of = ", ".join(dict.fromkeys(f"`{run.name}`" for run in best.values()))
    command = shlex.join(["python", "evaluation.py", "--report", *(run.path for run in runs)])
    commands = (r.description.get("expanded_command") or r.description["command"] for r in runs)
    write_file(folder / "report.md", "\n".join([
        "# Report\n", f"Made by `{command}`. A picture leads to its PDF.\n",
        "## Scores\n", scores, "The runs' commands:\n", *(f"    {c}" for c in commands), "",
        "## Cost\n", cost, "## Figures\n", *images,
        "## Errors\n", f"Of the run with the best dev score, {errors_of}.\n", *errors,
    ]))  # fmt: skip
    return folder / "report.md"
