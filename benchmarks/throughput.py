"""Speed of training, beside the same job written with `transformers` and `peft`.

    python benchmarks/throughput.py                    # the main table, some 5 minutes on 2 cores

Ours and the reference are two processes that compute by turns, A B A B …, on the same batches.
Before a row is timed, both compute the losses of one batch with dropout off; the row fails if they
differ. Prints Markdown. benchmarks/README.md explains the columns.
"""

import argparse
import fnmatch
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import distributions
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODES = ("full-model", "LoRA", "last-linear-layer")
KINDS = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "default": ("auto", "fp32")}
SIDES = ("ours", "reference")
MAIN_TABLE = {  # patterns of the rows' names
    "cpu": "full-model-simcse-* LoRA-simcse-*-default last-*-default evaluation-*-default",
    "cuda": "full-model-simcse-*-bf16 LoRA-simcse-*-bf16 last-*-16-bf16 evaluation-*-bf16",
}
# Encoder work of a step in units of its forward pass: LoRA has no gradients of large weights, a
# frozen encoder none at all.
WORK = {"full-model": 3, "LoRA": 2, "last-linear-layer": 1, "evaluation": 1}
# The paper's longest run: 100 epochs of 2,000 steps, batch 16, SimCSE, full-model; hours it took.
PAPER_STEPS, PAPER_HOURS = 200_000, 14.47
RATES = ("sentences_per_s", "tokens_per_s", "seconds_per_step", "flops_per_s", "matrix_flops_per_s")
PACKAGES = ("torch", "transformers", "peft", "numpy", "tokenizers")
say = partial(print, file=sys.stderr, flush=True)  # progress


class Row(NamedTuple):
    """One line of the table. `kind` is a key of `KINDS`: (our precision, the reference's)."""

    mode: str  # of MODES, or "evaluation"
    simcse: bool
    batch_size: int  # of each task; in "evaluation" that of the reference
    kind: str

    @property
    def name(self):
        """As `--rows` selects it."""
        losses = ["simcse"] if self.simcse else [] if self.mode == "evaluation" else ["plain"]
        return "-".join([self.mode, *losses, str(self.batch_size), self.kind])


# ----------------------------------------------------------------------------------- the processes


class WorkerFailed(Exception):
    """A worker answered with an error, or died."""


class WorkerProcess(AbstractContextManager):
    """A process that answers requests; `file` is one of ours.py, reference.py, worker.py."""

    def __init__(self, file, folder):
        self.file, self.log = file, Path(folder) / f"{file}.log"
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [HERE, *(path for path in inherited if path and Path(path).resolve() != ROOT)]
        if file == "ours.py":
            paths, folder = [ROOT, *paths], ROOT
        command = [sys.executable, "-P", str(HERE / file)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stderr=log, **pipes)

    def ask(self, do, **values):
        """Send a request and wait for its answer. Raises `WorkerFailed`."""
        try:
            print(json.dumps({"do": do, **values}), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
            raise WorkerFailed(f"{self.file} ended with {self.process.wait()}: {' '.join(last)}")
        answer = json.loads(answer)
        if "error" in answer:
            raise WorkerFailed(f"{self.file}: {do}: {answer['error']}")
        return answer

    def __exit__(self, *error):
        try:
            self.process.communicate(timeout=20)  # closes the pipes, at which a worker ends
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


# ----------------------------------------------------------------------------------------- one row


class Sides:
    """Both sides of a row, opened on the same encoder, heads, data and recipe."""

    def __init__(self, row, ours, reference, encoder, settings):
        self.row, self.ours, self.reference, self.settings = row, ours, reference, settings
        # Both take what they need of the flags, the row and the encoder's folder.
        job = vars(settings) | row._asdict() | {"encoder": encoder}
        our_precision, reference_precision = KINDS[row.kind]
        self.opened = ours.ask("open", precision=our_precision, **job)
        if our_precision not in ("auto", self.opened["precision"]):
            raise WorkerFailed(f"{our_precision}: this device has {self.opened['precision']} only")
        job |= {"precision": reference_precision, "recipe": self.opened["recipe"]}
        other = reference.ask("open", **job)
        self.precisions = self.opened["precision"], other["precision"]
        ours, theirs = self.opened["groups"], other["groups"]
        if ours != theirs:
            raise WorkerFailed(f"parameter groups differ: {ours} and {theirs}")

    def losses(self):
        """Losses of the first batch with dropout off, ours and the reference's."""
        (rows,) = self.ours.ask("rows", first=0, steps=1)
        return self.ours.ask("losses", step=0), self.reference.ask("losses", rows=rows)

    def train_ours(self, first, steps):
        """Let ours train `steps` steps from step `first` on."""
        return self.ours.ask("train", first=first, steps=steps)

    def train_reference(self, first, steps):
        """Let the reference train the same steps."""
        rows = self.ours.ask("rows", first=first, steps=steps)
        return self.reference.ask("train", rows=rows)

    def turns(self):
        """Warm up, then yield (ours, reference) for each turn.

        Raises `WorkerFailed` if the same steps did not encode the same.
        """
        turns = self.evaluations() if self.row.mode == "evaluation" else self.trainings()
        for ours, reference in turns:
            for name in ("sentences", "tokens"):
                if ours["steps"] == reference["steps"] and ours[name] != reference[name]:
                    raise WorkerFailed(f"{name} differ: {ours[name]} and {reference[name]}")
            yield ours, reference

    def trainings(self):
        """Train by turns; with a frozen encoder, ours from its second pass over the examples on."""
        settings, is_frozen = self.settings, self.row.mode == "last-linear-layer"
        first = self.opened["steps_per_pass"] if is_frozen else settings.warmup
        our_steps = settings.steps * (20 if is_frozen else 1)  # few ms each: vectors are kept
        self.train_ours(0, first)
        self.train_reference(0, settings.warmup)
        for _ in range(settings.repeats):
            yield self.train_ours(first, our_steps), self.train_reference(first, settings.steps)
            first += our_steps

    def evaluations(self):
        """Evaluate by turns, after 32 examples of each dev set that do not count."""
        limits = [32] + [self.settings.eval_examples] * self.settings.repeats
        sides = (self.ours, self.reference)
        turns = ([side.ask("evaluate", limit=limit) for side in sides] for limit in limits)
        yield from islice(turns, 1, None)


def check_same_losses(ours, reference, tolerance):
    """Raise `WorkerFailed` if a loss is missing or off by more than `tolerance` × the sum."""
    if set(ours) != set(reference):
        raise WorkerFailed(f"other losses: {sorted(ours)} and {sorted(reference)}")
    limit = tolerance * sum(map(abs, ours.values()))
    for name in ours:
        if not abs(ours[name] - reference[name]) <= limit:
            raise WorkerFailed(f"loss {name}: {ours[name]:.6f} and {reference[name]:.6f}")


def measure(row, encoder, products, settings):
    """Measure one row; returns its figures. `encoder` is a folder. Raises `WorkerFailed`."""
    start, turns = partial(WorkerProcess, folder=settings.folder), []
    config = json.loads((Path(encoder) / "config.json").read_text(encoding="utf-8"))
    with start("ours.py") as ours, start("reference.py") as reference:
        pair = Sides(row, ours, reference, encoder, settings)
        is_exact = set(pair.precisions) == {"fp32"} and settings.device == "cpu"
        check_same_losses(*pair.losses(), 1e-4 if is_exact else 5e-2)
        for turn in pair.turns():
            # The products of one layer, on a step's tokens or an evaluation batch's.
            tokens = min(65536, max(64, turn[0]["tokens"] // turn[0]["steps"]))
            sizes = {"tokens": 4096 if row.mode == "evaluation" else tokens}
            sizes |= {name: config[f"{name}_size"] for name in ("hidden", "intermediate")}
            for answer, precision in zip(turn, pair.precisions, strict=True):
                plain = products.ask("layer", precision=precision, **sizes)
                seconds = answer["seconds"]
                answer["sentences_per_s"] = answer["sentences"] / seconds
                answer["tokens_per_s"] = answer["tokens"] / seconds
                answer["seconds_per_step"] = seconds / answer["steps"]
                answer["flops_per_s"] = WORK[row.mode] * forward_flops(config, answer) / seconds
                answer["matrix_flops_per_s"] = plain["flops_per_s"]
            turns.append(turn)
            say("  {:.4f} s and {:.4f} s".format(*(side["seconds_per_step"] for side in turn)))
        memory = [side.ask("memory") for side in (ours, reference)]
    ratios = [ours["sentences_per_s"] / other["sentences_per_s"] for ours, other in turns]
    ratio = [statistics.median(ratios), min(ratios), max(ratios)]
    figures = {"device": pair.opened["device"], "ratio": ratio}
    by_side = zip(SIDES, pair.precisions, memory, zip(*turns, strict=True), strict=True)
    for side, precision, used, of_side in by_side:
        medians = {key: statistics.median(turn[key] for turn in of_side) for key in RATES}
        medians["share"] = medians["flops_per_s"] / medians["matrix_flops_per_s"]
        figures[side] = {"precision": precision, **medians, **used, "turns": of_side}
    if row.mode == "last-linear-layer":  # ours encodes nothing
        figures["ours"] |= {"flops_per_s": None, "share": None}
    return figures


def forward_flops(config, turn):
    """FLOP of the encoder's matrix products for real tokens: linear layers and attention."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    linear = 2 * (4 * hidden**2 + 2 * hidden * wide) * turn["tokens"]
    attention = 4 * hidden * turn["squares"]
    return config["num_hidden_layers"] * (linear + attention)


def measure_startup(settings):
    """Seconds from the training command to the end of its first step, `--repeats` times."""
    encoder = "bundled" if settings.encoder == "base" else settings.encoder
    seconds, line = [], ""
    for number in range(settings.repeats):
        command = [sys.executable, "multitask_classifier.py", "--pretrained", encoder]
        command += ["--log_every", "1", "--runs_dir", f"{settings.folder}/startup-{number}"]
        command += ["--data_dir", settings.data_dir] if settings.data_dir else []
        began = time.perf_counter()
        # Standard error too: on a terminal it would have a progress bar instead of the lines.
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
            try:
                for line in process.stdout:
                    if line.startswith("step 1/"):
                        break
                seconds.append(round(time.perf_counter() - began, 2))
            finally:  # also if this process is told to stop
                process.kill()
        if not line.startswith("step 1/"):
            raise WorkerFailed(f"{shlex.join(command[1:])}: ended before its first step: {line}")
        say(f"  {seconds[-1]:.2f} s to the first step")
    return seconds


# -------------------------------------------------------------------------------------- the report

HEADER = ("row", "precision", "sentences/s", "tokens/s", "ratio (min to max)", "peak MiB")
HEADER += ("GFLOP/s", "of matrix products")


def table_row(result):
    """A row's cells; where there are two figures, ours and the reference's."""
    if "failed" in result:
        return [result["name"], "failed", *["–"] * (len(HEADER) - 2)]
    sides = [result[side] for side in SIDES]

    def cell(key, form, unit=1):
        values = [side[key] for side in sides]
        return " / ".join("–" if v is None else format(v / unit, form) for v in values)

    memory = sides[0]["peak_mib"] / sides[1]["peak_mib"]
    return [
        result["name"],
        f"{sides[0]['precision']} / {sides[1]['precision']}",
        cell("sentences_per_s", ",.0f"),
        cell("tokens_per_s", ",.0f"),
        "{:.2f} ({:.2f} to {:.2f})".format(*result["ratio"]),
        f"{cell('peak_mib', ',.0f')} ({memory:.2f})",
        cell("flops_per_s", ",.0f", 1e9),
        cell("share", ".1%"),
    ]


def remarks(report):
    """Yield what failed, what follows from the rows, and what was not as in a real run."""
    done = {row["name"]: row for row in report["rows"] if "failed" not in row}
    settings, modes = report["settings"], {row["mode"] for row in done.values()}
    yield from (f"{r['name']} failed: {r['failed']}" for r in report["rows"] if "failed" in r)
    for name, row in done.items():
        ours, full = row["ours"], done.get(name.replace("LoRA", "full-model"))
        if row["mode"] == "full-model" and row["simcse"] and row["batch_size"] == 16:
            hours = ours["seconds_per_step"] * PAPER_STEPS / 3600
            paper = f"the paper's longest run ({PAPER_STEPS:,} steps, {PAPER_HOURS} h)"
            yield f"{name}: {paper} would take {hours:.2f} h of training steps"
        if row["mode"] == "LoRA" and full:
            speed = ours["sentences_per_s"] / full["ours"]["sentences_per_s"]
            small, large = ours["state_mib"], full["ours"]["state_mib"]
            state = f"{small:,.0f} of {large:,.0f} MiB of training state ({small / large:.2f})"
            yield f"{name}: {speed:.2f} × the speed of full-model, {state}"
    if "last-linear-layer" in modes:
        count = f"up to {settings['frozen_examples']}" if settings["frozen_examples"] else "all"
        yield f"last-linear-layer: ours with the vectors of {count} examples of each task kept"
    if "evaluation" in modes:
        count = settings["eval_examples"]
        extent = f"up to {count} examples of each dev set" if count else "whole dev sets"
        yield f"evaluation: {extent}"
    if seconds := report.get("startup"):
        single = ", ".join(f"{value:.1f}" for value in seconds)
        yield f"from command to first step: {statistics.median(seconds):.1f} s ({single})"


def hardware():
    """This machine in words."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    model = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    cpu = model[1] if model else platform.processor() or platform.machine()
    bf16 = " ".join(f for f in ("avx512_bf16", "amx_bf16") if f in text.split()) or "no bf16"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {os.cpu_count()} cores ({bf16}), {memory:.1f} GiB"


def versions():
    """Versions of everything that computes; None for what is not installed."""
    installed = {package.name: package.version for package in distributions()}
    settings = {"shell": True, "cwd": ROOT, "capture_output": True, "text": True}
    git = subprocess.run("git describe --always --dirty", **settings)
    found = {package: installed.get(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found, "commit": git.stdout.strip() or None}


def head_lines(report):
    """Yield command, hardware, versions and data."""
    devices = sorted({row["device"] for row in report["rows"] if "device" in row})
    yield f"command: {report['command']}"
    yield f"hardware: {'; '.join([*devices, report['hardware']])}"
    yield "versions: " + ", ".join(f"{name} {text}" for name, text in report["versions"].items())
    if report["examples"]:
        counts = ", ".join(f"{name} {number:,}" for name, number in report["examples"].items())
        yield f"encoder: {report['encoder']}; data: {report['data']} ({counts} examples)"
    if report["load"] > 0.3 * os.cpu_count():
        load = f"a load of {report['load']:.2f} before the start"
        yield f"warning: {load}: other processes were at work, and the figures mean little"


def print_report(report):
    """Print the report in Markdown, to paste into RESULTS.md."""
    print("\n".join(f"- {line}" for line in head_lines(report)), end="\n\n")
    if report["rows"]:
        rows = [HEADER, ["---"] * len(HEADER), *map(table_row, report["rows"])]
        print("\n".join(f"| {' | '.join(row)} |" for row in rows), end="\n\n")
    print("\n".join(f"- {line}" for line in remarks(report)))


def write_json(path, report):
    """Write every figure measured so far, if a file was named."""
    if path:
        Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------- the command


# fmt: off
def parse_flags(argv=None):
    """The command line, with the defaults that depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    extent = parser.add_mutually_exclusive_group().add_argument
    extent("--all", action="store_true", help="the full grid of modes, batch sizes and precisions, "
        "and whole dev sets (default: the main table)")
    extent("--rows", nargs="+", metavar="NAME", help="rows of the full grid; may have * and ?")
    add("--list", action="store_true", help="print the rows' names and end")
    add("--startup", action="store_true", help="seconds from the training command to its first "
        "step, and nothing else unless --all or --rows is given")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--encoder", type=full_path, help="bundled, base (BERT-base's size, random weights) or a "
        "folder (default: bundled, on CUDA base)")
    add("--data_dir", type=full_path, metavar="DIR", help="(default: data, or data/sample)")
    add("--batch_sizes", nargs="+", type=int, metavar="N", help="(default: 16; with --all or "
        "--rows 8 16 64; on CUDA 16 64 256)")
    add("--steps", type=int, help="steps of each turn (default: 3, on CUDA 20)")
    add("--repeats", type=int, help="turns of each side (default: 3, on CUDA 5)")
    add("--warmup", type=int, help="steps before the first turn (default: 4, on CUDA 20)")
    add("--frozen_examples", type=int, default=1600, metavar="N", help="training examples of each "
        "task in last-linear-layer, 0 for all (default: %(default)s)")
    add("--eval_examples", type=int, metavar="N", help="dev examples of each task, 0 for all "
        "(default: all with --all or on CUDA, else 500)")
    add("--threads", type=int, help="CPU threads of each side (default: torch's choice)")
    add("--dropout", type=float, help="(default: the encoder's own)")
    add("--workload", metavar="DIR", help="keep the token ids in this folder, or use those in it, "
        "such as on a machine without the data or a vocabulary")
    add("--json", metavar="OUT", help="write every measured figure to this file")
    flags = parser.parse_args(argv)
    is_cuda, is_grid = flags.device == "cuda", bool(flags.all or flags.rows)
    # What is not given, on CPU and on CUDA.
    defaults = {"steps": (3, 20), "repeats": (3, 5), "warmup": (4, 20)}
    defaults["encoder"] = ("bundled", "base")
    defaults["batch_sizes"] = ([8, 16, 64] if is_grid else [16], [16, 64, 256])
    defaults["eval_examples"] = (0 if flags.all else 500, 0)
    for name, of_device in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, of_device[is_cuda])
    return flags
# fmt: on


def full_path(text):
    """An argparse type: a folder's full path, since the workers run in other folders."""
    return str(Path(text).resolve()) if Path(text).is_dir() else text


def select_rows(flags):
    """The rows of the full grid that the command line asks for."""
    patterns = ["*"] if flags.all else flags.rows
    patterns = patterns or ([] if flags.startup else MAIN_TABLE[flags.device].split())
    # SimCSE cannot train a frozen encoder; evaluation is at batch 16.
    trained = product(MODES, (True, False), flags.batch_sizes, KINDS)
    rows = [Row(*values) for values in trained if values[:2] != ("last-linear-layer", True)]
    rows += [Row("evaluation", False, 16, kind) for kind in KINDS]
    return [row for row in rows if any(fnmatch.fnmatch(row.name, p) for p in patterns)]


def measure_rows(rows, flags, report):
    """Prepare the data, measure one row after the other, and put their figures into `report`."""
    needed = {name: getattr(flags, name) for name in ("workload", "encoder", "data_dir")}
    with WorkerProcess("ours.py", flags.folder) as ours:
        encoder = ours.ask("prepare", **needed)["encoder"]
    workload, report["encoder"] = Path(flags.workload), flags.encoder
    report["data"] = (workload / "origin.txt").read_text("utf-8").strip()
    for path in sorted(workload.glob("*.csv")):
        report["examples"][path.stem] = len(path.read_text().splitlines()) - 1
    with WorkerProcess("worker.py", flags.folder) as products:
        products.ask("open", device=flags.device, threads=flags.threads)
        for number, row in enumerate(rows, 1):
            say(f"{row.name} ({number} of {len(rows)})")
            try:
                figures = measure(row, encoder, products, flags)
            except WorkerFailed as error:
                say(f"  failed: {error}")
                figures = {"failed": str(error)}
            report["rows"].append({"name": row.name, **row._asdict(), **figures})
            write_json(flags.json, report)  # the full grid takes hours


def main(argv=None):
    """Measure and print. Returns the exit code: 1 if a row failed, 2 for a wrong name."""
    flags = parse_flags(argv)
    rows = select_rows(flags)
    if flags.list:
        print("\n".join(row.name for row in rows))
        return 0
    if not rows and not flags.startup:
        say("error: --rows: none of that name; --list --all prints all")
        return 2
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/throughput.py", *words])
    report = {"command": command, "hardware": hardware(), "load": os.getloadavg()[0]}
    settings = dict(vars(flags))
    report |= {"versions": versions(), "settings": settings, "rows": [], "examples": {}}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers, removes the folder
    with tempfile.TemporaryDirectory() as folder:
        flags.folder = folder
        flags.workload = str(Path(flags.workload or f"{folder}/workload").resolve())
        Path(flags.workload).mkdir(parents=True, exist_ok=True)
        try:
            if flags.startup:
                say("from command to first step")
                report["startup"] = measure_startup(flags)
            if rows:
                measure_rows(rows, flags, report)
        except WorkerFailed as error:
            say(f"error: {error}")
            return 1
    print_report(report)
    write_json(flags.json, report)
    return int(any("failed" in row for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
