"""How do several processes share one step?

    torchrun --nproc_per_node=2 multitask_classifier.py --fine-tune-mode=LoRA --LoRA_r=32

Each process takes its share of the same global batch; gradients are averaged by
`DistributedDataParallel`. With one process every function here does nothing.
"""

import os
import sys

import torch
import torch.distributed as dist

from config import UserError


def start(device):
    """Join the other processes where torchrun started several; returns this process's device."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"torchrun: several processes need CUDA GPUs or CPUs, not {device.type}")
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

    (batch, hidden) -> (processes * batch, hidden), int.
    """
    if world_size() == 1:
        return rows, 0
    return _GatherRows.apply(rows), rank() * len(rows)


@torch.no_grad()
def sum_over_processes(tensor):
    """Elementwise sum, the same on every process."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def largest(number):
    """Largest of the processes' integers, the same on every process."""
    if world_size() == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def wait():
    """Wait until all processes are here."""
    largest(0)


@torch.no_grad()
def mean_over_processes(tensor):
    """Elementwise mean, the same on every process."""
    return sum_over_processes(tensor.float()) / world_size()


def share(batch_size):
    """The rows of a global batch that this process takes, as a slice.

    Raises `UserError` where the processes' shares would not be equal.
    """
    size, rest = divmod(batch_size, world_size())
    if rest:
        raise UserError(
            f"--batch_size {batch_size}: the batch of a step over all processes; expected a "
            f"multiple of their number, {world_size()}"
        )
    return slice(rank() * size, (rank() + 1) * size)


def quiet_unless_first():
    """Let rank 0 alone print; warnings and errors of all still reach standard error."""
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
