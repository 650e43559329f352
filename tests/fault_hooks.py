"""Runs of the program with something going wrong in them, for tests/test_faults*.py.

    python tests/fault_hooks.py        # serves requests on standard input, one JSON object a line

Importing torch takes longer than a tiny run. So a server process imports the program once, and each
run is a fork of it: its own process, with its own signals, limits and exit code, in which the
`HOOKS` named by the test were put in place first. `Program` is the test's side of it.
"""

import errno
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
HANG_SECONDS = 120  # a run that takes longer ends by SIGALRM
EXEMPT = {
    "sentences_per_s", "tokens_per_s", "peak_memory_mib", "seconds", "evaluation_seconds",
}  # fmt: skip

# ----------------------------------------------------------------------------- in the run's process

CALLS = []  # what was written so far, where `kill_at` counts


def on_writes(act):
    """Call `act(what, path)` before each system call of Python's that changes the file system."""

    def hook(event, args):
        if event == "open":
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
            if isinstance(args[2], int) and args[2] & writes:
                act("open", args[0])
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod"):
            act(event, args[-1] if event == "os.symlink" else args[0])

    sys.addaudithook(hook)
    before(os, "fsync", lambda fd: act("fsync", os.readlink(f"/proc/self/fd/{fd}")))


def wrap(owner, name, replacement):
    """Exchange `owner.name` for `replacement(original, *args, **kwargs)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: replacement(original, *args, **kwargs))


def before(owner, name, act):
    """Call `act(*args)` before each call of `owner.name(*args)`."""
    wrap(owner, name, lambda original, *args: (act(*args), original(*args))[1])


def on_save_file(act):
    """Call `act(path, half)` in the middle of a tensor file; `half()` writes its first half."""
    import base_bert

    def save_file(original, tensors, path, **settings):
        def half():
            original(tensors, path, **settings)
            os.truncate(path, os.path.getsize(path) // 2)

        act(str(path), half)
        original(tensors, path, **settings)

    wrap(base_bert, "save_file", save_file)


def kill_at(number):
    """SIGKILL before the `number`-th call that writes (0: never), or with half of a tensor file."""

    def act(what, path, half=lambda: None):
        CALLS.append(what)
        if len(CALLS) == number:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    on_writes(act)
    on_save_file(lambda path, half: act("tensors", path, half))


def fail_write(match, code):
    """Fail with the error `code`, such as ENOSPC, where a path that contains `match` is written."""
    number = getattr(errno, code)

    def act(what, path):
        if match in str(path) and what not in ("os.remove", "os.rmdir"):
            raise OSError(number, os.strerror(number), str(path))

    def fail_half_way(path, half):
        from safetensors import SafetensorError

        if match in path:
            half()
            text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
            raise SafetensorError(text)

    on_writes(act)
    on_save_file(fail_half_way)


def at_step(step, act):
    """Call `act(losses)` after the forward pass of a training step, counted from 1."""
    import multitask_classifier
    from multitask_bert import MultitaskBERT

    current = [None]

    def seed(original, *numbers):
        current[0] = numbers[1] + 1 if len(numbers) > 1 else None
        original(*numbers)

    def forward(original, model, batches):
        losses = original(model, batches)
        if current[0] == step:
            act(losses)
        return losses

    wrap(multitask_classifier, "seed_everything", seed)
    wrap(MultitaskBERT, "forward", forward)


def bad_number(step, loss, where):
    """NaN in a loss, or only in its gradient (`where`), at a step."""

    def act(losses):
        if where == "loss":
            losses[loss] = losses[loss] * float("nan")
        else:
            losses[loss].register_hook(lambda gradient: gradient * float("nan"))

    at_step(step, act)


def out_of_memory(kind, step=2):
    """What exhausted memory raises: on a GPU, in Python and NumPy, in torch's CPU allocator."""
    import torch

    def act(losses):
        if kind == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if kind == "python":
            raise MemoryError
        torch.empty(2**60, dtype=torch.uint8)

    at_step(step, act)


def no_memory_to_evaluate():
    """What a GPU raises where the batches of an evaluation do not fit."""
    import torch

    from multitask_bert import MultitaskBERT

    def predict(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    MultitaskBERT.predict = predict


def send(number, times=1):
    """Signals to this process."""
    for _ in range(times):
        os.kill(os.getpid(), number)


def signal_in(where, number, times=1, step=3):
    """A signal in a training step, in the evaluation of dev or of the best model, in set-up."""
    import evaluation
    import multitask_classifier
    from multitask_bert import MultitaskBERT

    def act(*args):
        send(number, times)

    if where == "step":
        at_step(step, act)
    elif where == "dev":
        before(MultitaskBERT, "predict", act)
    elif where == "results":
        before(multitask_classifier, "write_results",
               lambda *args: before(evaluation, "predict_dataset", act))  # fmt: skip
    elif where == "set-up":
        before(multitask_classifier, "load_encoder", act)


def no_reseeding():
    """The generators are seeded at the start of a process only."""
    import multitask_classifier

    wrap(multitask_classifier, "seed_everything",
         lambda original, *numbers: original(*numbers) if len(numbers) == 1 else None)  # fmt: skip


def no_renaming():
    """Folders are written in place, under their final name."""
    import contextlib

    import run_folder

    @contextlib.contextmanager
    def in_place(path):
        path.mkdir(parents=True)
        yield path
        hashes = {f.name: run_folder.file_sha256(f) for f in path.iterdir() if f.is_file()}
        (path / "manifest.json").write_text(json.dumps(hashes))

    run_folder.new_folder = in_place


def no_hashes():
    """What is read back is believed."""
    import run_folder
    import saved_models

    run_folder.damage = saved_models.damage = lambda folder: None


def constant_predictions():
    """The similarity head says the same of every pair."""
    from multitask_bert import MultitaskBERT

    def predict(original, model, name, batch):
        outputs = original(model, name, batch)
        return outputs * 0 + 2 if name == "sts" else outputs

    wrap(MultitaskBERT, "predict", predict)


def no_gpu():
    """A machine with a CPU only."""
    import torch

    torch.cuda.is_available = torch.backends.mps.is_available = lambda: False


def no_bf16():
    """Hardware without bf16."""
    import device

    device._has_bf16 = lambda of_device: False


def watch_weights():
    """Say on standard error when weights are loaded: mistakes are to be found before that."""
    import base_bert

    before(base_bert, "read_tensors", lambda path: print("WEIGHTS LOADED", file=sys.stderr))


def limit(name, value):
    """A limit of the system's, such as RLIMIT_FSIZE in bytes."""
    resource.setrlimit(getattr(resource, name), (value, value))


def closed_streams():
    """Standard output and error are pipes that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def no_streams():
    """Standard output was closed from the start (`>&-`)."""
    sys.stdout = None


def threads(number):
    """Another number of threads to compute with."""
    import torch

    torch.set_num_threads(number)


def sys_path(folder):
    """A folder of packages that go before the installed ones."""
    sys.path.insert(0, folder)


def hold_folder(folder):
    """Only lock a run's folder, say so, and wait to be killed."""
    import run_folder

    run = run_folder.RunFolder(folder)
    run.open()
    print("locked", flush=True)
    signal.pause()


def save_states(folder, steps, size=64):
    """Only save states of `size` numbers, with best models, in a run's folder."""
    import torch

    from run_folder import RunFolder

    run = RunFolder(folder)
    run.open()
    run.log(kind="train", step=0)
    for step in steps:
        tensors = {"weight": torch.full((size,), float(step))}
        run.save_best(step, lambda place, t=tensors: write_model(place, t))
        values = {"step": step, "evaluated": step, "best_step": step}
        run.save_state(values, {"trained": tensors, "optimizer": tensors})
    os._exit(0)


def write_model(place, tensors):
    """A best model of one file of tensors and one of text."""
    import base_bert

    base_bert.write_tensors(place / "model.safetensors", tensors)
    (place / "config.json").write_text("{}")


HOOKS = {
    hook.__name__: hook
    for hook in (
        kill_at, fail_write, bad_number, out_of_memory, signal_in, no_reseeding, no_renaming,
        no_hashes, constant_predictions, no_gpu, no_bf16, watch_weights, limit, closed_streams,
        no_streams, threads, sys_path, hold_folder, save_states, no_memory_to_evaluate,
    )
}  # fmt: skip


def run_job(job):
    """In the forked process: put everything in place, run the script, exit with its code."""
    signal.alarm(HANG_SECONDS)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    for number, name in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    script = importlib.import_module(job["script"])
    from script import run_script

    sys.argv = [f"{job['script']}.py", *job["argv"]]
    for name, settings in job["hooks"]:
        HOOKS[name](**settings)
    code = run_script(script.main)
    if CALLS:
        Path(job["cwd"], "calls").write_text(str(len(CALLS)))
    sys.stdout.flush()
    os._exit(code or 0)


def serve():
    """Start runs and wait for them, as standard input asks."""
    sys.path.insert(0, str(REPOSITORY))
    for name in ("scipy.stats", "sklearn.metrics", "torch._dynamo", "multitask_classifier"):
        importlib.import_module(name)  # here, once, and not in every run
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            try:
                run_job(request)
            finally:
                import traceback

                traceback.print_exc()
                os._exit(99)
        print(pid, file=answers, flush=True)


# ------------------------------------------------------------------------------ on the test's side


class Done:
    """A run that has ended: its exit code (negative for a signal's number) and what it said."""

    def __init__(self, code, folder):
        self.code, self.folder = code, folder
        self.stdout = (folder / "stdout").read_text(encoding="utf-8", errors="replace")
        self.stderr = (folder / "stderr").read_text(encoding="utf-8", errors="replace")

    def __repr__(self):
        return f"exit {self.code}\n{self.stdout}\n{self.stderr}"


class Program:
    """The scripts, run in processes of their own."""

    def __init__(self):
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], env=os.environ | threads, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def _ask(self, request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, folder, argv, hooks=(), script="multitask_classifier", env=None):
        """Start a run in the working directory `folder`; returns its process id.

        `hooks` are names of hooks, or pairs of a name and its settings.
        """
        hooks = [(hook, {}) if isinstance(hook, str) else hook for hook in hooks]
        job = {
            "cwd": str(folder), "argv": [str(a) for a in argv], "hooks": hooks, "script": script,
            "env": env or {}, "stdout": str(folder / "stdout"), "stderr": str(folder / "stderr"),
        }  # fmt: skip
        return self._ask(job)

    def wait(self, pid, folder):
        """Wait for the end of a run that `start` began."""
        return Done(self._ask({"wait": pid}), folder)

    def run(self, folder, argv, hooks=(), script="multitask_classifier", env=None):
        """Run to the end."""
        return self.wait(self.start(folder, argv, hooks, script, env), folder)

    def close(self):
        """End the server."""
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


def digest(path):
    """Hash of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def snapshot(*folders):
    """Content of all files below folders, by path; links by where they lead."""
    found = {}
    for folder in folders:
        for place in sorted(Path(folder).rglob("*")):
            if place.is_symlink():
                found[str(place)] = os.readlink(place)
            elif place.is_file() and place.name != ".lock":
                found[str(place)] = digest(place)
    return found


def newest_state(run):
    """Folder of a run's newest state."""
    return max((run / "state").iterdir())


def metrics(run):
    """A run's metrics without speeds, times and memory."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in EXEMPT} for line in lines]


def outcome(folder, name="full-model"):
    """Everything that a run ends with and that continuing must not change."""
    run = folder / "runs" / name
    places = {"state": newest_state(run), "best": (run / "best").resolve(),
              "predictions of the run": run / "predictions",
              "predictions": folder / "predictions"}  # fmt: skip
    files = {
        f"{kind}/{path.relative_to(place)}": digest(path)
        for kind, place in places.items()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }
    return {"files": files, "metrics": metrics(run)}


def leftovers(folder):
    """What should not be there after a run: temporary files, states and models of no more use."""
    runs = [path.parent for path in folder.glob("runs/*/run.json")]
    stale = [str(path) for path in folder.rglob(".tmp-*")]
    for run in runs:
        states = sorted((run / "state").glob("*"), reverse=True)
        steps = {json.loads((s / "state.json").read_text())["best_step"] for s in states}
        stale += [str(state) for state in states[2:]]
        stale += [str(b) for b in run.glob("best-*") if int(b.stem.split("-")[1]) not in steps]
    return stale


def copy(folder, target):
    """A copy of a folder with its links, to do harm to."""
    shutil.copytree(folder, target, symlinks=True, dirs_exist_ok=True)
    return target


def rewrite_manifest(folder):
    """Make the hashes of a folder right again, as if what lies in it had been meant."""
    names = json.loads((folder / "manifest.json").read_text())
    hashes = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    (folder / "manifest.json").write_text(json.dumps(hashes))


def wait_for(condition, seconds=60):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


if __name__ == "__main__":
    serve()
