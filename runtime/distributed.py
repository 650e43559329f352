"""Several processes share one step.

    torchrun --standalone --nproc_per_node=2 multitask_classifier.py --fine-tune-mode=LoRA

Each process takes its share of the same global batch; `DistributedDataParallel` averages the
gradients. With one process nothing is exchanged.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist

from config import UserError
from runtime import script


class LostProcess(Exception):
    """The connection to the other processes broke: one of them has ended."""

    exit_code = 1
    is_lost_connection = True


@contextlib.contextmanager
def joined_processes(device):
    """Join the other processes if torchrun started several; yields this process's device.

    Only rank 0 prints. At the end the process leaves the group. Raises `LostProcess` where the
    connection breaks.
    """
    if not script.launched():
        yield device
        return
    if device.type == "cuda":
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"torchrun --nproc_per_node {processes}: this machine has {gpus} GPUs")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:  # several processes cannot share an Apple GPU
        device = torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        yield device
    except RuntimeError as error:
        signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
        if isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs):
            cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise LostProcess(
                f"rank {rank()} lost the connection to the other processes ({cause}); torchrun "
                f"names the rank that ended; start again, a training run with --resume"
            ) from error
        raise
    dist.destroy_process_group()


def rank():
    """Number of this process; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check_stop():
    """Raise `Stopped` if any process got a signal; all processes call it, and stop, together."""
    if number := largest(script.received["number"] or 0):
        raise script.Stopped(number)


def _all_gather(rows):
    """The rows of all processes, without gradients."""
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    """The rows of all processes. Backward: sum the gradients that all ranks send to these rows."""

    @staticmethod
    def forward(ctx, rows):
        return _all_gather(rows)

    @staticmethod
    def backward(ctx, gradient):
        size = len(gradient) // world_size()
        return sum_over_processes(gradient)[rank() * size : (rank() + 1) * size]


def gather_rows(rows):
    """The rows of all processes, with gradients, and where this process's begin.

    (batch, hidden) -> (processes * batch, hidden), int. Every process has as many rows. They travel
    in fp32 under autocast too, so that their gradients are summed in fp32. Integers stay integers,
    and the rows of one process as they are.
    """
    if world_size() == 1:
        return rows, 0
    is_float = rows.is_floating_point()
    gathered = _GatherRows.apply(rows.float()) if is_float else _all_gather(rows)
    return gathered, rank() * len(rows)


@torch.no_grad()
def sum_over_processes(tensor):
    """Elementwise sum, the same on every process."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def mean_over_processes(tensor):
    """Elementwise mean, the same on every process."""
    return sum_over_processes(tensor.float()) / world_size()


def largest(number):
    """Largest of the processes' integers, the same on every process."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)  # on the CPU: no GPU is waited for
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


@contextlib.contextmanager
def first_process_first():
    """A block that rank 0 leaves before the others enter it: they find what it has written."""
    if rank() > 0:
        largest(0)  # waits for all
    yield
    if rank() == 0:
        largest(0)


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


def gather_texts(text):
    """The texts of all processes by rank, on every process."""
    texts = [text] * world_size()
    if world_size() > 1:
        dist.all_gather_object(texts, text)
    return texts


def require_same(text, what):
    """Raise `UserError` unless all processes have the same `text`; `what` names it."""
    if len(set(gather_texts(text))) > 1:
        raise UserError(f"torchrun: the processes do not have the same {what}")
