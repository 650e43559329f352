"""One process of tests/test_distributed.py: trains job after job and records each step.

    python -m torch.distributed.run --nproc_per_node=2 tests/distributed_worker.py FOLDER

Reads FOLDER/jobs.json: the jobs of all processes `together`, then those of the first one `alone`. A
job has a `name`, the training script's `argv`, and optionally `copy` (output of an earlier job, to
resume), `stop_at` (before this step ends, the last process gets `signal`, or SIGTERM),
`batch_tokens` (of evaluation) and `fault` (a key of `FAULTS`). Every rank writes
FOLDER/together/<name>.rank<N>.safetensors, or those of FOLDER/alone/: the exit `code`, and
`gradients` and `weights` (steps, trained numbers) before and after each step.
"""

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
from runtime.device import BATCH_TOKENS
from runtime.distributed import rank, world_size
from runtime.script import run_script
from training import setup

make_optimizer = setup.make_optimizer


def flat(tensors):
    """One vector of all tensors."""
    return torch.cat([torch.zeros(0), *(tensor.detach().flatten() for tensor in tensors)])


class Recorder:
    """Watches the optimiser of a job: gradients before each step, weights after it."""

    def __init__(self, stop_at, number):
        self.stop_at, self.signal = stop_at, number
        self.gradients, self.weights, self.trained = [], [], {}

    def make_optimizer(self, model, plan):
        """The real optimiser, watched."""
        self.trained = setup.trained_parameters(model)
        optimizer = make_optimizer(model, plan)
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)
        return optimizer

    def after_step(self, *_):
        """Keep the weights."""
        self.weights.append(flat(self.trained.values()))

    def before_step(self, *_):
        """Keep the gradients, clipped if their norm is large; send the signal of `stop_at`."""
        self.gradients.append(flat(p.grad for p in self.trained.values()))
        is_last = rank() == world_size() - 1
        if is_last and len(self.gradients) + 1 == self.stop_at:  # found at the end of the next step
            os.kill(os.getpid(), self.signal)

    def save(self, path, code):
        """Write the record. `is_summed` marks the numbers of `token_type_embeddings`."""
        steps = {"gradients": self.gradients, "weights": self.weights}
        tensors = {n: torch.stack(rows) if rows else torch.zeros(0) for n, rows in steps.items()}
        marks = (torch.full_like(p, "token_type" in name) for name, p in self.trained.items())
        save_file({**tensors, "is_summed": flat(marks), "code": torch.tensor(code)}, path)


def unwrapped(model):
    """In place of `DistributedDataParallel`: the model itself, which averages no gradients."""
    model.no_sync = nullcontext
    return model


FAULTS = {
    "copies": (multitask_bert, "copies_of", lambda *_: None),
    "files": (setup, "file_sha256", lambda path: f"{path} on {rank()}"),  # each machine has its own
    "gather": (multitask_bert, "gather_rows", lambda rows: (rows, 0)),
    "wrapper": (multitask_classifier, "DistributedDataParallel", unwrapped),
}


def run(job, folder):
    """Do one job."""
    recorder = Recorder(job.get("stop_at"), job.get("signal", signal.SIGTERM))
    if rank() == 0 and "copy" in job:
        shutil.copytree(job["copy"], folder / job["name"], symlinks=True)
    with ExitStack() as patches:
        patches.enter_context(patch.object(setup, "make_optimizer", recorder.make_optimizer))
        patches.enter_context(patch.dict(BATCH_TOKENS, cpu=job.get("batch_tokens", 4096)))
        if "fault" in job:
            patches.enter_context(patch.object(*FAULTS[job["fault"]]))
        code = run_script(multitask_classifier.main, job["argv"])
    recorder.save(folder / f"{job['name']}.rank{rank()}.safetensors", code)


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
    os._exit(0)  # as `script.end_process` does
