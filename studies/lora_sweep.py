"""How LoRA's rank r and α, or other flags, change scores and cost: the paper's future work.

    python -m studies.lora_sweep --ranks 1 4 16 32 64 -- --epochs 2 --steps_per_epoch 250
    python -m studies.lora_sweep --vary LoRA_variant plain rslora dora --vary LoRA_r 4 32

Trains each rank twice, with a fixed α and with a fixed α/r, one run after the other; with `--vary`
every combination of the flags' values. Flags after `--` go to multitask_classifier.py. Writes
lora-sweep.md, .png and .pdf from the runs' own files. The same command continues an interrupted
sweep: it keeps finished runs and resumes an unfinished one.
"""

import re
import shlex
import subprocess
import sys
from functools import partial
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import REPOSITORY, TASKS, UserError
from reporting import report
from reporting.ensemble import FinishedRun, finished_run, read_run_scores
from reporting.figures import COLOURS, LEGEND, Picture, write_pictures
from runtime.files import file_sha256, write_file
from runtime.script import NotFinite, run_script, say
from training.data_files import data_paths
from training.flags import FREE_WHEN_RESUMING, OF_ONE_COMMAND, SCRIPT, FlagParser, parse_command
from training.plan import number
from training.run_folder import RunFolder, run_path
from training.setup import identity

# Flags that a sweep sets by itself; prediction files stay in the runs' own folders.
OWN_FLAGS = {f"--{task}_{split}_out" for task in TASKS for split in ("dev", "test")}
OWN_FLAGS |= {"--runs_dir", "--predictions_dir", "--resume", "--overwrite", "--model_file_suffix"}
RANK_FLAGS = {"--fine-tune-mode", "--LoRA_r", "--LoRA_alpha"}  # without --vary these, too
# Runs that differ in one of these cannot share a table.
UNLIKE = {f"--{task}_{split}" for task in TASKS for split in ("train", "dev", "test")}
UNLIKE |= {"--tasks", "--precision", "--pretrained", "--start_from", "--data_dir"}
LOOKS = (  # by scheme: of two points in one place, both can be seen
    {"marker": "o", "fillstyle": "full", "markersize": 6},
    {"marker": "s", "fillstyle": "none", "markersize": 10},
)


class RunFailed(Exception):
    """A training run ended with an exit code other than 0, which becomes the sweep's."""

    def __init__(self, run, code):
        super().__init__(f"{run.path}: ended with exit code {code}; the same command resumes it")
        self.exit_code = code


class Point(NamedTuple):
    """What a run is asked for, and the finished run."""

    words: list  # flags and their values
    suffix: str  # of the run's name
    cells: dict  # of its row in the table, by column: what sets it apart
    x: int | str  # its place on the picture's axis: the first cell's value
    schemes: list  # labels of the curves that it is a point of
    run: FinishedRun | None = None  # None too if its numbers did not stay finite
    error: float | None = None  # standard error of its overall score

    def __str__(self):
        return ", ".join(f"{column} {value}" for column, value in self.cells.items())


# -------------------------------------------------------------------------------- what to train


def combinations(ranks, alpha, scaling):
    """Each rank with `alpha` and with alpha = `scaling` × rank, once if the two are equal."""
    found = {}
    for r in sorted(set(ranks)):
        for scheme, value in ((f"α = {alpha:g}", alpha), (f"α/r = {scaling:g}", scaling * r)):
            found.setdefault((r, f"{value:g}"), []).append(scheme)
    points = []
    for (r, alpha), schemes in found.items():
        words = ["--LoRA_r", str(r), "--LoRA_alpha", alpha]
        cells = {"r": str(r), "α": alpha, "α/r": f"{float(alpha) / r:.4g}"}
        points.append(Point(words, f"r{r}-a{alpha}", cells, r, schemes))
    return points


def grid(varied):
    """Every combination of the values of `varied`: lists of a flag's name and its values.

    A value may be several words; "on" is a flag without a value, "off" omits the flag.
    """
    names, points = [name for name, *_ in varied], []
    for values in product(*(dict.fromkeys(values) for _, *values in varied)):
        cells, words = dict(zip(names, values, strict=True)), []
        for name, value in cells.items():
            rest = [] if value == "on" else shlex.split(value)
            words += [] if value == "off" else [f"--{name}", *rest]
        suffix = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(map("_".join, cells.items())))
        scheme = ", ".join(map(" ".join, list(cells.items())[1:]))
        points.append(Point(words, suffix, cells, values[0], [scheme or "all runs"]))
    return points


def plan_run(point, runs_dir, passed):
    """The training command's flags for a point, and its `RunFolder`; writes nothing.

    Raises `UserError` for flags that the training script would refuse, and if the folder holds a
    run of other flags or data.
    """
    words = ["--fine-tune-mode", "LoRA", *passed, *point.words, "--runs_dir", str(runs_dir)]
    words += ["--model_file_suffix", point.suffix]
    flags = parse_command([*words, "--overwrite"]).flags  # an earlier run may exist: only read
    run = RunFolder(run_path(flags))
    if run.holds_run() and (differences := list(find_differences(flags, run.description()))):
        hint = f"{'; '.join(differences)}; name another --runs_dir, or remove the folder"
        raise UserError(f"{run.path} holds another run: {hint}")
    return [*words, "--predictions_dir", str(run.path / "predictions")], run


def find_differences(flags, description):
    """Yield each difference of the flags and data files asked for from those of a run, as text."""
    for name, earlier in description["args"].items():
        if name not in OF_ONE_COMMAND | FREE_WHEN_RESUMING and getattr(flags, name) != earlier:
            yield f"--{name} is {getattr(flags, name)}, was {earlier}"
    for name, of_task in data_paths(flags).items():
        for split, path in of_task.items():
            file = description["data"].get(name, {}).get(split)  # of other tasks --tasks differs
            if file and (not path.is_file() or file_sha256(path) != file["sha256"]):
                yield f"{path} is not the {name} {split} file of the run"


def is_finished(run):
    """Whether a run has the scores that are written at its end."""
    try:
        return bool(read_run_scores(run, "dev"))
    except UserError:
        return False


# ------------------------------------------------------------------------------------- training


def train(words, run):
    """Start the training script, or resume its run; returns its exit code.

    If this process is told to stop, so is the run, which may save its state first.
    """
    command = [sys.executable, str(REPOSITORY / SCRIPT), *words]
    command += ["--resume"] if run.holds_run() else []
    process = subprocess.Popen(command, start_new_session=True)  # the terminal's Ctrl-C comes here
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        say(f"{run.path}: the sweep's own command resumes it, and goes on with the others")
        raise
    finally:
        process.kill()  # no effect if it has ended; else a second signal ended the wait


def train_all(planned):
    """Train the unfinished points of `planned`, a list of (Point, flags, RunFolder).

    Yields each point; its `run` stays None if a loss or gradient was not finite. Raises `RunFailed`
    if a run fails otherwise.
    """
    for place, (point, words, folder) in enumerate(planned, start=1):
        name, code = f"{folder.path} ({place} of {len(planned)})", 0
        if is_finished(folder):
            say(f"{name}: already finished")
        else:
            say(f"{name}: resumed" if folder.holds_run() else name)
            code = train(words, folder)
        if code not in (0, NotFinite.exit_code):
            raise RunFailed(folder, code if code > 0 else 128 - code)
        if code == 0:
            run = finished_run(folder)
            point = point._replace(run=run, error=standard_error(run))
        yield point


def check_comparable(runs):
    """Raise `UserError` if encoder, data or precision differ: such runs share no table."""
    first, *others = [(run.path, identity(run.description)) for run in runs]
    for path, values in others:
        for name in values | first[1]:
            if values.get(name) != first[1].get(name) and name != "number of processes":
                raise UserError(f"{path}: not comparable with {first[0]}: other {name}")


# ----------------------------------------------------------------------------- table and picture


def standard_error(run):
    """Standard error of the overall score that comes from the size of the dev sets."""
    return float(np.ptp(report.bootstrap_interval(run.dev))) / (2 * 1.96)  # 95 %: ± 1.96 errors


def seconds_per_step(run):
    """Median seconds of an optimiser step between logged lines; None if there are no two.

    Pairs of lines with an evaluation between them do not count.
    """
    pairs = [p for p in pairwise(run.lines) if p[0]["kind"] == p[1]["kind"] == "train"]
    seconds = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs]
    return report.median(seconds)


def sweep_table(points):
    """A row for each point: what was trained, its dev scores, what it cost."""
    runs = [point.run for point in points]
    tasks = [name for name in TASKS if name in runs[0].dev]
    header = [*points[0].cells, "trained parameters", *(f"{n} {TASKS[n].metric}" for n in tasks)]
    header += ["overall", "minutes", "sentences/s", "seconds/step"]
    costs = [report.COSTS["minutes"], report.COSTS["sentences/s"], (seconds_per_step, "{:.3f}")]
    cells = []
    for point in points:
        run, row = point.run, [*point.cells.values()]
        row.append(f"{run.description['parameters']['trained']:,}")
        row += map("{:.3f}".format, [*(run.dev[n].score(n) for n in tasks), run.overall])
        cells.append([*row, *(report.spread([cost(run)], form) for cost, form in costs)])
    hardware = report.by_value(runs, lambda run: "{device}, {precision}".format(**run.description))
    caption = f"{title(points)}: dev scores of the best model, and cost of each run. "
    caption += f"{uncertainty(points)} Trained parameters: adapters and heads. Minutes: from the "
    caption += "start to the last logged line, evaluations included; they mean little if the "
    caption += "machine did other work. Speeds: medians of the logged lines, seconds/step without "
    caption += f"evaluations. Hardware: {hardware}. {report.provenance(runs)}"
    notes = (best_note(points), *report.paraphrase_notes(runs))
    return report.Table(caption, header, cells, notes)


def uncertainty(points):
    """Sentences on how large a difference of two overall scores may be by chance."""
    runs, errors = [point.run for point in points], [f"{point.error:.4f}" for point in points]
    error = " to ".join(sorted({min(errors), max(errors)}))
    sizes = ", ".join(f"{name} {len(result.ids):,}" for name, result in runs[0].dev.items())
    seed = report.by_value(runs, lambda run: f"{run.args['seed']}")
    return (
        f"Seed {seed}: another one would move each figure too. The size of the dev sets ({sizes} "
        f"examples) gives an overall score a standard error of {error} (bootstrap)."
    )


def title(points):
    """What the sweep varies."""
    varied = ", ".join(points[0].cells)
    return "LoRA's rank r and α" if isinstance(points[0].x, int) else varied


def best_note(points):
    """Which row has the highest overall score, and how many lie within its standard error."""
    best = max(points, key=lambda point: point.run.overall)
    near = sum(point.run.overall >= best.run.overall - best.error for point in points)
    rows = f"{near} of {len(points)} rows, including it, lie within one standard error of it"
    return f"Highest overall score: {best}; {rows}."


def schemes_of(points):
    """Labels of the curves."""
    return list(dict.fromkeys(scheme for point in points for scheme in point.schemes))


def draw_sweep(figure, points):
    """Overall score against rank or first flag (left) and minutes (right), a colour a scheme."""
    left, right = figure.subplots(1, 2, sharey=True)
    name = next(iter(points[0].cells))
    for scheme, colour, look in zip(schemes_of(points), cycle(COLOURS), cycle(LOOKS)):
        look = {**look, "color": colour, "markeredgewidth": 1.6}
        shown = [point for point in points if scheme in point.schemes]
        rows = [(p.x, p.run.overall, p.error, report.minutes(p.run)) for p in shown]
        places, scores, errors, times = zip(*rows, strict=True)
        # Caps of different sizes: of two runs of one rank, both bars' ends can be told apart.
        bars = {"linewidth": 1.4, "elinewidth": 1, "capsize": 0.6 * look["markersize"]}
        left.errorbar(places, scores, errors, label=scheme, **bars, **look)
        right.plot(times, scores, linestyle="none", **look)
        beside = {"xytext": (8, 5), "textcoords": "offset points", "fontsize": 9, "color": "0.2"}
        for x, *place in zip(places, times, scores, strict=True):
            right.annotate(f"{name} {x}" if isinstance(x, int) else x, place, **beside)
    left.set(xlabel=name, ylabel="overall dev score (0 to 1)")
    if isinstance(points[0].x, int):
        ranks = sorted({point.x for point in points})
        left.set_xscale("log", base=2)
        left.set_xticks(ranks, labels=map(str, ranks))
        left.set_xlabel("rank r (logarithmic)")
    right.set(xlabel="minutes of the run, evaluations included")
    right.margins(x=0.12)
    figure.legend(**LEGEND)


def sweep_picture(points):
    """The picture of the sweep."""
    schemes, by = "; ".join(schemes_of(points)), next(iter(points[0].cells))
    caption = f"Overall dev score by {by} (left) and by the run's minutes (right). Curves: "
    caption += f"{schemes}; where two meet in a point, it is one run. Bars: ± one standard error. "
    caption += f"{uncertainty(points)} All runs are judged on the same dev examples, so these "
    caption += "errors are not independent."
    alt = f"Overall dev score against {by}, and against minutes, one curve for each of: {schemes}"
    return Picture("lora-sweep", alt, caption, (11, 5.2), partial(draw_sweep, points=points))


def write_sweep(points, diverged, folder, command):
    """Write `lora-sweep.md`, `.png` and `.pdf` into `folder`; returns the document's path.

    `diverged` are the points whose numbers did not stay finite.
    """
    folder, runs = Path(folder), [point.run for point in points]
    picture, table = sweep_picture(points), sweep_table(points)
    if diverged:
        names = "; ".join(map(str, diverged))
        table = table._replace(notes=(*table.notes, f"Not finite, without figures: {names}."))
    write_pictures([picture], folder)
    parts = [f"# {title(points)}\n", f"Made by `{command}`. The picture links to its PDF.\n"]
    parts += [report.format_table(1, table), report.format_picture(1, picture, runs)]
    parts += ["The runs' commands:\n", *(f"    {run.description['command']}" for run in runs), ""]
    write_file(folder / "lora-sweep.md", "\n".join(parts))
    return folder / "lora-sweep.md"


# ----------------------------------------------------------------------------------- the command


def parse_flags(argv):
    """The command line: `(flags, flags after "--")`."""
    parser = FlagParser(
        prog="python -m studies.lora_sweep",
        description=__doc__.splitlines()[0],
        epilog="Flags after -- go to multitask_classifier.py: -- --epochs 2 --data_dir data",
    )
    add, rate, rank = parser.add_argument, number(float, 0, above=True), number(int, 1)
    text = "each is trained with --alpha and with --scaling times the rank (default: 1 4 16 32 64)"
    add("--ranks", nargs="+", type=rank, default=[1, 4, 16, 32, 64], help=text)
    add("--alpha", type=rate, default=16.0, help="the fixed α (default: %(default)g)")
    add("--scaling", type=rate, default=0.5, help="the fixed α/r (default: %(default)g)")
    text = "not ranks: a flag without dashes, its values (on, off); repeated: all combinations"
    add("--vary", nargs="+", action="append", metavar=("FLAG", "VALUE"), help=text)
    add("--runs_dir", default="runs/sweep", help="folder of the runs (default: %(default)s)")
    add("--out", default="report/sweep", help="folder of the results (default: %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")
    end = argv.index("--") if "--" in argv else len(argv)
    flags, passed = parser.parse_args(argv[:end]), argv[end + 1 :]
    varied = [f"--{name}" for name, *_ in flags.vary or []]
    for name, *values in flags.vary or []:
        flag = f"--{name}"
        if flag in OWN_FLAGS | UNLIKE:
            raise UserError(f"--vary {name}: a sweep cannot vary this flag")
        if not values or varied.count(flag) > 1:
            raise UserError(f"--vary {name}: expected each flag once, and its values")
    for word in passed:
        if word.split("=")[0] in OWN_FLAGS | (set(varied) or RANK_FLAGS):
            raise UserError(f"{word} after --: the sweep sets it (--help lists its flags)")
    return flags, passed


def main(argv=None):
    """Train what is missing of a sweep, then write its table and picture."""
    argv = sys.argv[1:] if argv is None else argv
    flags, passed = parse_flags(argv)
    ranks = flags.ranks, flags.alpha, flags.scaling
    wanted = grid(flags.vary) if flags.vary else combinations(*ranks)
    planned = [(point, *plan_run(point, flags.runs_dir, passed)) for point in wanted]
    done = list(train_all(planned))
    points, diverged = ([p for p in done if bool(p.run) == is_done] for is_done in (True, False))
    if not points:
        raise NotFinite("no run kept finite numbers; try a lower --lr")
    check_comparable([point.run for point in points])
    command = shlex.join(["python", "-m", "studies.lora_sweep", *argv])
    print(f"wrote {write_sweep(points, diverged, flags.out, command)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
