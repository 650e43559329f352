"""What both sides of the benchmark share: the pipe, the clock, memory, the data files.

A worker is a process that reads one JSON request a line and answers with one line. This file knows
nothing of the program, so that the reference can use it; run by itself it is the worker that
measures plain matrix products.
"""

import json
import os
import resource
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

TASKS = ("sst", "para", "sts")
PAIRS = ("para", "sts")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def serve(worker):
    """Answer `{"do": METHOD, …}` with what that method of `worker` returns, until the pipe closes.

    What else is printed goes to standard error: standard output belongs to the answers.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(worker, request.pop("do"))(**request) or {}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


# ----------------------------------------------------------------------------------- data files


def write_split(workload, split, task, columns, labels):
    """Write one file's token ids: `columns` of int32 arrays, `labels` (examples,) fp32."""
    arrays = {"labels": labels}
    for number, column in enumerate(columns):
        arrays[f"ids_{number}"] = np.concatenate(column)
        arrays[f"ends_{number}"] = np.cumsum([len(ids) for ids in column])
    np.savez_compressed(Path(workload) / f"{split}-{task}.npz", **arrays)


def read_split(workload, split, task, limit=0):
    """The first `limit` (0: all) of what `write_split` wrote: columns of int32 arrays, labels."""
    with np.load(Path(workload) / f"{split}-{task}.npz") as file:
        count = sum(name.startswith("ids_") for name in file)
        columns = [np.split(file[f"ids_{n}"], file[f"ends_{n}"][:-1]) for n in range(count)]
        labels = file["labels"]
    end = limit or len(labels)
    return [column[:end] for column in columns], labels[:end]


def count(sentences, passes=1):
    """What encoding `sentences` `passes` times takes: sentences, real tokens, tokens squared."""
    lengths = np.array([len(ids) for ids in sentences], dtype=np.int64)
    return {
        "sentences": passes * len(lengths),
        "tokens": passes * int(lengths.sum()),
        "squares": passes * int((lengths**2).sum()),
    }


# ----------------------------------------------------------------------------- clock and memory


def clock(device):
    """Seconds, once the device has done all it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device, model, optimizer):
    """Peak memory (GPU: allocated; CPU: resident) and that of the training state, both MiB.

    The state is weights, gradients and optimiser state. On Linux the peak is VmHWM: `ru_maxrss`
    would begin at the parent process's.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p for p in model.parameters() if p.requires_grad]  # a gradient each
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    state = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)) / 2**20
    return {"peak_mib": peak_memory(device), "state_mib": round(state, 1)}


def peak_memory(device):
    """Largest memory so far, MiB."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return round(int(peak.split()[1]) / 2**10, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def describe(device, threads=None):
    """Set the number of CPU threads (None: torch's own choice) and name the device."""
    if threads:
        torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------- plain matrix products


class MatrixProducts:
    """Measures what plain matrix products reach on the device."""

    def open(self, device, threads=None):
        """Get ready."""
        self.device = device
        return {"device": describe(device, threads)}

    def layer(self, precision, tokens, hidden, intermediate, seconds=0.3):
        """FLOP/s over the products of one BERT layer, forward and backward, on `tokens` rows."""
        kind = {"dtype": DTYPES[precision], "device": self.device}
        sizes = [(hidden, hidden)] * 4 + [(hidden, intermediate), (intermediate, hidden)]
        weights = [torch.randn(n_out, n_in, **kind) for n_in, n_out in sizes]
        inputs = {n: torch.randn(tokens, n, **kind) for n in (hidden, intermediate)}

        def products():
            for (n_in, n_out), weight in zip(sizes, weights, strict=True):
                inputs[n_in] @ weight.T  # the output
                inputs[n_out] @ weight  # the gradient of the input
                inputs[n_out].T @ inputs[n_in]  # the gradient of the weight

        flops = 3 * sum(2 * tokens * n_in * n_out for n_in, n_out in sizes)
        return {"flops_per_s": flops / self.seconds_each(products, seconds)}

    def square(self, precision, size, seconds=0.3):
        """FLOP/s of one product of two square matrices."""
        a, b = (
            torch.randn(size, size, dtype=DTYPES[precision], device=self.device) for _ in range(2)
        )
        return {"flops_per_s": 2 * size**3 / self.seconds_each(lambda: a @ b, seconds)}

    def seconds_each(self, work, seconds):
        """Seconds that `work()` takes: its mean over at least `seconds`, after one call more."""
        work()
        began, times, spent = clock(self.device), 0, 0.0
        while spent < seconds:
            for _ in range(max(1, times)):  # twice as many each time: few waits for the device
                work()
            times += max(1, times)
            spent = clock(self.device) - began
        return spent / times


if __name__ == "__main__":
    serve(MatrixProducts())
