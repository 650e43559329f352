"""A run's folder: its description, its log, its best model and its checkpoints.

    runs/<mode>[-<suffix>]/
        run.json                               every flag, data files, encoder, versions
        metrics.jsonl                          a line per logged step and per evaluation
        best -> best-<step>-<hash>             the best model by the dev score; a link
        state/step-<step>-<hash>.safetensors   the last two checkpoints to resume from
        predictions/                           prediction files, and the scores behind them

Every file but the log is written atomically: it appears complete or not at all. So is the link
exchanged. A checkpoint has its SHA-256 in its name; a best model has a manifest with those of its
files. A best model is kept while any checkpoint refers to it. Torch is imported only to read or
write tensors.
"""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from config import UserError
from runtime.files import (
    TEMPORARY,
    OutputError,
    file_sha256,
    flush_to_disk,
    output_errors,
    remove,
    write_file,
)
from runtime.script import is_first, say

CHECKPOINTS_KEPT = 2
HASH_DIGITS = 16  # of a SHA-256 in a name
NO_LOCKS = {errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # of this file system
SUFFIX_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass
class Progress:
    """How far a run has come: the plain values of a checkpoint."""

    step: int = 0  # optimiser steps done
    evaluated: int = -1  # step of the last evaluation
    best: str | None = None  # folder of the best model
    best_score: float | None = None  # its overall dev score
    misses: int = 0  # evaluations since the best one
    totals: dict = field(default_factory=dict)  # sums of the losses that are not logged yet
    scaler: dict = field(default_factory=dict)  # of fp16's gradient scaler

    def needs_evaluation(self, plan):
        """Whether an epoch has ended that was not evaluated yet."""
        is_epoch_end = self.step > 0 and self.step % plan.steps_per_epoch == 0
        return self.evaluated < self.step and (is_epoch_end or plan.total_steps == 0)

    def is_finished(self, plan):
        """Whether nothing is left to train or evaluate, or the patience has run out."""
        is_at_end = self.step >= plan.total_steps and not self.needs_evaluation(plan)
        return is_at_end or 0 < plan.flags.patience <= self.misses


def run_name(flags):
    """The name of a run: its mode and its suffix, or its recipe's name."""
    return "-".join(filter(None, [flags.fine_tune_mode, flags.model_file_suffix or flags.recipe]))


def run_path(flags):
    """The folder of a run. Raises `UserError` if the suffix is not fit for a folder's name."""
    suffix = flags.model_file_suffix or flags.recipe
    if suffix and not SUFFIX_PATTERN.fullmatch(suffix):
        raise UserError(
            f"--model_file_suffix {suffix[:40]!r}; expected 1 to 100 letters, digits, "
            f"'.', '_' and '-', beginning with a letter or digit"
        )
    return Path(flags.runs_dir) / run_name(flags)


def newest_run(folder):
    """The run in a folder whose best model is newest. Raises `UserError` where there is none."""
    folder = Path(folder)
    found = [best for best in folder.glob("*/best") if best.exists()]
    if not found:
        raise UserError(f"{folder}/: no trained run; train one: python multitask_classifier.py")
    return max(found, key=lambda best: best.stat().st_mtime).parent


def find_damage(folder):
    """What is wrong with a best model's folder, None if every hash of its manifest is right."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in hashes.items():
            if file_sha256(folder / name) != digest:
                return f"{folder / name}: damaged (SHA-256 differs from manifest.json)"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{folder}: damaged ({error})"
    return None


def numbers_of(values):
    """Yield the numbers in nested dicts, each with its name: `{"dev": {"sst": 1}}` has dev/sst."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in numbers_of(value))
        elif isinstance(value, (int, float)):
            yield name, value


def only_first_process(method):
    """Let the first process alone run a method that writes; the others get None."""

    @functools.wraps(method)
    def guarded(*args, **kwargs):
        return method(*args, **kwargs) if is_first() else None

    return guarded


class RunFolder:
    """One run's folder; `open` locks it. `progress` is how far the run has come."""

    def __init__(self, path):
        self.path = Path(path)
        self.metrics_file = self.path / "metrics.jsonl"  # one JSON object per line
        self.best = self.path / "best"  # a link to the folder of the best model
        self.progress = Progress()
        self._tensorboard = None  # its writer, if asked for
        self._began = time.perf_counter()  # shifted back by the time that a resumed run has used

    def holds_run(self):
        """Whether a run was ever started here."""
        return any((self.path / name).exists() for name in ("run.json", "state", "best"))

    @only_first_process
    def open(self):
        """Lock the folder, and remove what a killed process left unfinished.

        Raises `UserError` if another process uses it, `OutputError` if `best` cannot be a link.
        """
        owner, link = self.path / ".owner", self.path / f"{TEMPORARY}link"
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")  # a dead process's lock is free
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                process = owner.read_text() if owner.exists() else "unknown"
                raise UserError(f"{self.path}: in use by another run (process {process})") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                say(
                    f"warning: {self.path}: no file locks here ({error.strerror}): two runs "
                    "could use the folder at once"
                )
            owner.write_text(str(os.getpid()))
            remove(self.path.rglob(f"{TEMPORARY}*"))
        try:
            link.symlink_to("best")
        except OSError as error:
            raise OutputError(
                f"{self.path}: no symbolic link can be made here ({error.strerror}), and `best` is "
                f"one; name a folder on another file system with --runs_dir"
            ) from error
        link.unlink()

    @only_first_process
    def start(self, description):
        """Begin a run: write `run.json` and remove the files of an earlier run.

        Predictions and checkpoints go first. After a kill in between, the new run starts at step 0.
        """
        with output_errors(self.path):
            remove([self.path / "predictions", self.path / "state"])
            write_file(self.path / "run.json", json.dumps(description, indent=2) + "\n")
            for name in ("best", "best-*", "metrics.jsonl", "tensorboard"):
                remove(self.path.glob(name))

    def description(self):
        """The values of `run.json`. Raises `UserError` if it is missing or damaged."""
        path = self.path / "run.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            missing = {"command", "args", "encoder", "data", "precision"} - set(values)
            reason = f"no {', '.join(sorted(missing))}" if missing else None
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
        if reason:
            raise UserError(
                f"{path}: not the description of a run: {reason}; expected a run such as runs/LoRA"
            )
        return values

    # ---------------------------------------------------------------------------------- the log

    def seconds(self):
        """Seconds that the run has taken, without the work that a resumed run does again."""
        return round(time.perf_counter() - self._began, 1)

    @only_first_process
    def log(self, **values):
        """Append one line to the metrics."""
        with output_errors(self.metrics_file), open(self.metrics_file, "a", encoding="utf-8") as f:
            f.write(json.dumps(values) + "\n")
        if self._tensorboard:
            self._write_scalars(values)

    @only_first_process
    def open_tensorboard(self):
        """From now on write every line of the log for TensorBoard too, into `tensorboard/`.

        The earlier lines are written again, so that a resumed run has no step twice.
        """
        from torch.utils.tensorboard import SummaryWriter

        with output_errors(self.path / "tensorboard"):
            remove([self.path / "tensorboard"])
            self._tensorboard = SummaryWriter(self.path / "tensorboard")
        for line in self.metrics():
            self._write_scalars(line)

    def _write_scalars(self, line):
        """Write the numbers of one line of the log, such as `losses/sst`."""
        with output_errors(self.path / "tensorboard"):
            for name, value in numbers_of(line):
                if name not in ("step", "epoch"):
                    self._tensorboard.add_scalar(name, value, line["step"])
            self._tensorboard.flush()

    def metrics(self):
        """All logged lines as dicts, without a last line that a kill cut short.

        Raises `UserError` for a damaged line.
        """
        text = ""
        if self.metrics_file.exists():
            text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
        lines = []
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            try:
                lines.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                where = f"{self.metrics_file}:{number}"
                message = f"{where}: damaged: {error}; remove this line to resume"
                raise UserError(message) from error
        return lines

    @only_first_process
    def _forget_later_metrics(self):
        """Drop the lines of steps and evaluations that the resumed run will do again."""
        last = {"train": self.progress.step, "eval": self.progress.evaluated}
        kept = [line for line in self.metrics() if line["step"] <= last[line["kind"]]]
        write_file(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        self._began = time.perf_counter() - max([line["seconds"] for line in kept], default=0)

    # --------------------------------------------------------------------------- the best model

    def describe_best(self):
        """The best model and its step in words; a copied folder without the link has no step."""
        step = re.fullmatch(r"best-(\d+)-.*", self.best.resolve().name)
        return f"best model of step {int(step[1])}" if step else "best model"

    @only_first_process
    def save_best(self, write):
        """Write a model with `write(folder)` and exchange the best model for it."""
        temporary = self.path / f"{TEMPORARY}best-model"
        with output_errors(self.path / "best"):
            try:
                temporary.mkdir()
                write(temporary)
                files = sorted(file for file in temporary.rglob("*") if file.is_file())
                hashes = {str(f.relative_to(temporary)): file_sha256(f) for f in files}
                manifest = temporary / "manifest.json"
                manifest.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
                for place in (*temporary.rglob("*"), temporary):
                    flush_to_disk(place)
                digest = file_sha256(manifest)[:HASH_DIGITS]
                target = self.path / f"best-{self.progress.step:08d}-{digest}"
                if find_damage(target):  # if undamaged, it is the same model, saved before a kill
                    remove([target])
                    temporary.rename(target)
                    flush_to_disk(self.path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        self._link_best(target.name)

    @only_first_process
    def _link_best(self, name):
        """Exchange the link `best` for one to the folder `name`, in one step."""
        with output_errors(self.best):
            link = self.path / f"{TEMPORARY}best"
            if not self.best.is_symlink():  # a folder, where a copy of the run followed the link
                remove([self.best])
            link.symlink_to(name)
            os.replace(link, self.best)
            flush_to_disk(self.path)
        self.progress.best = name

    # -------------------------------------------------------------------------------- checkpoints

    def _checkpoints(self):
        """The files of all checkpoints, the newest step first."""
        pattern = f"step-{'[0-9]' * 8}-{'[0-9a-f]' * HASH_DIGITS}.safetensors"
        return sorted((self.path / "state").glob(pattern), reverse=True)

    @only_first_process
    def save_checkpoint(self, tensors):
        """Save `progress` and `tensors`, a dict by name, as the newest checkpoint."""
        from base_bert import write_tensors

        temporary = self.path / "state" / f"{TEMPORARY}checkpoint"
        with output_errors(temporary.parent):
            if self.metrics_file.exists():
                flush_to_disk(self.metrics_file)
            temporary.parent.mkdir(exist_ok=True)
            try:
                write_tensors(temporary, tensors, {"progress": json.dumps(asdict(self.progress))})
                flush_to_disk(temporary)
                digest = file_sha256(temporary)[:HASH_DIGITS]
                name = f"step-{self.progress.step:08d}-{digest}.safetensors"
                os.replace(temporary, temporary.with_name(name))
                flush_to_disk(temporary.parent)
            finally:
                temporary.unlink(missing_ok=True)
            self._remove_old(temporary.with_name(name))

    @only_first_process
    def _remove_old(self, newest):
        """Keep `newest`, one checkpoint of the step before, and the best models they refer to."""
        one_per_step = {path.name[:13]: path for path in self._checkpoints()}
        one_per_step[newest.name[:13]] = newest
        kept = sorted(one_per_step.values(), reverse=True)[:CHECKPOINTS_KEPT]
        remove(path for path in self._checkpoints() if path not in kept)
        names = {self.best.resolve().name}
        for path in kept:
            with contextlib.suppress(UserError):  # a damaged one refers to none
                names.add(_read_progress(path).best)
        remove(path for path in self.path.glob("best-*") if path.name not in names)

    def load_checkpoint(self):
        """Read the newest undamaged checkpoint into `progress`; returns its tensors by name.

        Damaged ones are left out, and so are those whose best model is damaged. Returns None if no
        checkpoint was ever completed; raises `UserError` if all are damaged.
        """
        paths = self._checkpoints()
        for place, path in enumerate(paths):
            if problem := self._find_problem(path):
                say(f"warning: {path} is left out: {problem}")
                continue
            from base_bert import read_tensors

            self.progress = _read_progress(path)
            self._forget_later_metrics()
            if is_first():
                remove(paths[:place])
            if self.progress.best:
                self._link_best(self.progress.best)
            self._remove_old(path)
            return read_tensors(path)
        if paths:
            raise UserError(
                f"{self.path / 'state'}: no undamaged checkpoint among {len(paths)}; "
                f"start again with --overwrite"
            )
        return None

    def _find_problem(self, path):
        """Why a checkpoint cannot be resumed from, None if it can."""
        try:
            if not file_sha256(path).startswith(path.stem.split("-")[2]):
                return "damaged (SHA-256 differs from its name)"
            best = _read_progress(path).best
        except (OSError, UserError) as error:
            return f"damaged ({error})"
        return best and find_damage(self.path / best)


def _read_progress(path):
    """The `Progress` in a checkpoint's metadata. Raises `UserError` if there is none."""
    try:
        with safe_open(path, framework="numpy") as file:
            values = json.loads(file.metadata()["progress"])
        values.pop("cosine_targets", None)  # of an older version
        return Progress(**values)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path}: not a checkpoint: {error}") from error
