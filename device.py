"""On which hardware, in which precision, from which random numbers does a run compute?"""

import contextlib
import ctypes
import resource
import sys

import numpy as np
import torch

from config import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(use_gpu=False):
    """`cuda`, else `mps`, else `cpu`; with `use_gpu` a `UserError` where there is only a CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if use_gpu:
        raise UserError("--use_gpu: no GPU here; the only device is cpu; omit the flag")
    return torch.device("cpu")


def seed_everything(*numbers):
    """Seed dropout's generators from numbers such as (seed, step): nothing else needs saving."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def keep_freed_memory():
    """Have the C library keep freed memory for the next tensor, in place of returning it.

    A returned page comes back zeroed, one fault for each 4 KiB: 5 to 7 % of a training step on a
    CPU. Glibc's settings M_MMAP_MAX and M_TRIM_THRESHOLD; other C libraries stay as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def select_precision(asked, device):
    """The precision to compute in, "fp32", "bf16" or "fp16", and a warning or None.

    `auto` takes bf16 where the hardware has it, fp16 on older CUDA GPUs, else fp32.
    """
    has_bf16 = _has_bf16(device)
    if asked == "auto":
        if has_bf16:
            return "bf16", None
        return ("fp16" if device.type == "cuda" else "fp32"), None
    if asked == "bf16" and not has_bf16:
        return "fp32", f"--precision bf16: this {device.type} has no bf16; computing in fp32"
    if asked == "fp16" and device.type != "cuda":
        return "fp32", f"--precision fp16: only on CUDA GPUs, not on {device.type}; using fp32"
    return asked, None


def _has_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # through oneDNN, on CPUs with AVX512-BF16 or AMX
        has_avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return has_avx512 or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return False


def autocast(device, precision):
    """The context in which forward passes run: autocast, or none for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def device_name(device):
    """A name for people, such as "NVIDIA H200" or "cpu, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def peak_memory_mib(device):
    """Largest memory so far, MiB: allocated on a GPU, else of the whole process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
