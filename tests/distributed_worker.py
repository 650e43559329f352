"""One process of tests/test_distributed.py: trains job after job and writes down each step.

    python -m torch.distributed.run --nproc_per_node=2 tests/distributed_worker.py FOLDER

Reads FOLDER/jobs.json, a list of jobs: `name`, `args` (the training script's), and optionally
`from` and `to` (folders: copy the output of an earlier job first), `stop_at` (the last step:
before it the last process gets SIGTERM) and `break` (which wire between the processes is cut). For
each, rank 0 writes <name>.json (exit code, losses) and <name>.safetensors (gradients of each
step, weights after the last), every rank <name>.rank<N>.json (the hash of its weights by step).
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import distributed  # noqa: E402
import multitask_bert  # noqa: E402
import multitask_classifier  # noqa: E402
import preparation  # noqa: E402
from script import run_script  # noqa: E402


class Recorder:
    """Looks over the shoulder of `train`: stands in for the optimiser's maker and its parts."""

    def __init__(self, stop_at):
        self.stop_at, self.steps, self.hashes, self.gradients = stop_at, [], [], {}
        self.model = None

    def make_optimizer(self, model, args):
        """The real optimiser, with an eye on each step."""
        self.model = model
        optimizer = make_optimizer(model, args)
        optimizer.register_step_pre_hook(lambda *_: self.before_step())
        optimizer.register_step_post_hook(lambda *_: self.after_step())
        return optimizer

    def trained(self):
        """Trained weights by name; none where it never came to a model."""
        named = self.model.named_parameters() if self.model else ()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def before_step(self):
        """Keep the gradients (clipped, where their norm is large); end step `stop_at` - 1 with the
        signal, which the next step's end finds."""
        is_last = distributed.rank() == distributed.world_size() - 1
        if is_last and self.stop_at and len(self.hashes) + 2 == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        for name, parameter in self.trained().items():
            self.gradients[f"gradient {len(self.hashes)} {name}"] = parameter.grad.clone()

    def after_step(self):
        """Keep the hash of the weights."""
        digest = hashlib.sha256()
        for parameter in self.trained().values():
            digest.update(parameter.detach().numpy().tobytes())
        self.hashes.append(digest.hexdigest())

    def add(self, meter, values, *counts):
        """Keep the losses of a step on their way to the log."""
        self.steps.append({"values": values, "counts": counts})
        add(meter, values, *counts)


make_optimizer = multitask_classifier.make_optimizer
add = multitask_classifier.Meter.add


def own_rows(rows):
    """`distributed.gather_rows` that gathers nothing."""
    return rows, 0


def unwrapped(model, **_):
    """`DistributedDataParallel` that wraps nothing: the model's own methods are called."""
    model.no_sync = nullcontext
    return model


def hash_of_rank(path):
    """`file_sha256` as if each machine had files of its own."""
    return f"{path} on {distributed.rank()}"


BREAK = {
    "files": (preparation, "file_sha256", hash_of_rank),
    "gather": (multitask_bert, "gather_rows", own_rows),
    "wrapper": (multitask_classifier, "DistributedDataParallel", unwrapped),
}


def run(job, folder, rank):
    """Do one job."""
    if job.get("from") and rank == 0:
        shutil.copytree(job["from"], job["to"], symlinks=True)
    recorder = Recorder(job.get("stop_at"))
    multitask_classifier.make_optimizer = recorder.make_optimizer
    multitask_classifier.Meter.add = lambda *args: recorder.add(*args)
    if job.get("break"):
        module, name, replacement = BREAK[job["break"]]
        original = getattr(module, name)
        setattr(module, name, replacement)
    stdout = sys.stdout
    code = run_script(multitask_classifier.main, job["args"])
    sys.stdout = stdout
    if job.get("break"):
        setattr(module, name, original)
    (folder / f"{job['name']}.rank{rank}.json").write_text(json.dumps(recorder.hashes))
    if rank == 0:
        record = {"code": code, "steps": recorder.steps}
        (folder / f"{job['name']}.json").write_text(json.dumps(record))
        weights = {f"weight {name}": p.detach() for name, p in recorder.trained().items()}
        save_file({**recorder.gradients, **weights}, folder / f"{job['name']}.safetensors")


def main():
    """Do all jobs."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))  # one group for all jobs: a second one never meets
    torch.distributed.init_process_group = distributed.finish = lambda *_: None
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
    for job in json.loads((folder / "jobs.json").read_text()):
        run(job, folder, rank)


if __name__ == "__main__":
    main()
