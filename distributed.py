"""How do several processes share one step?

    torchrun --nproc_per_node=2 multitask_classifier.py --fine-tune-mode=LoRA --LoRA_r=32

Each process takes its share of the same global batch; gradients are averaged by
`DistributedDataParallel`. With one process every function here does nothing.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from config import UserError

LOCAL_FAULT_SECONDS = 5  # how long a process waits for another to say what went wrong


class LostProcess(Exception):
    """The connection to the other processes broke: one of them has ended."""

    exit_code = 1


def launched():
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def start(device):
    """Join the other processes where torchrun started several; returns this process's device."""
    if not launched():
        return device
    if device.type == "cuda":
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"torchrun --nproc_per_node {processes}: this machine has {gpus} GPUs")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:  # several processes cannot share an Apple GPU
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def finish():
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Number of this process, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    """The rows of all processes; backward, the sum of what every process's loss says of ours."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        own = len(gradient) // world_size()
        return sum_over_processes(gradient)[rank() * own : (rank() + 1) * own]


def gather_rows(rows):
    """The rows of all processes, with gradients, and where this one's begin.

    (batch, hidden) -> (processes * batch, hidden) fp32, int. Every process has as many rows. Under
    autocast too they travel in fp32, so that their gradients are added up in fp32.
    """
    if world_size() == 1:
        return rows, 0
    return _GatherRows.apply(rows.float()), rank() * len(rows)


@torch.no_grad()
def sum_over_processes(tensor):
    """Elementwise sum, the same on every process."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def _device():
    """Where tensors of the processes' own must lie: NCCL handles GPU tensors only."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def largest(number):
    """Largest of the processes' integers, the same on every process."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def wait():
    """Wait until all processes are here."""
    largest(0)


@contextlib.contextmanager
def first_process_first():
    """A block that rank 0 leaves before the others enter it: they find what it has written."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


@torch.no_grad()
def mean_over_processes(tensor):
    """Elementwise mean, the same on every process."""
    return sum_over_processes(tensor.float()) / world_size()


def share(batch_size, task):
    """The rows of a task's global batch that this process takes, as a slice.

    Raises `UserError` where the processes' shares would not be equal.
    """
    size, rest = divmod(batch_size, world_size())
    if rest:
        raise UserError(
            f"--batch_size {batch_size} of {task}: the batch of a step over all processes; "
            f"expected a multiple of their number, {world_size()}"
        )
    return slice(rank() * size, (rank() + 1) * size)


def require_same(text, what):
    """Raise `UserError` where the processes do not all have the same `text`; `what` names it."""
    if world_size() == 1:
        return
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    highest, lowest = largest(number), -largest(-number)
    if highest != lowest:
        raise UserError(f"torchrun: the processes do not have the same {what}")


def gather_texts(text):
    """The texts of all processes by rank, on every process."""
    if world_size() == 1:
        return [text]
    content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=_device())
    padded = content.new_zeros(largest(len(content)))
    padded[: len(content)] = content
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return [bytes(part.tolist()).rstrip(b"\0").decode() for part in parts]


# ------------------------------------------------------------------------------- what people read


def launch_command(script):
    """The words that start `script` from here as this process was started, the script's included.

    `script` is its name without a folder, and is enough where the script lies in this folder or
    was not what started.
    """
    started = Path(sys.argv[0])
    if started.name == script and started.resolve().parent != Path.cwd().resolve():
        script = sys.argv[0]
    if not launched():
        return ["python", script]
    each, machines = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    nodes = [f"--nnodes={machines}"] if machines > 1 else []
    return ["torchrun", *nodes, f"--nproc_per_node={each}", script]


def quiet_unless_first():
    """Let rank 0 alone print; errors of all still reach standard error."""
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def is_first():
    """Whether this process is the first of all, or the only one: the one that writes."""
    return not launched() or int(os.environ["RANK"]) == 0


def is_first_here():
    """Whether this is the first process on its machine, or the only one."""
    return not launched() or int(os.environ.get("LOCAL_RANK", 0)) == 0


def explained(error):
    """`error`, or a `LostProcess` where it only says that the connection to the others broke."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    broken = isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
    if not (dist.is_initialized() and isinstance(error, RuntimeError) and broken):
        return error
    return LostProcess(
        f"rank {rank()} lost the connection to the other processes: one of them has ended; "
        f"torchrun names its rank; continue with --resume"
    )


def print_failure(line, error):
    """Print `line` on standard error, once where all processes fail alike.

    The first process prints at once; then torchrun ends the others, which have waited for that. One
    that is still there after `LOCAL_FAULT_SECONDS` has a fault of its own and prints it with its
    rank. An `error` that is `on_all_processes` is met by all together: they end by themselves.
    """
    first, lost = is_first_here(), isinstance(error, LostProcess)
    if first:
        print(line, file=sys.stderr, flush=True)
    if not launched() or getattr(error, "on_all_processes", False):
        return
    if not first or lost:  # the process that ended is to be the one that torchrun names
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(LOCAL_FAULT_SECONDS)
    if not first:
        print(f"rank {os.environ['RANK']}: {line}", file=sys.stderr, flush=True)
    if not lost:
        _tell_torchrun(line)


def _tell_torchrun(line):
    """Put the line into torchrun's own report, which would say that there is no traceback."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
