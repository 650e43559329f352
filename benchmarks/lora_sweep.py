"""How do LoRA's rank r and its scale α bear on scores and cost? The paper's future work.

    python benchmarks/lora_sweep.py --ranks 1 4 16 32 64 -- --epochs 2 --steps_per_epoch 250

Trains every rank twice, with a fixed α and with a fixed α/r, one run after the other. What stands
after `--` goes to multitask_classifier.py as it is. Then lora-sweep.md, .png and .pdf are written
from the runs' own files. An interrupted sweep goes on with the same command: a finished run is not
trained again, a run that is half done is continued.
"""

import json
import shlex
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the program's folder

from arguments import (
    FREE_WHEN_CONTINUING,
    HERE,
    OF_ONE_COMMAND,
    FlagParser,
    data_paths,
    flags_of,
    number,
)
from arguments import get_args as training_args
from base_bert import file_sha256
from config import TASKS, UserError
from evaluation import finished_run, read_run_scores
from figures import COLOURS, LEGEND, Picture, write_pictures
from preparation import identity
from report import (
    Run,
    Table,
    bootstrap_interval,
    by_value,
    format_picture,
    format_table,
    median,
    minutes,
    paraphrase_notes,
    provenance,
    spread,
)
from run_folder import write_file
from script import NotFinite, run_script, say

# Flags that the sweep itself sets; prediction files stay in the runs' own folders.
OWN_FLAGS = {
    "--fine-tune-mode", "--LoRA_r", "--LoRA_alpha", "--model_file_suffix", "--runs_dir",
    "--predictions_dir", "--resume", "--overwrite",
} | {f"--{task}_{split}_out" for task in TASKS for split in ("dev", "test")}  # fmt: skip
INTERVAL = 2 * 1.96  # standard errors in a 95 % interval
# Marker, its fill and its size (points) by scheme: where two points coincide, both can be seen.
LOOKS = (("o", "full", 6), ("s", "none", 10))


class RunFailed(Exception):
    """A training run ended with another exit code than 0, which becomes the sweep's."""

    def __init__(self, run, code):
        super().__init__(f"{run.path}: ended with exit code {code}; the same command goes on there")
        self.exit_code = code


class Combination(NamedTuple):
    """A rank and an alpha to train with."""

    r: int
    alpha: float
    suffix: str  # of the run's folder
    schemes: list  # labels of the curves that it is a point of


class Point(NamedTuple):
    """A finished run of the sweep."""

    combination: Combination
    run: Run
    error: float  # standard error of its overall score


# -------------------------------------------------------------------------------- what to train


def combinations(ranks, alpha, scaling):
    """Each rank with `alpha` and with alpha = `scaling` × rank, once where the two coincide."""
    found = {}
    for r in sorted(set(ranks)):
        for scheme, value in ((f"α = {alpha:g}", alpha), (f"α/r = {scaling:g}", scaling * r)):
            suffix = f"r{r}-a{value:g}"
            combination = Combination(r, float(f"{value:g}"), suffix, [])
            found.setdefault(suffix, combination).schemes.append(scheme)
    return list(found.values())


def plan(combination, runs_dir, passed):
    """The training script's flags for a combination, and its `RunFolder`; nothing is written.

    Raises `UserError` for flags that the script would refuse, and where the folder holds a run of
    other flags or data.
    """
    flags = [
        "--fine-tune-mode", "LoRA", *passed, "--LoRA_r", str(combination.r),
        "--LoRA_alpha", f"{combination.alpha:g}", "--model_file_suffix", combination.suffix,
        "--runs_dir", str(runs_dir),
    ]  # fmt: skip
    args, run = training_args([*flags, "--overwrite"])  # an earlier run may be there: only read
    if run.holds_run() and (differences := list(differing(args, run.description()))):
        raise UserError(
            f"{run.path} holds another run: {'; '.join(differences)}; take another --runs_dir, or "
            f"remove the folder"
        )
    return [*flags, "--predictions_dir", str(run.path / "predictions")], run


def differing(args, description):
    """What is asked for and is not what the run of `description` has, as texts."""
    own = json.loads(json.dumps(vars(args), default=list))  # tuples and sets: lists, as in run.json
    for name, was in flags_of(description).items():
        aside = name in OF_ONE_COMMAND | FREE_WHEN_CONTINUING
        if name in own and own[name] != was and not aside:
            yield f"--{name} is {own[name]}, was {was}"
    paths, _ = data_paths(args)
    for name, of_task in description["data"].items():
        for split, file in of_task.items():
            path = paths.get(name, {}).get(split)  # another task: its flag differs, see above
            if path and (not path.is_file() or file_sha256(path) != file["sha256"]):
                yield f"{path} is not the {name} {split} file of the run"


def is_finished(run):
    """Whether a run has the scores that are written at its end."""
    try:
        return bool(read_run_scores(run, "dev"))
    except UserError:
        return False


# ------------------------------------------------------------------------------------ to train it


def train(flags, run):
    """Start the training script, or continue its run; returns its exit code.

    Where this process is told to stop, the run is too, and may save its state first.
    """
    command = [sys.executable, str(HERE / "multitask_classifier.py"), *flags]
    command += ["--resume"] if run.holds_run() else []
    process = subprocess.Popen(command, start_new_session=True)  # the terminal's Ctrl-C comes here
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        process.kill()  # nothing where it has ended; else a second signal broke the waiting


def train_all(planned):
    """Train what is not finished of `planned`, (Combination, (flags, RunFolder)) each.

    Yields the combinations with their runs, None where the numbers did not stay finite. Raises
    `RunFailed` where a run fails otherwise.
    """
    for place, (combination, (flags, run)) in enumerate(planned, start=1):
        where, code = f"{run.path} ({place} of {len(planned)})", 0
        if is_finished(run):
            say(f"{where}: finished already")
        else:
            say(f"{where}: continued" if run.holds_run() else where)
            code = train(flags, run)
        if code not in (0, NotFinite.exit_code):
            raise RunFailed(run, code if code > 0 else 128 - code)
        yield combination, None if code else finished_run(run)


def check_comparable(runs):
    """Raise `UserError` where encoder, data or precision differ: such runs share no table."""
    first, *others = runs
    for run in others:
        ours, theirs = identity(run.description), identity(first.description)
        names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if names:
            raise UserError(f"{run.path}: not comparable with {first.path}: other {names[0]}")


# ------------------------------------------------------------------------------ table and picture


def standard_error(run):
    """Standard error of the overall score that is due to the size of the dev sets."""
    return float(np.ptp(bootstrap_interval(run.dev))) / INTERVAL


def seconds_per_step(run):
    """Median seconds of an optimiser step between logged lines; None where there are no two.

    Lines with an evaluation between them are left out.
    """
    pairs = [
        (before, after)
        for before, after in pairwise(run.lines)
        if before["kind"] == after["kind"] == "train" and "seconds" in before and "seconds" in after
    ]
    return median([(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs])


def sweep_table(points):
    """A row for each combination: what was trained, its dev scores, what it cost."""
    runs = [point.run for point in points]
    tasks = [name for name in TASKS if name in runs[0].dev]
    header = ["r", "α", "α/r", "trained parameters", *(f"{n} {TASKS[n].metric}" for n in tasks),
              "overall", "minutes", "sentences/s", "seconds/step"]  # fmt: skip
    cells = []
    for (r, alpha, _, _), run, _ in points:
        scores = [*(run.dev[name].score(name) for name in tasks), run.overall]
        cells.append([
            str(r), f"{alpha:g}", f"{alpha / r:.4g}",
            spread([run.description.get("parameters", {}).get("trained")], "{:,.0f}"),
            *(f"{score:.3f}" for score in scores), spread([minutes(run)], "{:.1f}"),
            spread([median(run.logged("sentences_per_s"))], "{:,.0f}"),
            spread([seconds_per_step(run)], "{:.3f}"),
        ])  # fmt: skip
    caption = (
        f"LoRA's rank r and scale α: dev scores of the best model and cost of each run. "
        f"{uncertainty(points)} Trained parameters: adapters and heads. Minutes: from the start to "
        "the last logged line, evaluations included; they mean little where the machine did other "
        "work. Speeds: medians of the logged lines, seconds/step without evaluations. Hardware: "
        f"{by_value(runs, lambda run: '{device}, {precision}'.format(**run.description))}. "
        f"{provenance(runs)}"
    )
    return Table(caption, header, cells, (best_note(points), *paraphrase_notes(runs)))


def uncertainty(points):
    """Sentences on what a difference between two overall scores may be due to alone."""
    runs, errors = [point.run for point in points], [point.error for point in points]
    low, high = (f"{error:.4f}" for error in (min(errors), max(errors)))
    sizes = ", ".join(f"{name} {len(result.ids):,}" for name, result in runs[0].dev.items())
    seed = by_value(runs, lambda run: f"{run.args['seed']}")
    return (
        f"One seed ({seed}): another one would move each figure too. The standard error of an "
        f"overall score that is due to the size of the dev sets ({sizes} examples) is "
        f"{low if low == high else f'{low} to {high}'} (bootstrap)."
    )


def best_note(points):
    """Which row has the highest overall score, and how many are no further off than its error."""
    best = max(points, key=lambda point: point.run.overall)
    near = sum(point.run.overall >= best.run.overall - best.error for point in points)
    return (
        f"Highest overall score: r {best.combination.r}, α {best.combination.alpha:g}; {near} of "
        f"{len(points)} rows, it included, lie within one standard error of it."
    )


def draw_sweep(figure, points):
    """Overall score against the rank and against minutes, a colour for each scheme."""
    left, right = figure.subplots(1, 2, sharey=True)
    for scheme, colour, (marker, fill, size) in zip(
        schemes_of(points), COLOURS, LOOKS, strict=False
    ):
        look = {"color": colour, "marker": marker, "fillstyle": fill, "markersize": size,
                "markeredgewidth": 1.6}  # fmt: skip
        of_scheme = [point for point in points if scheme in point.combination.schemes]
        draw_by_rank(left, of_scheme, look, scheme)
        draw_by_minutes(right, of_scheme, look)
    ranks = sorted({point.combination.r for point in points})
    left.set_xscale("log", base=2)
    left.set_xticks(ranks, labels=map(str, ranks))
    left.minorticks_off()
    left.set(xlabel="rank r (logarithmic)", ylabel="overall dev score (0 to 1)")
    right.set(xlabel="minutes of the run, evaluations included")
    right.margins(x=0.12)
    figure.legend(**LEGEND)


def draw_by_rank(axes, points, look, label):
    """The curve of a scheme, with standard errors."""
    ranks, scores, errors = zip(
        *((point.combination.r, point.run.overall, point.error) for point in points), strict=True
    )
    # Of two runs of one rank, both bars' ends can be told apart.
    cap = 0.6 * look["markersize"]
    axes.errorbar(ranks, scores, errors, label=label, linewidth=1.4, elinewidth=1, capsize=cap,
                  **look)  # fmt: skip


def draw_by_minutes(axes, points, look):
    """A scheme's runs by their time, as far as it is known, each with its rank beside it."""
    for point in points:
        if (time := minutes(point.run)) is not None:
            place = time, point.run.overall
            axes.plot(*place, linestyle="none", **look)
            axes.annotate(f"r {point.combination.r}", place, xytext=(8, 5), fontsize=9, color="0.2",
                          textcoords="offset points")  # fmt: skip


def schemes_of(points):
    """Labels of the curves."""
    return list(dict.fromkeys(scheme for point in points for scheme in point.combination.schemes))


def sweep_picture(points):
    """The picture of the sweep."""
    schemes = " and ".join(schemes_of(points))
    caption = (
        f"Overall dev score by rank r (left) and by the run's minutes (right), with {schemes}; "
        f"where the two coincide, it is one run. Bars: ± one standard error. {uncertainty(points)} "
        "All runs are judged on the same dev examples, so these errors are not independent."
    )
    alt = "Overall dev score against LoRA's rank, and against minutes, one curve per choice of α"
    return Picture("lora-sweep", alt, caption, (11, 5.2), partial(draw_sweep, points=points))


def write_sweep(points, diverged, folder, command):
    """Write `lora-sweep.md`, `.png` and `.pdf` into `folder`; returns the document's path.

    `diverged` are the combinations whose numbers did not stay finite.
    """
    folder, runs = Path(folder), [point.run for point in points]
    picture, table = sweep_picture(points), sweep_table(points)
    if diverged:
        names = ", ".join(f"r {c.r} with α {c.alpha:g}" for c in diverged)
        table = table._replace(notes=(*table.notes, f"Not finite, without figures: {names}."))
    write_pictures([picture], folder)
    write_file(folder / "lora-sweep.md", "\n".join([
        "# LoRA: rank and scale\n", f"Made by `{command}`. The picture leads to its PDF.\n",
        format_table(1, table), format_picture(1, picture, runs),
        "The runs' commands:\n", *(f"    {run.description['command']}" for run in runs), "",
    ]))  # fmt: skip
    return folder / "lora-sweep.md"


# ------------------------------------------------------------------------------------ the command


def get_args(argv=None):
    """The command line: `(args, flags after "--")`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    own, passed = argv, []
    if "--" in argv:
        own, passed = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = FlagParser(
        description=__doc__.splitlines()[0],
        epilog="Flags after -- go to multitask_classifier.py: -- --epochs 2 --data_dir data",
    )
    add, rate = parser.add_argument, number(float, 0, None, above=True)
    add("--ranks", nargs="+", type=number(int, 1, None), default=[1, 4, 16, 32, 64], metavar="R",
        help="default 1 4 16 32 64")  # fmt: skip
    add("--alpha", type=rate, default=16.0, help="the α of all ranks, default 16")
    add("--scaling", type=rate, default=0.5, help="the α/r of all ranks, default 0.5")
    add("--runs_dir", default="runs/sweep", help="the runs' folder, default runs/sweep")
    add("--out", default="report/sweep", help="where table and picture go, default report/sweep")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(own)
    taken = [word for word in passed if word.split("=")[0] in OWN_FLAGS]
    if taken:
        raise UserError(f"{taken[0]} after --: the sweep sets it (--help lists its flags)")
    return args, passed


def main(argv=None):
    """Train what is missing of a sweep, then write its table and picture."""
    args, passed = get_args(argv)
    wanted = combinations(args.ranks, args.alpha, args.scaling)
    planned = [(c, plan(c, args.runs_dir, passed)) for c in wanted]
    done = list(train_all(planned))
    points = [Point(c, run, standard_error(run)) for c, run in done if run]
    if not points:
        raise NotFinite("no run kept finite numbers; try a lower --lr")
    check_comparable([point.run for point in points])
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/lora_sweep.py", *words])
    diverged = [combination for combination, run in done if not run]
    print(f"wrote {write_sweep(points, diverged, args.out, command)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
