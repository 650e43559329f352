"""How is a run kept, continued and logged?

    runs/<mode>[-<suffix>]/
        run.json                what was asked for, of what, with what
        metrics.jsonl           a line per logged step and per evaluation
        best -> best-<step>.0   the best model by the dev score; a link, exchanged in one step
        state/step-<number>.0/  the last two complete states to continue from
        predictions/            prediction files, and the scores behind them

Every file appears under its name complete or not at all: it is written beside, flushed to disk and
renamed; a folder is renamed before it is removed. Folders with weights carry the SHA-256 of each of
their files. A best model stays as long as one of the states counts on it.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from base_bert import file_sha256, read_tensors, write_tensors
from config import UserError
from script import say

TEMPORARY = ".tmp-"
STATES_KEPT = 2
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # of this file system
HELD = (BlockingIOError, PermissionError)  # a lock is another process's; the latter on SMB
SUFFIX_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class OutputError(Exception):
    """Something could not be written."""

    exit_code = 1


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
        reason = getattr(error, "strerror", None) or error
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(_existing(Path(path))).free
            raise OutputError(f"{path}: not written: {reason} ({free:,} bytes free)") from error
        raise OutputError(f"{path}: not written: {reason}") from error


def _existing(path):
    """The path, or the nearest folder above it that exists."""
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
    write_files({path: text})


@contextlib.contextmanager
def turns_in(folders):
    """Wait for other processes that write files into one of the folders, where locks are known.

    A folder of two paths is locked once, and all processes lock in one order: none waits for ever.
    """
    with contextlib.ExitStack() as stack:
        opened = {}
        for folder in folders:
            with output_errors(folder):
                descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            opened[status.st_dev, status.st_ino] = descriptor, folder
        for _, (descriptor, folder) in sorted(opened.items()):
            _wait_for_lock(descriptor, folder)
        yield


def _wait_for_lock(descriptor, folder):
    """Lock an open folder; says so where that has to wait for another process."""
    with contextlib.suppress(OSError):  # no locks here: nothing to wait for
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except HELD:
            say(f"waiting for another process that writes into {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def write_files(texts):
    """Write text files by path: all are written beside their names before the first is renamed.

    So a disk that fills up leaves every earlier file as it was. Of two spellings of one path the
    last counts; of two processes one waits for the other.
    """
    same = {Path(path).parent.resolve() / Path(path).name: path for path in texts}
    texts = {path: texts[path] for path in same.values()}
    paths = {path: Path(path).with_name(f"{TEMPORARY}{Path(path).name}") for path in texts}
    for path, temporary in paths.items():
        with output_errors(path):
            temporary.parent.mkdir(parents=True, exist_ok=True)
    with turns_in(temporary.parent for temporary in paths.values()):
        _write_and_rename(texts, paths)


def _write_and_rename(texts, paths):
    """Write `texts` to their temporary `paths`, then give all of them their names."""
    try:
        for path, temporary in paths.items():
            with output_errors(path):
                temporary.write_text(texts[path], encoding="utf-8", newline="")
                flush_to_disk(temporary)
        for path, temporary in paths.items():
            with output_errors(path):
                os.replace(temporary, path)
        for folder in {temporary.parent for temporary in paths.values()}:
            with output_errors(folder):
                flush_to_disk(folder)
    except BaseException:
        for temporary in paths.values():
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
    """One run's folder, locked while the run is alive (the lock of a dead process is ignored)."""

    def __init__(self, path):
        self.path = Path(path)
        self._lock = None
        self._began = time.perf_counter()  # minus what the run took before it was continued

    def open(self):
        """Lock the folder, made where it is missing, and clear away what a kill left half done.

        Raises `UserError` where another process uses it, `OutputError` where `best` could not
        become a link.
        """
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except HELD:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            raise UserError(f"{self.path}: in use by another run (process {owner})") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OutputError(f"{self.path}: not locked: {error.strerror}") from error
            say(f"warning: {self.path}: no file locks here ({error.strerror}): nothing keeps a "
                "second run out of the folder")  # fmt: skip
        with output_errors(self.path):
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
            self._remove(self.path.rglob(f"{TEMPORARY}*"))
        self._try_a_link()

    def _try_a_link(self):
        """Raise `OutputError`, before hours of training, where `best` cannot become a link."""
        link = self.path / f"{TEMPORARY}link"
        try:
            link.symlink_to("best")
            link.unlink()
        except OSError as error:
            raise OutputError(
                f"{self.path}: no symbolic link can be made here ({error.strerror}), and `best` is "
                f"one; name a folder on another file system with --runs_dir"
            ) from error

    def start(self, values):
        """Begin a run: write `run.json` with `values` and remove an earlier run.

        Removed are a run's own files only. The states go first: a kill in between leaves a run
        that starts at step 0, of the new flags, not one that continues with half of what it had.
        """
        with output_errors(self.path):
            self._remove([self.path / "state"])
            self.write_description(values)
            names = ("best", "best-*", "metrics.jsonl", "predictions")
            self._remove(place for name in names for place in self.path.glob(name))

    def holds_run(self):
        """Whether a run was ever started here."""
        return any((self.path / name).exists() for name in ("run.json", "state", "best"))

    @staticmethod
    def _remove(places):
        """Remove files and folders; folders are renamed first, so none is ever there in half."""
        for place in list(places):
            if place.is_symlink() or not place.is_dir():
                place.unlink(missing_ok=True)
                continue
            doomed = place
            if not place.name.startswith(TEMPORARY):
                doomed = place.with_name(f"{TEMPORARY}{place.name}")
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(place, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    # ------------------------------------------------------------------------- what was asked for

    def write_description(self, values):
        """Write `run.json`."""
        write_file(self.path / "run.json", json.dumps(values, indent=2) + "\n")

    def description(self):
        """The values of `run.json`. Raises `UserError` where it is missing or damaged."""
        path = self.path / "run.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            missing = {"command", "args", "encoder", "data", "precision"} - set(values)
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{path}: not the description of a run: {reason}; expected a run such as runs/LoRA"
            ) from error
        if missing:
            raise UserError(f"{path}: not the description of a run: no {', '.join(missing)}")
        return values

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
        path = self.metrics_file
        with output_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self):
        """All logged lines as dicts; a last line that a kill cut short is ignored."""
        if not self.metrics_file.exists():
            return []
        text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [self._metric(number, line) for number, line in enumerate(lines, start=1)]

    def _metric(self, number, line):
        """A logged line as a dict. Raises `UserError` where it is damaged."""
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self.metrics_file}:{number}: damaged: {error}; remove this line to go on"
            ) from error

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

    def describe_best(self):
        """The best model and its step in words; a copy that followed the link knows no step."""
        step = self.best_step()
        return "best model" if step is None else f"best model of step {step}"

    def save_best(self, step, write):
        """Exchange the best model for the one that `write(folder)` writes."""
        target = self._unused(self.path, f"best-{step:08d}")
        with new_folder(target) as folder:
            write(folder)
        self._link_best(target)

    def _link_best(self, target):
        """Exchange the link `best` for one to the folder `target`, in one step."""
        with output_errors(self.best):
            link = self.path / f"{TEMPORARY}best"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            if not self.best.is_symlink():  # a folder, where a copy of the run followed the link
                self._remove([self.best])
            os.replace(link, self.best)
            flush_to_disk(self.path)

    def _find_best(self, step):
        """What is wrong with the best model that a state of best step `step` counts on, or None.

        Where a later one is linked and damaged, the link goes back to that of `step`.
        """
        problem = damage(self.best)
        if step is None or (problem is None and (self.best_step() or 0) >= step):
            return None
        for folder in reversed(_numbered(self.path, f"best-{step:08d}")):
            if damage(folder) is None:
                self._link_best(folder)
                return None
        return f"no undamaged best model of step {step}: {problem or 'missing'}"

    # ---------------------------------------------------------------------- states to go on from

    def save_state(self, values, tensors):
        """Keep a complete state: `values` (JSON) and `tensors` (file name -> name -> tensor)."""
        states, name = self._states(), f"step-{values['step']:08d}"
        newest = states[0] if states and states[0].stem == name else None
        if newest and self._values(newest) == values and damage(newest) is None:
            return
        if self.metrics_file.exists():
            with output_errors(self.metrics_file):
                flush_to_disk(self.metrics_file)
        target = self._unused(self.path / "state", name)
        with new_folder(target) as folder:
            (folder / "state.json").write_text(json.dumps(values, indent=2) + "\n")
            for file, group in tensors.items():
                write_tensors(folder / f"{file}.safetensors", group)
        with output_errors(target):
            self._remove_the_old()

    def _remove_the_old(self):
        """Keep the last state of the last two steps, and the best models they count on."""
        states = self._states()
        last = {folder.stem: folder for folder in reversed(states)}  # stem: without the number
        kept = sorted(last.values(), reverse=True)[:STATES_KEPT]
        self._remove(folder for folder in states if folder not in kept)
        bests = {self.best.resolve()}
        for folder in kept:
            step = self._values(folder).get("best_step")
            bests |= {best.resolve() for best in _numbered(self.path, f"best-{step or 0:08d}")[-1:]}
        self._remove(best for best in self.path.glob("best-*") if best.resolve() not in bests)

    @staticmethod
    def _unused(folder, name):
        """The path `folder/name.<number>` that is not taken, after all that are."""
        taken = _numbered(folder, name)
        return folder / f"{name}.{_number(taken[-1]) + 1 if taken else 0}"

    def _states(self):
        """Folders of complete states, newest first."""
        return _numbered(self.path / "state", "step-*")[::-1]

    @staticmethod
    def _values(folder):
        """A state's plain values, none where they cannot be read."""
        try:
            return json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _read_state(self, folder):
        """A state, or what is wrong with it: `(State, None)` or `(None, text)`."""
        if problem := damage(folder):
            return None, problem
        try:
            tensors = {f.stem: read_tensors(f) for f in sorted(folder.glob("*.safetensors"))}
        except UserError as error:
            return None, str(error)
        if not (values := self._values(folder)):
            return None, f"{folder / 'state.json'}: not a state's values"
        return State(values, tensors), self._find_best(values["best_step"])

    def load_state(self, say=say):
        """The newest whole state, None where none was ever completed.

        A damaged one is passed over, as `say` is told, and so is one whose best model is damaged.
        Raises `UserError` where none is whole.
        """
        folders = self._states()
        for place, folder in enumerate(folders):
            state, problem = self._read_state(folder)
            if problem is None:
                self._remove(folders[:place])
                self._remove_the_old()  # such as a best model whose state was never completed
                return state
            say(f"warning: {folder} is left out: {problem}")
        if folders:
            raise UserError(
                f"{self.path / 'state'}: no undamaged state among {len(folders)}; "
                f"start anew with --overwrite"
            )
        return None


def _numbered(folder, name):
    """The paths `folder/name.<number>` that there are, by name and then by number."""
    paths = (path for path in folder.glob(f"{name}.*") if path.suffix[1:].isdecimal())
    return sorted(paths, key=lambda path: (path.stem, _number(path)))


def _number(path):
    """The number after the point of a folder's name, as `best-00000200.1`."""
    return int(path.suffix[1:])


class ReadOnlyRunFolder(RunFolder):
    """The run's folder as the processes beside the first see it: they write nothing."""

    def _nothing(self, *args, **kwargs):
        """Leave it to the first process."""

    open = start = write_description = log = forget_metrics_after = _nothing
    save_best = save_state = _link_best = _remove = _nothing


def newest_run(runs="runs"):
    """The run whose best model is newest. Raises `UserError` where there is none."""
    found = [path.parent for path in Path(runs).glob("*/best") if path.exists()]
    if not found:
        raise UserError(f"{runs}/: no finished run; train one: python multitask_classifier.py")
    return max(found, key=lambda path: (path / "best").resolve().stat().st_mtime)
