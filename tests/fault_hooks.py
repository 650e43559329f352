"""Runs of the program in processes of their own, with faults in them.

Importing torch takes longer than a tiny run. So the fork server of `multiprocessing` imports the
program once, and every run is a fork of it, with its own signals, limits and exit code. A fault is
a function that a run calls first; its settings are bound by `partial`.

    run(tmp_path, ["--epochs", 1], partial(kill_at, 20))
"""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import multitask_classifier
from multitask_bert import MultitaskBERT
from runtime.script import run_script
from training.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[1]
HANG_SECONDS = 120  # a run that takes longer ends by SIGALRM
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
PATHS = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}
# Imported once, by the server: these modules, and what the program imports late.
PRELOADED = ["fault_hooks", "evaluation", "scipy.stats", "sklearn.metrics", "torch._dynamo"]
NOT_REPEATABLE = {"sentences_per_s", "tokens_per_s", "peak_memory_mib"}
NOT_REPEATABLE |= {"seconds", "evaluation_seconds"}

# -------------------------------------------------------------------------------------------- runs

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(PRELOADED)


def start(folder, argv, *faults, main=multitask_classifier.main, env=None):
    """Start a run in the working directory `folder`; returns its process.

    `main` is a script's, `env` holds additional environment variables.
    """
    with mock.patch.dict(os.environ, ONE_THREAD | PATHS):
        forkserver.ensure_running()
    job = (folder, [str(word) for word in argv], faults, main, env or {})
    process = processes.Process(target=_run_job, args=job)
    (folder / "stderr").unlink(missing_ok=True)
    process.start()
    wait_for((folder / "stderr").exists)  # it has begun: a signal finds a run
    return process


def finish(process, folder):
    """Wait for the end of a run that `start` began in `folder`; returns a `CompletedProcess`."""
    process.join()
    texts = [(folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(process.name, process.exitcode, *texts)


def run(folder, argv, *faults, **settings):
    """Run to the end, as `start` describes; returns a `CompletedProcess`."""
    return finish(start(folder, argv, *faults, **settings), folder)


def _run_job(folder, argv, faults, main, env):
    """In the new process: put the faults in place, run the script, exit with its code."""
    signal.alarm(HANG_SECONDS)
    os.chdir(folder)
    os.environ.update(env)
    for number, name in enumerate((os.devnull, "stdout", "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    tqdm.set_lock(threading.RLock())  # a killed run would leak its own, a named semaphore
    sys.argv = [f"{main.__module__}.py", *argv]
    for fault in faults:
        fault()
    code = run_script(main)
    sys.stdout.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------------ faults


def patch(target, *new, **settings):
    """`mock.patch` for the rest of the run: `target` is a dotted name."""
    mock.patch(target, *new, **settings).start()


# A user's mistake is to be found before any weights load: otherwise the run ends with 1, not 2.
no_weights = partial(patch, "base_bert.read_tensors", side_effect=AssertionError("weights loaded"))
# Folders are written under their final names: a copy replaces the rename.
no_renaming = partial(patch, "os.rename", shutil.copytree)


def wrap(owner, name, replacement):
    """Exchange `owner.name` for `replacement(original, *args, **kwargs)`."""
    setattr(owner, name, partial(replacement, getattr(owner, name)))


def on_writes(act):
    """Call `act(event, path)` before each call that changes the file system.

    Tensor files are written by safetensors itself, in one call. For them it is `act(event, path,
    half)` before the call, and `half()` writes half of the file.
    """
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod")

    def audit(event, args):
        if event in changes or (event == "open" and isinstance(args[2], int) and args[2] & writes):
            act(event, str(args[1] if event == "os.symlink" else args[0]))

    def fsync(original, descriptor):
        act("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        original(descriptor)

    def serialize_file(original, tensors, path, **settings):
        def half():
            original(tensors, path, **settings)
            os.truncate(path, os.path.getsize(path) // 2)

        act("tensors", str(path), half)
        original(tensors, path, **settings)

    sys.addaudithook(audit)
    wrap(os, "fsync", fsync)
    wrap(safetensors.torch, "serialize_file", serialize_file)


def kill_at(number):
    """SIGKILL at the `number`-th call that writes, 0 for never; the file `calls` counts them."""
    calls = open("calls", "wb", buffering=0)  # noqa: SIM115 (open until the end)

    def act(event, path, half=lambda: None):
        calls.write(b".")
        if calls.tell() == number:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    on_writes(act)


def fail_write(pattern, code):
    """Fail with the error `code`, such as ENOSPC, where `pattern` is found in "event path"."""
    number = getattr(errno, code)

    def act(event, path, half=None):
        if event in ("os.remove", "os.rmdir") or not re.search(pattern, f"{event} {path}"):
            return
        if half is None:
            raise OSError(number, os.strerror(number), path)
        half()
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)}")

    on_writes(act)


def signal_at(method, call, number, times=1):
    """Signals to the run itself, from a call of a method of the model on; calls count from 1."""
    calls, original = [], getattr(MultitaskBERT, method)

    def send(*args):
        calls.append(1)
        if len(calls) >= call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(*args)

    setattr(MultitaskBERT, method, send)


def bad_number(step, loss, where):
    """NaN in a loss or, if `where` is "gradient", only in its gradient, from a step on."""
    steps, original = [], MultitaskBERT.forward

    def forward(self, batches):
        losses = original(self, batches)
        steps.append(1)
        if len(steps) >= step and where == "loss":
            losses[loss] = losses[loss] * float("nan")
        elif len(steps) >= step:
            losses[loss].register_hook(lambda gradient: gradient * float("nan"))
        return losses

    MultitaskBERT.forward = forward


def no_reseeding():
    """Random numbers are seeded at the start of the process only."""
    calls = []

    def seed_once(original, number):
        calls.append(1)
        if len(calls) == 1:
            original(number)

    wrap(torch, "manual_seed", seed_once)


def closed_streams():
    """Standard output and error are pipes without a reader."""
    read, write = os.pipe()
    os.close(read)
    for number in (1, 2):
        os.dup2(write, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 (open until the end)


# -------------------------------------------------------------------------------- what a run leaves


def fill_run(path, steps):
    """A run's folder with a checkpoint and a best model of each step, full of its number."""
    filled = RunFolder(path)
    filled.open()
    for step in steps:
        tensors = {"weight": torch.full((64,), float(step))}

        def write(folder, tensors=tensors):
            safetensors.torch.save_file(tensors, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")

        filled.progress.step = filled.progress.evaluated = step
        filled.log(kind="train", step=step, seconds=0)
        filled.save_best(write)
        filled.save_checkpoint(tensors)
    return filled


def save_two_steps(argv):
    """The `main` of a process that does nothing but save."""
    fill_run("run", [1, 2])


def start_again(argv):
    """The `main` of a process that does nothing but overwrite a run."""
    again = RunFolder("run")
    again.open()
    again.start({"args": "new"})


def digest(path):
    """Hash of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def snapshot(*folders):
    """Content of all files below folders by path, and where links lead."""
    places = [place for folder in folders for place in Path(folder).rglob("*")]
    return {
        str(place): os.readlink(place) if place.is_symlink() else digest(place)
        for place in places
        if place.is_symlink() or (place.is_file() and place.name not in (".lock", ".owner"))
    }


def checkpoints(run):
    """The files of a run's checkpoints, the newest last; those of one step by their hashes."""
    return sorted((run / "state").glob("step-*.safetensors"))


def read_checkpoint(path):
    """Progress and tensors of a checkpoint; the tensors as bytes by name."""
    with safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
    tensors = safetensors.torch.load_file(path)
    return progress, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def metrics(run):
    """A run's metrics without speeds, times and memory."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in NOT_REPEATABLE}
        for line in lines
    ]


def outcome(folder):
    """Everything that a run ends with, and that breaking and resuming it must not change."""
    run, files = folder / "runs/full-model", {}
    for place in (run / "best", run / "predictions", folder / "predictions"):
        paths = [path for path in sorted(place.rglob("*")) if path.is_file()]
        files |= {str(path.relative_to(folder)): digest(path) for path in paths}
    newest = read_checkpoint(checkpoints(run)[-1])
    return {"files": files, "metrics": metrics(run), "checkpoint": newest}


def leftovers(folder):
    """What should be gone after a run: unfinished files, old checkpoints and best models."""
    run = folder / "runs/full-model"
    used = {read_checkpoint(path)[0]["best"] for path in checkpoints(run)}
    unused = [best for best in run.glob("best-*") if best.name not in used]
    return [*folder.rglob(".tmp-*"), *checkpoints(run)[:-2], *unused]


def copy(folder, target):
    """A copy of a folder with its links, to be damaged."""
    shutil.copytree(folder, target, symlinks=True, dirs_exist_ok=True)
    return target


def rename_by_hash(checkpoint):
    """Give a changed checkpoint the name of its new content."""
    step = checkpoint.name[:13]
    return checkpoint.rename(checkpoint.with_name(f"{step}-{digest(checkpoint)[:16]}.safetensors"))


def rewrite_manifest(folder):
    """Make the hashes of a changed best model right again."""
    names = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({n: digest(folder / n) for n in names}))


def wait_for(condition, seconds=60):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)
