"""How is a run kept, continued, logged and stopped?

    runs/<mode>[-<suffix>]/
        run.json                what was asked for, of what, with what
        metrics.jsonl           a line per logged step and per evaluation
        best -> best-<step>     the best model by the dev score; a link, exchanged in one step
        state/step-<number>/    the last two complete states to continue from
        predictions/            prediction files, and the scores behind them

Every file appears under its name complete or not at all: it is written beside, flushed to disk and
renamed. Folders with weights carry the SHA-256 of each of their files.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from base_bert import file_sha256, read_tensors, write_tensors
from config import UserError

TEMPORARY = ".tmp-"
STATES_KEPT = 2
SUFFIX_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class OutputError(Exception):
    """Something could not be written."""

    exit_code = 1


class Stopped(Exception):
    """A signal asked the run to end, and it ended in good order: exit code 128 + the signal."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}; state saved")
        self.exit_code = 128 + number


class State(NamedTuple):
    """What a run continues from: plain values, and tensors by file and name."""

    values: dict
    tensors: dict


# --------------------------------------------------------------------------- files, all or nothing


@contextlib.contextmanager
def output_errors(path):
    """Turn whatever a full or read-only disk raises into an `OutputError` that names the path."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(_existing(Path(path))).free
            raise OutputError(f"{path}: not written: {error} ({free:,} bytes free)") from error
        raise OutputError(f"{path}: not written: {error}") from error


def _existing(path):
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def flush_to_disk(path):
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path, text):
    """Write a text file, all or nothing: an earlier file of that name stays until the end."""
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with output_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8", newline="")
            flush_to_disk(temporary)
            os.replace(temporary, path)
            flush_to_disk(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill; on leaving the block it gets a manifest, is flushed and named `path`."""
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with output_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            files = sorted(f for f in temporary.rglob("*") if f.is_file())
            hashes = {str(f.relative_to(temporary)): file_sha256(f) for f in files}
            (temporary / "manifest.json").write_text(json.dumps(hashes, indent=2) + "\n")
            for place in temporary.rglob("*"):
                flush_to_disk(place)
            flush_to_disk(temporary)
            os.rename(temporary, path)
            flush_to_disk(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def damage(folder):
    """What is wrong with a folder that `new_folder` wrote, None where every hash is right."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in hashes.items():
            if file_sha256(folder / name) != digest:
                return f"{folder / name}: damaged (SHA-256 differs from manifest.json)"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{folder}: damaged ({error})"
    return None


# ------------------------------------------------------------------------------------- the folder


def run_name(mode, suffix):
    """Folder name of a run. Raises `UserError` where the suffix is not fit for one."""
    if suffix and not SUFFIX_PATTERN.fullmatch(suffix):
        raise UserError(
            f"--model_file_suffix {suffix[:40]!r}; expected 1 to 100 letters, digits, "
            f"'.', '_' and '-', beginning with a letter or digit"
        )
    return f"{mode}-{suffix}" if suffix else mode


class RunFolder:
    """One run's folder, locked while the run is alive (the lock of a dead process is none)."""

    def __init__(self, path):
        self.path = Path(path)
        self._lock = None
        self._began = time.perf_counter()  # minus what the run took before it was continued

    def open(self, overwrite=False):
        """Create the folder or take it over; with `overwrite` an earlier run in it is removed.

        Raises `UserError` where another process is at work in it.
        """
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            raise UserError(f"{self.path}: another run is at work in it (process {owner})") from None
        with output_errors(self.path):
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
            if overwrite:
                self._remove(p for p in self.path.iterdir() if p.name != ".lock")
            self._remove(self.path.rglob(f"{TEMPORARY}*"))  # of a process that was killed
            self._remove_all_but(self.best.resolve())

    def holds_run(self):
        """Whether a run was ever started here."""
        return (self.path / "run.json").exists()

    @staticmethod
    def _remove(places):
        for place in list(places):
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink(missing_ok=True)

    def _remove_all_but(self, best):
        self._remove(p for p in self.path.glob("best-*") if p.name != best.name)

    # ------------------------------------------------------------------------- what was asked for

    def write_description(self, values):
        """Write `run.json`."""
        write_file(self.path / "run.json", json.dumps(values, indent=2) + "\n")

    def description(self):
        """The values of `run.json`. Raises `UserError` where it is missing or damaged."""
        try:
            return json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a run's folder: {error}") from error

    # -------------------------------------------------------------------------------- the metrics

    @property
    def metrics_file(self):
        """`metrics.jsonl`: one JSON object a line."""
        return self.path / "metrics.jsonl"

    def seconds(self):
        """Seconds that the run has taken so far, up to the state it was continued from."""
        return round(time.perf_counter() - self._began, 1)

    def log(self, **values):
        """Append one line to the metrics."""
        with output_errors(self.metrics_file), open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self):
        """All logged lines as dicts; a last line that a kill cut short is none."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def forget_metrics_after(self, step, evaluated_step):
        """Drop the lines of steps and evaluations that will be done again."""
        kept = [
            line
            for line in self.metrics()
            if line["step"] <= (evaluated_step if line["kind"] == "eval" else step)
        ]
        write_file(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        self._began = time.perf_counter() - max([line["seconds"] for line in kept], default=0)

    # ----------------------------------------------------------------------------- the best model

    @property
    def best(self):
        """Path of the best model: a link to the folder of the step that gave it."""
        return self.path / "best"

    def best_step(self):
        """Step of the linked best model, None where there is none."""
        if not self.best.is_symlink():
            return None
        return int(self.best.readlink().name.split("-")[1].split(".")[0])

    def save_best(self, step, write):
        """Exchange the best model for the one that `write(folder)` writes."""
        number = 0
        while (target := self.path / f"best-{step:08d}.{number}").exists():
            number += 1
        with new_folder(target) as folder:
            write(folder)
        with output_errors(self.best):
            link = self.path / f"{TEMPORARY}best"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            os.replace(link, self.best)
            flush_to_disk(self.path)
            self._remove_all_but(target)

    # ---------------------------------------------------------------------- states to go on from

    def save_state(self, values, tensors):
        """Keep a complete state: `values` (JSON) and `tensors` (file name -> name -> tensor)."""
        target = self.path / "state" / f"step-{values['step']:08d}"
        if target.exists():
            if damage(target) is None and self._read_state(target).values == values:
                return
            shutil.rmtree(target)
        with new_folder(target) as folder:
            (folder / "state.json").write_text(json.dumps(values, indent=2) + "\n")
            for name, group in tensors.items():
                write_tensors(folder / f"{name}.safetensors", group)
        with output_errors(target):
            self._remove(self._states()[STATES_KEPT:])

    def _states(self):
        """Folders of complete states, newest first."""
        return sorted((self.path / "state").glob("step-*"), reverse=True)

    @staticmethod
    def _read_state(folder):
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = sorted(folder.glob("*.safetensors"))
        return State(values, {file.stem: read_tensors(file) for file in files})

    def load_state(self, say=print):
        """The newest whole state, None where none was ever completed.

        A damaged one is passed over with a word to `say`, and so is one whose best model is
        damaged. Raises `UserError` where none is whole.
        """
        folders = self._states()
        best_damage = damage(self.best) if self.best.is_symlink() else "no best model"
        for place, folder in enumerate(folders):
            problem = damage(folder)
            if problem is None:
                state = self._read_state(folder)
                best = state.values.get("best_step")
                if best is None or (best_damage is None and self.best_step() >= best):
                    self._remove(folders[:place])
                    return state
                problem = f"{folder}: its best model is not to be had: {best_damage}"
            say(f"warning: {problem}; trying the state before it")
        if folders:
            raise UserError(
                f"{self.path / 'state'}: no undamaged state among {len(folders)}; "
                f"start anew with --overwrite"
            )
        return None


class ReadOnlyRunFolder(RunFolder):
    """The run's folder as the processes beside the first see it: they write nothing."""

    def _nothing(self, *args, **kwargs):
        """Leave it to the first process."""

    open = write_description = log = forget_metrics_after = save_best = save_state = _nothing


def newest_run(runs="runs"):
    """The run whose best model is newest. Raises `UserError` where there is none."""
    found = [path.parent for path in Path(runs).glob("*/best") if path.exists()]
    if not found:
        raise UserError(f"{runs}/: no finished run; train one: python multitask_classifier.py")
    return max(found, key=lambda path: (path / "best").resolve().stat().st_mtime)


# -------------------------------------------------------------------------- signals, standard output


class StopSignals:
    """SIGINT and SIGTERM: the first asks for an orderly end, the second ends at once."""

    def __init__(self):
        self.number = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def check(self):
        """Raise `Stopped` where an end was asked for."""
        if self.number is not None:
            raise Stopped(self.number)


class UnbreakableStream:
    """Standard output or error that goes on when its reader has gone (`| head`)."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        """Write, or drop the text where nobody reads any more."""
        with contextlib.suppress(BrokenPipeError):
            return self._stream.write(text)
        return len(text)

    def flush(self):
        """Flush, or switch to the null device where nobody reads any more."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name):
        return getattr(self._stream, name)


def protect_streams():
    """Make the loss of a reader of standard output or error harmless."""
    sys.stdout, sys.stderr = UnbreakableStream(sys.stdout), UnbreakableStream(sys.stderr)


def run_script(main, argv=None):
    """Run a script's `main(argv)`, turn its failures into one line and an exit code.

    0 done; 1 input, output or memory; 2 the user's mistake; 3 numbers that are not finite; 128 + n
    ended by signal n. `--debug` shows the traceback.
    """
    protect_streams()
    try:
        main(argv)
        code = 0
    except SystemExit as error:
        code = error.code
    except Exception as error:
        if "--debug" in (sys.argv if argv is None else argv):
            traceback.print_exc()
        code = getattr(error, "exit_code", 1)
        print(f"error: {_one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    return code


def _one_line(error):
    text = " ".join(str(error).split())
    return text if hasattr(error, "exit_code") else f"{type(error).__name__}: {text}"
