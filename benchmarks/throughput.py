"""How fast is training here, next to the same job written with `transformers` and `peft`?

    python benchmarks/throughput.py                    # the main table, some 5 minutes on 2 cores
    python benchmarks/throughput.py --all --json all.json
    python benchmarks/throughput.py --device cuda --encoder base
    python benchmarks/throughput.py --startup

Ours and the reference each live in a process of their own and compute by turns, A B A B …, on the
same batches. Before a row is timed, both give the losses of one batch with dropout off, and the
row fails where they differ. See benchmarks/README.md for what each column means.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODES = ("full-model", "LoRA", "last-linear-layer")
KINDS = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "default": ("auto", "fp32")}
# Our steps for each step of the reference: with its vectors kept, a frozen encoder's take few ms.
OUR_STEPS = {"last-linear-layer": 20}
# Encoder work of a step in units of its forward pass: LoRA has no gradients of large weights, a
# frozen encoder none at all.
WORK = {"full-model": 3, "LoRA": 2, "last-linear-layer": 1, "evaluation": 1}
LOSSES_AGREE = {"fp32": 1e-4, "bf16": 5e-2}  # relative to the sum of all losses
SQUARE = {"cpu": 2048, "cuda": 8192}  # of the square product that is measured for comparison
# The paper's longest run: 100 epochs of 2,000 steps, batch 16, SimCSE, full-model; hours it took.
PAPER_STEPS, PAPER_HOURS = 200_000, 14.47


@dataclass(frozen=True)
class Row:
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


def every_row(batch_sizes):
    """The full grid. SimCSE cannot train a frozen encoder; evaluation is at batch 16."""
    rows = [
        Row(mode, simcse, batch_size, kind)
        for mode in MODES
        for simcse in (True, False)
        for batch_size in batch_sizes
        for kind in KINDS
        if not (simcse and mode == "last-linear-layer")
    ]
    return rows + [Row("evaluation", False, 16, kind) for kind in KINDS]


def main_rows(device, batch_sizes):
    """The rows of the main table."""
    if device == "cuda":
        trained = [Row(m, True, b, "bf16") for m in MODES[:2] for b in batch_sizes]
        return [*trained, Row(MODES[2], False, 16, "bf16"), Row("evaluation", False, 16, "bf16")]
    modes = [("full-model", kind) for kind in KINDS] + [(mode, "default") for mode in MODES[1:]]
    rows = [Row(m, m != "last-linear-layer", b, kind) for m, kind in modes for b in batch_sizes]
    return [*rows, Row("evaluation", False, 16, "default")]


# ---------------------------------------------------------------------------------- the processes


class WorkerFailed(Exception):
    """A worker answered with an error, or died."""


class Worker:
    """A process that answers requests; `file` is one of ours.py, reference.py, worker.py."""

    def __init__(self, file, folder):
        self.file, self.log = file, Path(folder) / f"{file}.log"
        paths = [HERE, *([ROOT] if file == "ours.py" else [])]
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths += [path for path in inherited if path and Path(path).resolve() != ROOT]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(HERE / file)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, env=env,
                cwd=ROOT if file == "ours.py" else folder,
            )  # fmt: skip

    def ask(self, do, **values):
        """Send a request and wait for its answer. Raises `WorkerFailed`."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.process.stdin.flush()
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

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(BrokenPipeError):  # of one that has ended already
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


# ---------------------------------------------------------------------------------------- one row


class Pair:
    """Both sides of a row, opened on the same encoder, heads, data and recipe."""

    def __init__(self, row, ours, reference, prepared, settings):
        self.row, self.ours, self.reference, self.settings = row, ours, reference, settings
        mode = "full-model" if row.mode == "evaluation" else row.mode
        our_precision, reference_precision = KINDS[row.kind]
        shared = {
            "encoder": prepared["encoder"], "mode": mode, "simcse": row.simcse,
            "device": settings.device, "workload": settings.workload,
            "heads": str(Path(settings.folder) / "heads.safetensors"),
            "dropout": settings.dropout, "threads": settings.threads,
        }  # fmt: skip
        examples = settings.frozen_examples if mode == "last-linear-layer" else 0
        self.opened = ours.ask("open", precision=our_precision, batch_size=row.batch_size,
                               examples=examples, **shared)  # fmt: skip
        other = reference.ask("open", precision=reference_precision,
                              recipe=self.opened["recipe"], **shared)  # fmt: skip
        self.precisions = self.opened["precision"], other["precision"]
        if self.opened["groups"] != other["groups"]:
            raise WorkerFailed(
                f"parameter groups differ: {self.opened['groups']} and {other['groups']}"
            )

    def losses(self):
        """Losses of the first batch with dropout off, ours and the reference's."""
        rows = self.ours.ask("rows", first=0, steps=1)["rows"][0]
        return self.ours.ask("losses", step=0), self.reference.ask("losses", rows=rows)

    def check_losses(self):
        """Raise `WorkerFailed` where the two do not compute the same losses."""
        tolerance = LOSSES_AGREE["fp32" if set(self.precisions) == {"fp32"} else "bf16"]
        check_same_losses(*self.losses(), tolerance)

    def train_ours(self, first, steps):
        """Our next steps."""
        return self.ours.ask("train", first=first, steps=steps)

    def train_reference(self, first, steps):
        """The same steps by the reference."""
        rows = self.ours.ask("rows", first=first, steps=steps)["rows"]
        return self.reference.ask("train", rows=rows)

    def alternate(self, between):
        """Warm up, then yield (ours, reference) of each turn; `between(ours)` runs after each."""
        turns = self.evaluations() if self.row.mode == "evaluation" else self.trainings()
        for ours, reference in turns:
            for name in ("sentences", "tokens"):
                if ours["steps"] == reference["steps"] and ours[name] != reference[name]:
                    raise WorkerFailed(f"{name} differ: {ours[name]} and {reference[name]}")
            between(ours)
            yield ours, reference

    def trainings(self):
        """Train by turns; with a frozen encoder, ours from its second pass over the examples on."""
        steps, first = self.settings.steps, self.settings.warmup
        if self.row.mode == "last-linear-layer":
            first = self.opened["steps_per_pass"]
        self.train_ours(0, first)
        self.train_reference(0, self.settings.warmup)
        our_steps = steps * OUR_STEPS.get(self.row.mode, 1)
        for _ in range(self.settings.repeats):
            ours = self.train_ours(first, our_steps)
            reference = self.train_reference(first, steps)
            yield ours | {"steps": our_steps}, reference | {"steps": steps}
            first += our_steps

    def evaluations(self):
        """Evaluate by turns, after a few unmeasured examples."""
        self.ours.ask("evaluate", limit=32)
        self.reference.ask("evaluate", limit=32, batch_size=self.row.batch_size)
        limit = self.settings.eval_examples
        for _ in range(self.settings.repeats):
            ours = self.ours.ask("evaluate", limit=limit)
            reference = self.reference.ask("evaluate", limit=limit, batch_size=self.row.batch_size)
            yield ours | {"steps": 1}, reference | {"steps": 1}


def check_same_losses(ours, reference, tolerance):
    """Raise `WorkerFailed` where a loss is missing or off by more than `tolerance` × the sum."""
    if set(ours) != set(reference):
        raise WorkerFailed(f"other losses: {sorted(ours)} and {sorted(reference)}")
    limit = tolerance * sum(map(abs, ours.values()))
    for name in ours:
        if not abs(ours[name] - reference[name]) <= limit:
            raise WorkerFailed(f"loss {name}: {ours[name]:.6f} and {reference[name]:.6f}")


def measure(row, prepared, products, settings):
    """Measure one row; returns its figures. Raises `WorkerFailed`."""
    with (
        Worker("ours.py", settings.folder) as ours,
        Worker("reference.py", settings.folder) as reference,
    ):
        pair = Pair(row, ours, reference, prepared, settings)
        pair.check_losses()
        config, rates = prepared["config"], {"ours": [], "reference": []}

        def measure_products(turn):
            tokens = min(65536, max(64, turn["tokens"] // turn["steps"]))
            if row.mode == "evaluation":
                tokens = 4096
            for side, precision in zip(rates, pair.precisions, strict=True):
                answer = products.ask("layer", precision=precision, tokens=tokens,
                                      hidden=config["hidden_size"],
                                      intermediate=config["intermediate_size"])  # fmt: skip
                rates[side].append(answer["flops_per_s"])

        turns = []
        for turn in pair.alternate(measure_products):
            turns.append(turn)
            say(f"  {turn[0]['seconds'] / turn[0]['steps']:.4f} s and "
                f"{turn[1]['seconds'] / turn[1]['steps']:.4f} s")  # fmt: skip
        figures = {"device": pair.opened["device"]}
        for number, side in enumerate(rates):
            of_side = [turn[number] for turn in turns]
            worker = (ours, reference)[number]
            figures[side] = {
                "precision": pair.precisions[number],
                **summary(of_side, row.mode, config, statistics.median(rates[side])),
                **worker.ask("memory"),
                "turns": of_side,
            }
    if row.mode == "last-linear-layer":  # nothing is encoded
        figures["ours"].update(flops_per_s=None, share=None)
    speeds = [[turn["sentences"] / turn["seconds"] for turn in pair] for pair in turns]
    ratios = [a / b for a, b in speeds]
    figures["ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return figures


def summary(turns, mode, config, matrix_rate):
    """Medians over the turns of one side."""
    work = [WORK[mode] * forward_flops(config, turn) / turn["seconds"] for turn in turns]
    flops = statistics.median(work)
    return {
        "sentences_per_s": statistics.median(t["sentences"] / t["seconds"] for t in turns),
        "tokens_per_s": statistics.median(t["tokens"] / t["seconds"] for t in turns),
        "seconds_per_step": statistics.median(t["seconds"] / t["steps"] for t in turns),
        "flops_per_s": flops,
        "matrix_flops_per_s": matrix_rate,
        "share": flops / matrix_rate,
    }


def forward_flops(config, turn):
    """FLOP of the encoder's matrix products for real tokens: linear layers and attention."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    linear = 2 * (4 * hidden**2 + 2 * hidden * wide) * turn["tokens"]
    attention = 4 * hidden * turn["squares"]
    return config["num_hidden_layers"] * (linear + attention)


# ----------------------------------------------------------------------------- from command to step


def measure_startup(settings, repeats):
    """Seconds from the training command to the end of its first step, `repeats` times."""
    encoder = "bundled" if settings.encoder == "base" else settings.encoder
    seconds = []
    for number in range(repeats):
        runs = Path(settings.folder) / f"startup-{number}"
        command = [sys.executable, "multitask_classifier.py", "--pretrained", encoder,
                   "--log_every", "1", "--runs_dir", str(runs)]  # fmt: skip
        command += ["--data_dir", settings.data_dir] if settings.data_dir else []
        began = time.perf_counter()
        # Standard error too: on a terminal it would have a progress bar in place of the lines.
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True) as process:  # fmt: skip
            line = ""
            for line in process.stdout:
                if line.startswith("step 1/"):
                    break
            seconds.append(round(time.perf_counter() - began, 2))
            process.kill()
        if not line.startswith("step 1/"):
            raise WorkerFailed(f"{shlex.join(command[1:])}: ended before its first step: {line}")
        say(f"  {seconds[-1]:.2f} s to the first step")
    return seconds


# --------------------------------------------------------------------------------------- the report

HEADER = ("row", "precision", "sentences/s", "tokens/s", "ratio (min to max)", "peak MiB",
          "GFLOP/s", "of matrix products")  # fmt: skip


def table_row(result):
    """A row's cells; where there are two figures, ours and the reference's."""
    if "failed" in result:
        return [result["name"], "failed", *["–"] * (len(HEADER) - 2)]
    sides = result["ours"], result["reference"]

    def both(key, form, unit=1):
        values = [side[key] for side in sides]
        return " / ".join("–" if v is None else format(v / unit, form) for v in values)

    middle, low, high = result["ratio"]
    memory = sides[0]["peak_mib"] / sides[1]["peak_mib"]
    return [
        result["name"],
        f"{sides[0]['precision']} / {sides[1]['precision']}",
        both("sentences_per_s", ",.0f"),
        both("tokens_per_s", ",.0f"),
        f"{middle:.2f} ({low:.2f} to {high:.2f})",
        f"{both('peak_mib', ',.0f')} ({memory:.2f})",
        both("flops_per_s", ",.0f", 1e9),
        both("share", ".1%"),
    ]


def text_table(lines):
    """Aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown_table(lines):
    """The same for RESULTS.md."""
    header, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([header, "|---" * len(HEADER) + "|", *body])


def remarks(report):
    """What follows from several rows, and what was not as in a real run."""
    done = {row["name"]: row for row in report["rows"] if "failed" not in row}
    lines = [f"{row['name']} failed: {row['failed']}" for row in report["rows"] if "failed" in row]
    for precision, rate in report["square_flops_per_s"].items():
        lines.append(f"square {precision} matrix product: {rate / 1e9:,.0f} GFLOP/s")
    for name, row in done.items():
        if row["mode"] == "full-model" and row["simcse"] and row["batch_size"] == 16:
            hours = row["ours"]["seconds_per_step"] * PAPER_STEPS / 3600
            lines.append(f"{name}: the paper's longest run ({PAPER_STEPS:,} steps, "
                         f"{PAPER_HOURS} h) extrapolated to {hours:.2f} h of training steps")
        full = done.get(name.replace("LoRA", "full-model"))
        if row["mode"] == "LoRA" and full:
            small, large = row["ours"]["state_mib"], full["ours"]["state_mib"]
            speed = row["ours"]["sentences_per_s"] / full["ours"]["sentences_per_s"]
            lines.append(f"{name}: {speed:.2f} × full-model's speed; weights, gradients and "
                         f"optimiser state {small:,.0f} of {large:,.0f} MiB ({small / large:.2f})")
    modes = {row["mode"] for row in done.values()}
    if "last-linear-layer" in modes:
        examples = report["settings"]["frozen_examples"] or "all"
        lines.append(f"last-linear-layer: ours from the second pass over {examples} examples of "
                     f"each task on, all their vectors kept")  # fmt: skip
    if "evaluation" in modes:
        examples = report["settings"]["eval_examples"]
        extent = f"the first {examples} examples of each dev set" if examples else "whole dev sets"
        lines.append(f"evaluation: {extent}")
    if report.get("startup"):
        middle = statistics.median(report["startup"])
        lines.append(f"from command to first step: {middle:.1f} s "
                     f"({', '.join(f'{s:.1f}' for s in report['startup'])})")
    return lines


def hardware():
    """This machine in words."""
    cpu, flags = platform.processor() or platform.machine(), ()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in info.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
            if ":" in line
        )
        cpu = fields.get("model name", cpu)
        flags = [f for f in ("avx512_bf16", "amx_bf16") if f in fields.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": os.cpu_count(), "bf16": flags, "memory_gib": round(memory, 1),
            "load": [round(x, 2) for x in os.getloadavg()]}  # fmt: skip


def versions():
    """Of everything that computes."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                         capture_output=True, check=False)  # fmt: skip
    return found | {"commit": git.stdout.strip() or None}


def head_lines(report):
    """Hardware, versions and command."""
    machine = report["hardware"]
    devices = sorted({row["device"] for row in report["rows"] if "device" in row})
    yield f"command: {report['command']}"
    yield (f"hardware: {', '.join(devices)}; {machine['cpu']}, {machine['cores']} cores "
           f"({' '.join(machine['bf16']) or 'no bf16'}), {machine['memory_gib']} GiB")  # fmt: skip
    numbers = (f"{name} {number}" for name, number in report["versions"].items())
    yield f"versions: {', '.join(numbers)}"
    if report["rows"]:
        counts = ", ".join(f"{name} {number:,}" for name, number in report["examples"].items())
        yield f"encoder: {report['encoder']}; data: {report['data']} ({counts} examples)"
    if machine["load"][0] > 0.3 * machine["cores"]:
        yield (f"warning: a load of {machine['load'][0]} before the start: other processes were "
               f"at work, and the figures mean little")  # fmt: skip


def print_report(report):
    """The text table, then the Markdown to paste into RESULTS.md."""
    lines = [list(HEADER), *map(table_row, report["rows"])] if report["rows"] else []
    head, after = list(head_lines(report)), remarks(report)
    print("\n".join(head), end="\n\n")
    if lines:
        print(text_table(lines), end="\n\n")
    print("\n".join(after), end="\n\n--- Markdown ---\n\n")
    print("\n".join(f"- {line}" for line in head), end="\n\n")
    if lines:
        print(markdown_table(lines), end="\n\n")
    print("\n".join(f"- {line}" for line in after))


def write_json(path, report):
    """Write every figure measured so far, where a file was named."""
    if path:
        Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def say(text):
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------- the command


def get_args(argv=None):
    """The command line; what depends on the device is filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="the main table: the default")
    extent.add_argument("--all", action="store_true", help="the full grid of modes, batch sizes "
                        "and precisions, and whole dev sets")  # fmt: skip
    extent.add_argument("--rows", nargs="+", metavar="NAME", help="these rows of the full grid; "
                        "* and ? match as in file names")  # fmt: skip
    add("--list", action="store_true", help="print the rows' names and end")
    add("--startup", action="store_true", help="seconds from the training command to its first "
        "step, and nothing else unless --all or --rows is given")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--encoder", help="bundled, base (BERT-base's size, random weights) or a folder; default "
        "bundled, on CUDA base")
    add("--data_dir", metavar="DIR", help="default data, else the sample in data/sample")
    add("--batch_sizes", nargs="+", type=int, metavar="N", help="default 16 (--all: 8 16 64); "
        "on CUDA 16 64 256")
    add("--steps", type=int, help="steps of each turn, default 3, on CUDA 20")
    add("--repeats", type=int, help="turns of each side, default 3, on CUDA 5")
    add("--warmup", type=int, help="unmeasured steps of each side, default 4, on CUDA 20")
    add("--frozen_examples", type=int, default=1600, metavar="N", help="training examples of each "
        "task in last-linear-layer, default 1600; 0 for all")
    add("--eval_examples", type=int, metavar="N", help="dev examples of each task, 0 for all; "
        "default all with --all or on CUDA, else 500")
    add("--threads", type=int, help="CPU threads of each side, default torch's choice")
    add("--dropout", type=float, help="default the encoder's own rate")
    add("--workload", metavar="DIR", help="keep the token ids here, or take those that are here, "
        "on a machine without the data or a vocabulary, say")
    add("--json", metavar="OUT", help="write every measured figure to this file")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    args.encoder = args.encoder or ("base" if cuda else "bundled")
    args.batch_sizes = args.batch_sizes or (
        [16, 64, 256] if cuda else [8, 16, 64] if args.all or args.rows else [16]
    )
    for name, on_cpu, on_cuda in (("steps", 3, 20), ("repeats", 3, 5), ("warmup", 4, 20)):
        if getattr(args, name) is None:
            setattr(args, name, on_cuda if cuda else on_cpu)
    if args.eval_examples is None:
        args.eval_examples = 0 if args.all or cuda else 500
    for name in ("data_dir", "workload"):  # the workers run elsewhere
        if getattr(args, name):
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    if args.encoder not in ("base", "bundled") and Path(args.encoder).is_dir():
        args.encoder = str(Path(args.encoder).resolve())
    return args


def select_rows(args):
    """The rows that the command line asks for."""
    if args.all:
        return every_row(args.batch_sizes)
    if args.rows:
        return [row for row in every_row(args.batch_sizes)
                if any(fnmatch.fnmatch(row.name, pattern) for pattern in args.rows)]  # fmt: skip
    return [] if args.startup else main_rows(args.device, args.batch_sizes)


def measure_rows(rows, args, report):
    """Prepare the data, measure the rows one after the other and put their figures in `report`."""
    with Worker("ours.py", args.folder) as ours:
        prepared = ours.ask("prepare", workload=args.workload, encoder=args.encoder,
                            data_dir=args.data_dir)  # fmt: skip
    report.update(examples=prepared["rows"], encoder=args.encoder, data=prepared["data"])
    with Worker("worker.py", args.folder) as products:
        products.ask("open", device=args.device, threads=args.threads)
        for number, row in enumerate(rows, 1):
            say(f"{row.name} ({number} of {len(rows)})")
            try:
                figures = measure(row, prepared, products, args)
            except WorkerFailed as error:
                say(f"  failed: {error}")
                figures = {"failed": str(error)}
            report["rows"].append({"name": row.name, **asdict(row), **figures})
            write_json(args.json, report)  # the full grid takes hours
        used = {row[side]["precision"] for row in report["rows"] if "failed" not in row
                for side in ("ours", "reference")}  # fmt: skip
        for precision in sorted(used):
            answer = products.ask("square", precision=precision, size=SQUARE[args.device])
            report["square_flops_per_s"][precision] = answer["flops_per_s"]


def main(argv=None):
    """Measure and print. Returns the exit code: 1 where a row failed."""
    args = get_args(argv)
    rows = select_rows(args)
    if args.list:
        print("\n".join(row.name for row in rows))
        return 0
    if not rows and not args.startup:
        say("error: --rows: none of that name; --list --all prints all")
        return 2
    given = sys.argv[1:] if argv is None else argv
    report = {
        "command": shlex.join(["python", "benchmarks/throughput.py", *given]),
        "hardware": hardware(), "versions": versions(), "settings": dict(vars(args)),
        "examples": {}, "square_flops_per_s": {}, "rows": [],
    }  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers, removes the folder
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        args.workload = args.workload or str(Path(folder) / "workload")
        Path(args.workload).mkdir(parents=True, exist_ok=True)
        try:
            if args.startup:
                say("from command to first step")
                report["startup"] = measure_startup(args, args.repeats)
            if rows:
                measure_rows(rows, args, report)
        except WorkerFailed as error:
            say(f"error: {error}")
            return 1
    print_report(report)
    write_json(args.json, report)
    return int(any("failed" in row for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
