"""The report's figures, as PNG and PDF.

The paper's figures are the losses in training and on dev. Two are new: similarity predicted against
true, and the cosines of the tasks' gradients. A run here is an `ensemble.FinishedRun`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from statistics import median_low
from textwrap import fill
from typing import NamedTuple

import numpy as np

from config import TASKS
from runtime.files import output_errors

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv"
AXES = {"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False}
STYLE = AXES | {"font.size": 11, "grid.alpha": 0.3, "savefig.dpi": 150}
LEGEND = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 10}
PAPERS_ORDER = tuple(dict.fromkeys(("para", "sts", "sst", *TASKS)))
LOSSES = {"classes": "cross entropy (nats)", "binary": "logistic loss (nats)"}
LOSSES |= {"score": "squared error (label points²)"}


@dataclass
class Curve:
    """A run's or a pair of tasks' values over steps; of a scatter plot, its points."""

    name: str
    look: tuple  # colour, marker and legend label; the runs of one row may share them
    steps: list
    values: list  # as logged
    means: list  # smoothed
    dev: tuple = ((), ())  # steps and losses on dev


@dataclass
class Panel:
    """What one pair of axes shows."""

    title: str
    xlabel: str
    ylabel: str
    curves: list
    limits: tuple  # of the y axis; what lies beyond is drawn at the edge
    is_log: bool = False
    note: str = ""


class Picture(NamedTuple):
    """A figure: its file name without ending, what it shows, and how to draw it."""

    name: str
    alt: str
    caption: str
    size: tuple  # inches
    draw: Callable  # takes a matplotlib `Figure`
    panels: tuple = ()  # what it draws, for `report.html`


def write_pictures(pictures, folder):
    """Draw each picture as PNG and PDF. Raises `OutputError`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # draws without a window system

    for picture in pictures:
        path = folder / f"{picture.name}.png"
        with rc_context(STYLE), output_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            figure = Figure(figsize=picture.size, layout="constrained")
            picture.draw(figure)
            figure.savefig(path)
            figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def plot_curve(axes, curve, limits):
    """Plot raw values (pale), their moving average (solid, with a mark) and dev (dashed)."""
    colour, marker, _ = curve.look
    raw, means, dev = (np.clip(y, *limits) for y in (curve.values, curve.means, curve.dev[1]))
    marks = {"marker": marker, "markersize": 4.5, "color": colour}
    axes.plot(curve.steps, raw, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(curve.dev[0], dev, linestyle="--", linewidth=1.2, **marks)
    return axes.plot(curve.steps, means, linewidth=1.8, markevery=[-1], **marks)[0]


def smooth(values, reach):
    """Centred moving average, over `reach` values on each side and fewer near the ends."""
    last = len(values) - 1
    reaches = (min(reach, i, last - i) for i in range(len(values)))
    return [np.mean(values[i - r : i + r + 1]) for i, r in enumerate(reaches)]


def smoothed_curve(name, look, steps, values, dev=((), ())):
    """A `Curve` with its moving average over a tenth of it."""
    return Curve(name, look, steps, values, smooth(values, -(-len(values) // 20)), dev)


def loss_pictures(runs):
    """The paper's figures: the summed loss of the tasks that all runs have, then each task's."""
    tasks = [name for name in PAPERS_ORDER if any(name in run.dev for run in runs)]
    shared = [name for name in tasks if all(name in run.dev for run in runs)]
    groups = ({"overall": shared} if shared else {}) | {name: [name] for name in tasks}
    pictures = []
    for name, summed in groups.items():
        having = [run for run in runs if set(summed) <= set(run.dev)]
        title = f"Sum of the task losses ({', '.join(summed)}; without auxiliary losses)"
        unit = "sum of the task losses"
        if name in TASKS:
            title = f"{TASKS[name].title.capitalize()} loss ({name})"
            unit = LOSSES[TASKS[name].kind]
        caption = f"{title} in training (solid: smoothed, pale: as logged) and on dev (dashed)."
        alt = f"{title} against optimiser steps, one curve per run"
        panel = loss_panel(having, summed, unit)
        draw = partial(draw_losses, panel=panel)
        pictures.append(Picture(f"loss-{name}", alt, caption, (8, 5), draw, (panel,)))
    return pictures


def loss_panel(runs, tasks, unit):
    """Training loss and dev loss of every run, and which of them leave the axis."""
    curves = []
    for run, look in zip(runs, looks_of(runs), strict=True):
        training, dev = loss_curves(run, tasks)
        curves.append(smoothed_curve(run.name, look, *training, dev))
    low, high = limits = loss_limits(curves)
    reached = {}
    for curve in curves:
        reached.setdefault(curve.look[2], []).extend((*curve.values, *curve.dev[1]))
    beyond = [f"{name} (up to {max(y):.3g})" for name, y in reached.items() if max(y) > high]
    beyond += [f"{name} (down to {min(y):.3g})" for name, y in reached.items() if min(y) < low]
    note = f"Drawn at the edge, beyond the axis: {', '.join(beyond)}" if beyond else ""
    is_log = high > 5 * low  # in a narrower range a logarithmic axis would have few labels
    unit += ", logarithmic" if is_log else ""
    return Panel("", "optimiser steps", unit, curves, limits, is_log, note)


def loss_limits(curves):
    """Ends of the loss axis: around the median run's losses after the first quarter of its steps.

    Up to 1.3 times its largest, so that one bad run or the first steps do not squeeze the others;
    down to a tenth of its smallest.
    """
    kept = [[*curve.means[len(curve.means) // 4 :], *curve.dev[1]] for curve in curves]
    shown = [loss for curve in curves for loss in (*curve.values, *curve.dev[1])]
    low, high = median_low(map(min, kept)) / 10, median_low(map(max, kept)) * 1.3
    return max(low, min(shown), 1e-6), min(high, max(shown))


def draw_losses(figure, panel):
    """Draw a `loss_panel`, with a legend of every look and its steps."""
    axes, handles, steps = figure.subplots(), {}, {}
    for curve in panel.curves:
        label, last = curve.look[2], max([*curve.steps, *curve.dev[0]])
        handles[label] = plot_curve(axes, curve, panel.limits)
        steps[label] = max(last, steps.get(label, 0))
    labels = [f"{label} ({steps[label]:,} steps)" for label in handles]
    keys = [axes.plot([], [], style, color="gray", markersize=4.5)[0] for style in ("-", "--o")]
    labels += ["training (raw: pale)", "dev"]
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, xlim=(0, None))
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        # Between powers of 10, only ticks that begin with 2 or 5 have a label.
        axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.set_title(fill(panel.note, 95, break_on_hyphens=False), fontsize=10, loc="left")
    columns = max(1, min(3, 95 // (max(map(len, labels)) + 8)))  # about 95 characters fit
    figure.set_figheight(4.4 + 0.22 * len(labels) / columns)
    figure.legend([*handles.values(), *keys], labels, **LEGEND | {"ncols": columns})


def looks_of(runs):
    """(colour, marker, legend label) of each run; of many runs, those of one row share them."""
    labels = [run.row if len(runs) > len(COLOURS) else run.name for run in runs]
    looks = zip(dict.fromkeys(labels), cycle(product(MARKERS, COLOURS)), strict=False)
    look_of = {label: (colour, marker, label) for label, (marker, colour) in looks}
    return [look_of[label] for label in labels]


def loss_curves(run, tasks):
    """(steps, summed losses of `tasks`) in training, and the same on dev."""
    curves = {"train": ([], []), "eval": ([], [])}
    for line in run.lines:
        losses = line.get("losses") or {name: dev["loss"] for name, dev in line["dev"].items()}
        curves[line["kind"]][0].append(line["step"])
        curves[line["kind"]][1].append(sum(losses[name] for name in tasks))
    return curves.values()


def scatter_picture(run, name):
    """Predicted against true scores of one run."""
    task, result, metrics = TASKS[name], run.dev[name], run.dev[name].metrics
    random = np.random.default_rng(0)  # spreads equal labels, to show their number
    labels = result.labels + random.uniform(-0.06, 0.06, len(result.labels))
    points = Curve(name, (COLOURS[0], "o", "one dev pair"), labels, result.predictions, [])
    unit, ends = f"{task.title} ({task.low:g} to {task.high:g})", (task.low, task.high)
    panel = Panel(run.name, f"true {unit}", f"predicted {unit}", [points], ends)

    def draw(figure):
        dots = {"s": 16, "alpha": 0.4, "linewidths": 0, "color": COLOURS[0]}
        axes = figure.subplots()
        axes.scatter(labels, result.predictions, label="one dev pair", **dots)
        axes.plot(ends, ends, color="black", linewidth=1, label="predicted = true")
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, aspect="equal")
        axes.set_title(panel.title, fontsize=11)
        figure.legend(**LEGEND)

    caption = (
        f"{task.title.capitalize()} on dev, predicted by `{run.name}` against true: Pearson "
        f"{metrics['pearson']:.3f}, Spearman {metrics['spearman']:.3f}. Labels are spread by ±0.06."
    )
    alt = f"Scatter plot of predicted against true {task.title} with the line where both are equal"
    return Picture(f"{name}-scatter", alt, caption, (6, 6), draw, (panel,))


def cosine_pictures(runs):
    """If a run has gradient surgery: how far the tasks' gradients conflict."""
    keys = sorted({key for run in runs for line in run.lines for key in line if "cosine" in key})
    runs = [run for run in runs if any(map(run.logged, keys))]
    if not runs:
        return []
    panels = [cosine_panel(run, keys) for run in runs]

    def draw(figure):
        drawn = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
        handles = {}
        for axes, panel in zip(drawn, panels, strict=True):
            handles |= {c.name: plot_curve(axes, c, panel.limits) for c in panel.curves}
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_title(panel.title, fontsize=11)
            axes.set(ylabel=panel.ylabel, xlim=(0, None))
        axes.set_xlabel(panel.xlabel)
        figure.legend(handles.values(), handles, **LEGEND)

    shares = (f"`{run.name}` {np.mean(run.logged('conflicts')):.0%}" for run in runs)
    caption = (
        "Cosine of the encoder's gradients of two tasks, or of main and auxiliary losses (solid: "
        "smoothed, pale: as logged); below 0 they conflict. Share of conflicting pairs over all "
        f"steps: {', '.join(shares)}."
    )
    alt = "Cosine of the gradients of each pair of tasks against optimiser steps"
    size = (8, 1.2 + 2.4 * len(runs))
    return [Picture("gradient-cosines", alt, caption, size, draw, tuple(panels))]


def cosine_panel(run, keys):
    """Cosines of the gradients of each pair of the run's tasks, which are logged under `keys`."""
    curves = []
    for key, colour, marker in zip(keys, COLOURS, cycle(MARKERS), strict=False):
        name = key.removeprefix("cosine ").replace(" ", " and ")
        if steps := [line["step"] for line in run.lines if key in line]:
            curves.append(smoothed_curve(name, (colour, marker, name), steps, run.logged(key)))
    values = [value for curve in curves for value in curve.values]
    return Panel(run.name, "optimiser steps", "cosine", curves, (min(values), max(values)))
