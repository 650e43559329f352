"""What the workers of the benchmark share: requests, counts, clock, memory.

A worker is a process that reads one JSON request per line and answers each with one line. This
file knows nothing of the program, so that the reference can import it. Run by itself, it is the
worker that measures plain matrix products.
"""

import json
import os
import resource
import sys
import time
import traceback

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
    """Base of all workers. Those that train set `model` and `optimizer` in `open`."""

    def open(self, device, threads=None):
        """Compute on `device` with `threads` CPU threads (None: torch's choice); names it."""
        self.device = torch.device(device)
        if threads:
            torch.set_num_threads(threads)
        name = f"cpu, {torch.get_num_threads()} threads"
        if self.device.type == "cuda":  # as `Compute` sets it, on both sides: TF32, no cuDNN
            torch.set_float32_matmul_precision("high")
            torch.backends.cuda.enable_cudnn_sdp(False)
            name = torch.cuda.get_device_name(self.device)
        return {"device": name}

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
        """Peak memory, and size of the training state (weights, gradients, optimiser), MiB.

        The peak is what was allocated on a GPU, else that of the whole process.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p for p in self.model.parameters() if p.requires_grad]  # a gradient each
        tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        state = sum(tensor.nbytes for tensor in tensors)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, else KiB
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        return {"peak_mib": round(peak / 2**20, 1), "state_mib": round(state / 2**20, 1)}


class MatrixProducts(Worker):
    """Measures the speed of plain matrix products on the device."""

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

    def seconds_each(self, work):
        """Seconds of one call of `work`: the mean over at least 0.3 seconds, after first calls."""
        from torch.utils.benchmark import Timer  # not by the sides: their memory is measured

        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.3).mean


if __name__ == "__main__":
    serve(MatrixProducts())
