"""Tables and figures of one or more runs, from their folders alone: no model is loaded.

    python evaluation.py --report runs/LoRA runs/full-model

Writes report/report.md with the paper's tables 1 to 5, its figures 1 to 4 and two that it lacks,
each as PNG and PDF. Scores come from a run's `predictions/`, times and losses from its
`metrics.jsonl`, everything else from `run.json`.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arguments import FREE_WHEN_CONTINUING, OF_ONE_COMMAND, SPLITS, flags_of
from base_bert import file_sha256
from config import RECIPES, TASKS, UserError, overall_tasks
from datasets import read_task_file
from run_folder import output_errors, write_file

BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 1000, 224
ERRORS_SHOWN = 8
LONGEST_TEXT = 160  # characters of a sentence in a table
# Flags in which the runs of one row may differ: names and places, whose content is compared.
NAMES = {"seed", "model_file_suffix", "recipe", "pretrained", "data_dir", "expanded_command"}
NAMES |= {f"{task}_{split}" for task in TASKS for split in SPLITS}
NAMES |= FREE_WHEN_CONTINUING | OF_ONE_COMMAND


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
        """Name of its recipe, None without one or where another flag took a recipe's place."""
        name = self.args.get("recipe")
        flags = RECIPES[name].flags if name in RECIPES else {}
        return name if all(self.args.get(flag) == flags[flag] for flag in flags) else None

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
        flags = flags_of(run.description)  # in one order, with those that a later version added
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
    data = run.description["data"]
    folders = [Path(file["path"]).parent for of_task in data.values() for file in of_task.values()]
    sample = any(folder.parts[-2:] == ("data", "sample") for folder in folders)
    kind = "the **generated sample**" if sample else "the files named in `run.json`, no sample"
    counts = (f"{name} {of_task['train']['examples']:,}" for name, of_task in data.items())
    return f"{kind}; training examples: {', '.join(counts)}"


def provenance(runs):
    """The end of every caption: encoder, substituted or not, and data, sample or not."""
    return f"Encoder: {by_value(runs, describe_encoder)}. Data: {by_value(runs, describe_data)}."


def paraphrase_notes(runs):
    """What has to stand beside every paraphrase score."""
    runs, notes = [run for run in runs if "para" in run.dev], []
    seen = [run.description["data"]["para"]["train"]["examples"] for run in runs]
    if seen and max(seen) < 200_000:
        notes.append(f"Paraphrase: training saw {max(seen):,} pairs, the paper's some 283,000.")
    if any("MiniLM" in run.description["encoder"]["name"] for run in runs):
        notes.append(
            "all-MiniLM-L6-v2 was itself trained contrastively on Quora duplicates (its model "
            "card), which flatters its paraphrase score by an unknown amount."
        )
    return tuple(notes)


# ---------------------------------------------------------------------------------- tables 1 and 2


def bootstrap_interval(results, draws=BOOTSTRAP_DRAWS, seed=BOOTSTRAP_SEED):
    """95 % interval of the overall score when each task's dev examples are drawn anew."""
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
    tasks = [name for name in TASKS if any(name in run.dev for run in runs)]
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
            batch_sizes(group[0].args),
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


def batch_sizes(args):
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


# ----------------------------------------------------------------------------------------- figures

# Okabe and Ito's palette, told apart by colour-blind readers too, without its pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv"
STYLE = {"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
         "axes.spines.right": False, "savefig.dpi": 150}  # fmt: skip
LEGEND = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 10}
LOSSES = {"classes": "cross entropy (nats)", "binary": "logistic loss (nats)",
          "score": "squared error (label points²)"}  # fmt: skip


class Picture(NamedTuple):
    """A figure: its file name without ending, what it shows, and how to draw it."""

    name: str
    alt: str
    caption: str
    size: tuple  # inches
    draw: Callable  # of a matplotlib `Figure`


def looks_of(runs):
    """(colour, marker, legend label) of each run; of many runs, those of one row share them."""
    labels = [run.row if len(runs) > len(COLOURS) else run.name for run in runs]
    distinct = list(dict.fromkeys(labels))
    looks = []
    for label in labels:
        cycle, place = divmod(distinct.index(label), len(COLOURS))
        looks.append((COLOURS[place], MARKERS[cycle % len(MARKERS)], label))
    return looks


def smooth(values, reach):
    """Mean of each value and `reach` neighbours on either side, of fewer on both near an end."""
    last = len(values) - 1
    reaches = (min(reach, i, last - i) for i in range(len(values)))
    return [np.mean(values[i - r : i + r + 1]) for i, r in enumerate(reaches)]


def plot_smoothed(axes, steps, values, colour, **settings):
    """Raw values, pale, and over them their moving average over a tenth of the curve."""
    means = smooth(values, -(-len(values) // 20))
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    return axes.plot(steps, means, color=colour, linewidth=1.8, **settings)[0]


def loss_curves(run, tasks):
    """(steps, summed losses of `tasks`) in training, and the same on dev."""
    curves = {"train": ([], []), "eval": ([], [])}
    for line in run.lines:
        losses = line.get("losses") or {name: dev["loss"] for name, dev in line["dev"].items()}
        curves[line["kind"]][0].append(line["step"])
        curves[line["kind"]][1].append(sum(losses[name] for name in tasks))
    return curves.values()


def draw_losses(figure, runs, tasks, unit):
    """Training loss, smoothed over raw, and dev loss of every run."""
    axes, handles = figure.subplots(), {}
    for run, (colour, marker, label) in zip(runs, looks_of(runs), strict=True):
        training, dev = loss_curves(run, tasks)
        handles.setdefault(label, plot_smoothed(axes, *training, colour))
        axes.plot(*dev, color=colour, linestyle="--", marker=marker, markersize=4.5, linewidth=1.2)
    handles["training (raw: pale)"] = axes.plot([], [], color="gray", linewidth=1.8)[0]
    handles["dev"] = axes.plot([], [], "--o", color="gray", markersize=4.5, linewidth=1.2)[0]
    axes.set(xlabel="optimiser steps", ylabel=unit, xlim=(0, None))
    figure.legend(handles.values(), handles, **LEGEND)


def loss_pictures(runs):
    """Figures 1 to 4: the tasks' summed loss, then each task's."""
    tasks = [name for name in ("para", "sts", "sst", "cfimdb") if any(name in r.dev for r in runs)]
    what = f"Sum of the task losses ({', '.join(tasks)}; without SimCSE and R-Drop)"
    shown = [("overall", what, tasks, "sum of the task losses")]
    for name in tasks:
        title = f"{TASKS[name].title.capitalize()} loss ({name})"
        shown.append((name, title, [name], LOSSES[TASKS[name].kind]))
    pictures = []
    for name, title, summed, unit in shown:
        having = [run for run in runs if set(summed) <= set(run.dev)]
        caption = f"{title} in training (solid: smoothed, pale: as logged) and on dev (dashed)."
        alt = f"{title} against optimiser steps, one curve per run"
        draw = partial(draw_losses, runs=having, tasks=summed, unit=unit)
        pictures.append(Picture(f"loss-{name}", alt, caption, (8, 5), draw))
    return pictures


def draw_scatter(figure, run, name):
    """Predicted against true scores; labels are spread a little sideways to show their number."""
    task, result = TASKS[name], run.dev[name]
    spread_out = np.random.default_rng(0).uniform(-0.06, 0.06, len(result.labels))
    axes = figure.subplots()
    axes.scatter(result.labels + spread_out, result.predictions, s=16, alpha=0.4, linewidths=0,
                 color=COLOURS[0], label="one dev pair")  # fmt: skip
    ends = [task.low, task.high]
    axes.plot(ends, ends, color="black", linewidth=1, label="predicted = true")
    unit = f"{task.title} ({task.low:g} to {task.high:g})"
    axes.set(xlabel=f"true {unit}", ylabel=f"predicted {unit}", aspect="equal")
    figure.legend(**LEGEND)


def scatter_picture(run, name):
    """Figure 5: what is predicted against what is true."""
    title, metrics = TASKS[name].title, run.dev[name].metrics
    caption = (
        f"{title.capitalize()} on dev, predicted by `{run.name}` against true: Pearson "
        f"{metrics['pearson']:.3f}, Spearman {metrics['spearman']:.3f}. Labels are spread by ±0.06."
    )
    alt = f"Scatter plot of predicted against true {title} with the line where both are equal"
    draw = partial(draw_scatter, run=run, name=name)
    return Picture(f"{name}-scatter", alt, caption, (6, 6), draw)


def draw_cosines(figure, runs, keys):
    """Cosine of each pair of tasks' gradients over time, a panel for each run."""
    panels = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, run in zip(panels, runs, strict=True):
        for key, colour in zip(keys, COLOURS, strict=False):
            label = key.removeprefix("cosine ").replace(" ", " and ")
            steps = [line["step"] for line in run.lines if key in line]
            label = label if axes is panels[0] else None
            plot_smoothed(axes, steps, run.logged(key), colour, label=label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(run.name, fontsize=11)
        axes.set(ylabel="cosine", xlim=(0, None))
    panels[-1].set_xlabel("optimiser steps")
    figure.legend(**LEGEND)


def cosine_pictures(runs):
    """Figure 6, where gradient surgery logged it: how far the tasks' gradients conflict."""
    runs = [run for run in runs if run.logged("conflicts")]
    if not runs:
        return []
    keys = {key for run in runs for line in run.lines for key in line if key.startswith("cosine ")}
    shares = (f"`{run.name}` {np.mean(run.logged('conflicts')):.0%}" for run in runs)
    caption = (
        "Cosine of the encoder's gradients of two tasks (solid: smoothed, pale: as logged); below "
        f"0 they conflict. Share of conflicting pairs over all steps: {', '.join(shares)}."
    )
    alt = "Cosine of the gradients of each pair of tasks against optimiser steps"
    draw = partial(draw_cosines, runs=runs, keys=sorted(keys))
    return [Picture("gradient-cosines", alt, caption, (8, 1.2 + 2.4 * len(runs)), draw)]


def write_pictures(pictures, folder):
    """Draw each picture as PNG and PDF."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without a window system: its canvas is Agg's

    for picture in pictures:
        with rc_context(STYLE), output_errors(folder / f"{picture.name}.png"):
            folder.mkdir(parents=True, exist_ok=True)
            figure = Figure(figsize=picture.size, layout="constrained")
            picture.draw(figure)
            figure.savefig(folder / f"{picture.name}.png")
            figure.savefig(folder / f"{picture.name}.pdf", metadata={"CreationDate": None})


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


def write_report(runs, folder):
    """Write the report of `runs` (a list of `Run`) into `folder`; returns `report.md`'s path."""
    runs = list({Path(run.path).resolve(): run for run in runs}.values())
    folder, rows = Path(folder), group_runs(runs)
    best = max(runs, key=lambda run: run.overall)
    pictures = loss_pictures(runs)
    pictures += [scatter_picture(best, name) for name in best.dev if TASKS[name].kind == "score"]
    pictures += cosine_pictures(runs)
    write_pictures(pictures, folder)

    tables = [scores_table(rows), cost_table(rows)]
    tables += [error_table(best, name) for name in TASKS if name in best.dev]
    tables += [confusion_table(best, n) for n in best.dev if TASKS[n].kind == "classes"]
    scores, cost, *errors = (format_table(*numbered) for numbered in enumerate(tables, start=1))
    images = [format_picture(number, p, runs) for number, p in enumerate(pictures, start=1)]
    command = shlex.join(["python", "evaluation.py", "--report", *(run.path for run in runs)])
    commands = (r.description.get("expanded_command") or r.description["command"] for r in runs)
    write_file(folder / "report.md", "\n".join([
        "# Report\n", f"Made by `{command}`. A picture leads to its PDF.\n",
        "## Scores\n", scores, "The runs' commands:\n", *(f"    {c}" for c in commands), "",
        "## Cost\n", cost, "## Figures\n", *images,
        "## Errors\n", f"Of the run with the best dev score, `{best.name}`.\n", *errors,
    ]))  # fmt: skip
    return folder / "report.md"
