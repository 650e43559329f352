"""Hardware: device, precision, random numbers, memory."""

import contextlib
import ctypes
import os
import resource
import sys

import numpy as np
import torch

from config import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 16384}  # tokens of one evaluation batch


class OutOfMemory(Exception):
    """The memory of the device, or of the machine, did not suffice."""

    exit_code = 1


class Compute:
    """How a run computes: device, precision, autocast and gradient scaler.

    `precision` is one of `config.PRECISIONS`; `warning` says what the hardware lacks, else None.
    """

    def __init__(self, device, precision="auto", deterministic=False):
        self.device = torch.device(device)
        self.precision, self.warning = select_precision(precision, self.device)
        self.batch_tokens = BATCH_TOKENS[self.device.type]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        keep_freed_memory()
        if self.device.type == "cuda":
            # cuDNN's attention plans anew for each shape, rounds the dropout rate to sixteenths and
            # can have NaN gradients at rows of 64 tokens (pytorch#196678).
            torch.backends.cuda.enable_cudnn_sdp(False)
            if self.precision == "fp32":  # TF32 where the GPU has it
                torch.set_float32_matmul_precision("highest" if deterministic else "high")
        if deterministic and self.device.type == "mps":  # some operations would be refused
            self.warning = self.warning or "deterministic: no effect on mps"
        elif deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            # Memory that nothing reads before it is written need not be filled.
            torch.utils.deterministic.fill_uninitialized_memory = False

    def autocast(self):
        """The context of forward passes: autocast, or nothing in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def __str__(self):
        return f"{device_name(self.device)}, {self.precision}"


def select_device(use_gpu=False, use_cpu=False):
    """`cuda`, else `mps`, else `cpu`; with `use_cpu` always that.

    With `use_gpu` a `UserError` where there is only a CPU.
    """
    if use_cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if use_gpu:
        raise UserError("--use_gpu: no GPU here; the only device is cpu; omit the flag")
    return torch.device("cpu")


def seed_everything(*numbers):
    """Seed torch's generators from numbers such as (seed, step), so that none needs saving."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def keep_freed_memory():
    """Let the C library keep freed memory for the next tensor instead of returning it.

    A returned page comes back zeroed, one fault for each 4 KiB: 5 to 7 % of a training step on a
    CPU. Glibc's settings M_MMAP_MAX and M_TRIM_THRESHOLD; other C libraries stay as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def select_precision(asked, device):
    """The precision to compute in, "fp32", "bf16" or "fp16", and a warning or None.

    `auto` is bf16 if the hardware has it, fp16 on older CUDA GPUs, else fp32.
    """
    has_bf16 = _has_bf16(device)
    if asked == "auto":
        if has_bf16:
            return "bf16", None
        return ("fp16" if device.type == "cuda" else "fp32"), None
    if asked == "bf16" and not has_bf16:
        return "fp32", f"precision bf16: this {device.type} has no bf16; computing in fp32"
    if asked == "fp16" and device.type != "cuda":
        return "fp32", f"precision fp16: only on CUDA GPUs, not on {device.type}; using fp32"
    return asked, None


def _has_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # through oneDNN, on CPUs with AVX512-BF16 or AMX
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


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


def is_memory_error(error):
    """Whether an exception says that memory ran out; most of torch's are plain `RuntimeError`s."""
    signs = ("out of memory", "allocate memory", "not enough memory", "unable to mmap")
    signs += ("alloc_failed", "invalid buffer size")  # cuBLAS, Metal
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


@contextlib.contextmanager
def memory_errors(device, load, remedy="close other programs on it, or choose another device"):
    """Turn exhausted memory into an `OutOfMemory` that names the load and the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "CUDA driver error" in str(error):  # on a vGPU, say
            raise UserError(f"{error}; try PYTORCH_ALLOC_CONF=expandable_segments:False") from error
        if not is_memory_error(error):
            raise
        raise OutOfMemory(
            f"out of memory on {device} with {load}; peak {peak_memory_mib(device):,} MiB; {remedy}"
        ) from error
