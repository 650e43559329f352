"""The report's figures, as PNG and PDF.

Figures 1 to 4 are the paper's losses in training and on dev. Two are new: similarity predicted
against true, and the cosines of the tasks' gradients. A run here is an `ensemble.Run`.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle, product
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


class Picture(NamedTuple):
    """A figure: its file name without ending, what it shows, and how to draw it."""

    name: str
    alt: str
    caption: str
    size: tuple  # inches
    draw: Callable  # takes a matplotlib `Figure`


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


def plot_smoothed(axes, steps, values, colour, **settings):
    """Raw values, pale, and over them their moving average over a tenth of the curve."""
    means = smooth(values, -(-len(values) // 20))
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    return axes.plot(steps, means, color=colour, linewidth=1.8, **settings)[0]


def smooth(values, reach):
    """Mean of each value and `reach` neighbours on both sides; near an end, of fewer on both."""
    last = len(values) - 1
    reaches = (min(reach, i, last - i) for i in range(len(values)))
    return [np.mean(values[i - r : i + r + 1]) for i, r in enumerate(reaches)]


def loss_pictures(runs):
    """Figures 1 to 4: the summed loss of the tasks that all runs have, then each task's."""
    tasks = [name for name in PAPERS_ORDER if any(name in run.dev for run in runs)]
    shared = [name for name in tasks if all(name in run.dev for run in runs)]
    groups = ({"overall": shared} if shared else {}) | {name: [name] for name in tasks}
    pictures = []
    for name, summed in groups.items():
        having = [run for run in runs if set(summed) <= set(run.dev)]
        title = f"Sum of the task losses ({', '.join(summed)}; without SimCSE and R-Drop)"
        unit = "sum of the task losses"
        if name in TASKS:
            title = f"{TASKS[name].title.capitalize()} loss ({name})"
            unit = LOSSES[TASKS[name].kind]
        caption = f"{title} in training (solid: smoothed, pale: as logged) and on dev (dashed)."
        alt = f"{title} against optimiser steps, one curve per run"
        draw = partial(draw_losses, runs=having, tasks=summed, unit=unit)
        pictures.append(Picture(f"loss-{name}", alt, caption, (8, 5), draw))
    return pictures


def draw_losses(figure, runs, tasks, unit):
    """Training loss, smoothed over raw, and dev loss of every run."""
    axes, handles = figure.subplots(), {}
    for run, (colour, marker, label) in zip(runs, looks_of(runs), strict=True):
        training, dev = loss_curves(run, tasks)
        handles.setdefault(label, plot_smoothed(axes, *training, colour))
        axes.plot(*dev, color=colour, linestyle="--", marker=marker, markersize=4.5, linewidth=1.2)
    handles["training (raw: pale)"] = axes.plot([], [], color="gray", linewidth=1.8)[0]
    handles["dev"] = axes.plot([], [], "--o", color="gray", markersize=4.5, linewidth=1.2)[0]
    axes.set(xlabel="optimiser steps", ylabel=f"{unit}, logarithmic", xlim=(0, None), yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    # Between powers of 10, only ticks that begin with 2 or 5 have a label.
    axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    figure.legend(handles.values(), handles, **LEGEND)


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
    """Figure 5: predicted against true scores of one run."""
    task, result, metrics = TASKS[name], run.dev[name], run.dev[name].metrics

    def draw(figure):
        random = np.random.default_rng(0)  # spreads equal labels, to show their number
        labels = result.labels + random.uniform(-0.06, 0.06, len(result.labels))
        dots = {"s": 16, "alpha": 0.4, "linewidths": 0, "color": COLOURS[0]}
        axes, ends = figure.subplots(), [task.low, task.high]
        axes.scatter(labels, result.predictions, label="one dev pair", **dots)
        axes.plot(ends, ends, color="black", linewidth=1, label="predicted = true")
        unit = f"{task.title} ({task.low:g} to {task.high:g})"
        axes.set(xlabel=f"true {unit}", ylabel=f"predicted {unit}", aspect="equal")
        figure.legend(**LEGEND)

    caption = (
        f"{task.title.capitalize()} on dev, predicted by `{run.name}` against true: Pearson "
        f"{metrics['pearson']:.3f}, Spearman {metrics['spearman']:.3f}. Labels are spread by ±0.06."
    )
    alt = f"Scatter plot of predicted against true {task.title} with the line where both are equal"
    return Picture(f"{name}-scatter", alt, caption, (6, 6), draw)


def cosine_pictures(runs):
    """Figure 6, if a run has gradient surgery: how far the tasks' gradients conflict."""
    runs = [run for run in runs if run.logged("conflicts")]
    if not runs:
        return []
    keys = {key for run in runs for line in run.lines for key in line if key.startswith("cosine ")}

    def draw(figure):
        panels = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, run in zip(panels, runs, strict=True):
            for key, colour in zip(sorted(keys), COLOURS, strict=False):
                label = key.removeprefix("cosine ").replace(" ", " and ")
                label = label if axes is panels[0] else None
                steps = [line["step"] for line in run.lines if key in line]
                plot_smoothed(axes, steps, run.logged(key), colour, label=label)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_title(run.name, fontsize=11)
            axes.set(ylabel="cosine", xlim=(0, None))
        panels[-1].set_xlabel("optimiser steps")
        figure.legend(**LEGEND)

    shares = (f"`{run.name}` {np.mean(run.logged('conflicts')):.0%}" for run in runs)
    caption = (
        "Cosine of the encoder's gradients of two tasks, or of main and auxiliary losses (solid: "
        "smoothed, pale: as logged); below 0 they conflict. Share of conflicting pairs over all "
        f"steps: {', '.join(shares)}."
    )
    alt = "Cosine of the gradients of each pair of tasks against optimiser steps"
    return [Picture("gradient-cosines", alt, caption, (8, 1.2 + 2.4 * len(runs)), draw)]
