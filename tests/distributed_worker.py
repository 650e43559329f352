"""One process of tests/test_distributed.py: trains job after job and records each step.

    python -m torch.distributed.run --nproc_per_node=2 tests/distributed_worker.py FOLDER

Reads FOLDER/jobs.json: the jobs of all processes `together`, then those of the first one `alone`. A
job has a `name`, the training script's `argv`, and optionally `copy` (output of an earlier job, to
resume), `stop_at` (before this step ends, the last process gets SIGTERM) and `fault` (a key of
`FAULTS`). In FOLDER/together and FOLDER/alone every rank writes <name>.rank<N>.json (exit code,
hash of the weights by step), rank 0 <name>.safetensors (gradients by step, weights at the end).
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

import multitask_bert
import multitask_classifier
from runtime import distributed
from runtime.distributed import rank, world_size
from runtime.script import run_script
from training import setup

make_optimizer = setup.make_optimizer


class Recorder:
    """Watches the optimiser of a job: gradients before each step, weights after it."""

    def __init__(self, stop_at):
        self.stop_at, self.hashes, self.gradients, self.trained = stop_at, [], {}, {}

    def make_optimizer(self, model, plan):
        """The real optimiser, watched."""
        self.trained = setup.trained_parameters(model)
        optimizer = make_optimizer(model, plan)
        optimizer.register_step_pre_hook(lambda *_: self.before_step())
        optimizer.register_step_post_hook(lambda *_: self.after_step())
        return optimizer

    def before_step(self):
        """Keep the gradients, clipped if their norm is large; send the signal of `stop_at`."""
        is_last = rank() == world_size() - 1
        if is_last and len(self.hashes) + 2 == self.stop_at:  # found at the end of the next step
            os.kill(os.getpid(), signal.SIGTERM)
        for name, parameter in self.trained.items():
            self.gradients[f"gradient {len(self.hashes)} {name}"] = parameter.grad.clone()

    def after_step(self):
        """Keep the hash of the weights."""
        digest = hashlib.sha256()
        for parameter in self.trained.values():
            digest.update(parameter.detach().numpy().tobytes())
        self.hashes.append(digest.hexdigest())


def unwrapped(model, **_):
    """In place of `DistributedDataParallel`: the model itself, which averages no gradients."""
    model.no_sync = nullcontext
    return model


FAULTS = {
    "files": (setup, "file_sha256", lambda path: f"{path} on {rank()}"),  # each machine has its own
    "gather": (multitask_bert, "gather_rows", lambda rows: (rows, 0)),
    "wrapper": (multitask_classifier, "DistributedDataParallel", unwrapped),
}


def run(job, folder):
    """Do one job."""
    name, recorder = job["name"], Recorder(job.get("stop_at"))
    if rank() == 0 and "copy" in job:
        shutil.copytree(job["copy"], folder / name, symlinks=True)
    with ExitStack() as patches:
        patches.enter_context(patch.object(setup, "make_optimizer", recorder.make_optimizer))
        if "fault" in job:
            patches.enter_context(patch.object(*FAULTS[job["fault"]]))
        code = run_script(multitask_classifier.main, job["argv"])
    record = {"code": code, "hashes": recorder.hashes}
    (folder / f"{name}.rank{rank()}.json").write_text(json.dumps(record))
    if rank() == 0:
        weights = {f"weight {name}": p.detach() for name, p in recorder.trained.items()}
        save_file({**recorder.gradients, **weights}, folder / f"{name}.safetensors")


def main():
    """Do all jobs, those together in one group of processes: a second group never meets."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    jobs = json.loads((folder / "jobs.json").read_text())
    with distributed.joined_processes(torch.device("cpu")) as device:
        distributed.joined_processes = lambda _: nullcontext(device)
        for job in jobs["together"]:
            run(job, folder / "together")
    if os.environ.pop("RANK") == "0":  # and from here on without other processes
        for job in jobs["alone"]:
            run(job, folder / "alone")


if __name__ == "__main__":
    main()
