"""What the workers of the benchmark share: requests, counts, clock, memory.

A worker is a process that reads one JSON request per line and answers each with one line. This
file knows nothing of the program, so that the reference can import it. Run by itself, it is the
worker that measures plain matrix products.
"""

import json
import os
import re
import resource
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def serve(worker):
    """Answer each request `{"do": METHOD, …}` with what that method of `worker` returns.

    Ends when the pipe is closed. Other output goes to standard error: standard output belongs to
    the answers.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(worker, request.pop("do"))(**request)
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


def count(sentences, passes=1):
    """Sentences, real tokens, and sum of squared lengths when all are encoded `passes` times."""
    lengths = np.array([len(ids) for ids in sentences], dtype=np.int64)
    sums = {"sentences": len(lengths), "tokens": lengths.sum(), "squares": (lengths**2).sum()}
    return {name: passes * int(value) for name, value in sums.items()}


class Worker:
    """Base of all workers. `open` calls `use`; those that train set `model` and `optimizer` too."""

    def use(self, device, threads):
        """Compute on `device` with `threads` CPU threads (None: torch's choice); returns a name."""
        self.device = torch.device(device)
        if threads:
            torch.set_num_threads(threads)
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu, {torch.get_num_threads()} threads"

    def clock(self):
        """Seconds, once the device has finished all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def groups(self):
        """(rate, weight decay, number of trained values) of each parameter group, in order."""
        return sorted(
            [group["lr"], group["weight_decay"], sum(p.numel() for p in group["params"])]
            for group in self.optimizer.param_groups
        )

    def memory(self):
        """Peak memory, and size of the training state (weights, gradients, optimiser), MiB."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p for p in self.model.parameters() if p.requires_grad]  # a gradient each
        tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        state = sum(tensor.nbytes for tensor in tensors) / 2**20
        return {"peak_mib": peak_memory(self.device), "state_mib": round(state, 1)}


def peak_memory(device):
    """Largest memory so far, MiB: allocated on a GPU, else of the whole process.

    On Linux it is VmHWM, since `ru_maxrss` would begin at that of the parent process.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    status = Path("/proc/self/status")
    if found := re.search(r"VmHWM:\s*(\d+)", status.read_text() if status.exists() else ""):
        return round(int(found[1]) / 2**10, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


class MatrixProducts(Worker):
    """Measures the speed of plain matrix products on the device."""

    def open(self, device, threads=None):
        """Choose the device and the number of CPU threads."""
        return {"device": self.use(device, threads)}

    def layer(self, precision, tokens, hidden, intermediate):
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
        return {"flops_per_s": flops / self.seconds_each(products)}

    def square(self, precision, size):
        """FLOP/s of the product of two square matrices."""
        a, b = torch.randn(2, size, size, dtype=DTYPES[precision], device=self.device)
        return {"flops_per_s": 2 * size**3 / self.seconds_each(lambda: a @ b)}

    def seconds_each(self, work, seconds=0.3):
        """Seconds of one call of `work`: the mean over at least `seconds`, after a first call."""
        work()
        began, calls, spent = self.clock(), 0, 0.0
        while spent < seconds:
            for _ in range(max(1, calls)):  # twice as many each time: few waits for the device
                work()
            calls += max(1, calls)
            spent = self.clock() - began
        return spent / calls


if __name__ == "__main__":
    serve(MatrixProducts())
