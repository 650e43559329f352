"""Hardware: the device, its precisions, and glibc's settings for memory."""

import ctypes
import os
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY

from config import UserError
from runtime.device import Compute, select_device, select_precision

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@pytest.mark.parametrize(
    ("capability", "mps", "cpu_has_bf16", "kind", "precisions"),
    [
        ((9, 0), True, False, "cuda", ("bf16", "bf16", "fp16")),
        ((7, 5), False, False, "cuda", ("fp16", "fp32", "fp16")),
        (None, True, False, "mps", ("fp32", "fp32", "fp32")),
        (None, False, False, "cpu", ("fp32", "fp32", "fp32")),
        (None, False, True, "cpu", ("bf16", "bf16", "fp32")),
    ],
)
def test_the_best_device_and_its_precisions(
    monkeypatch, capability, mps, cpu_has_bf16, kind, precisions
):
    """What `auto`, `bf16` and `fp16` become; a warning where that is not what was asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: cpu_has_bf16, raising=False)
    device = select_device()
    assert device.type == kind
    assert select_precision("fp32", device) == ("fp32", None)
    for asked, expected in zip(("auto", "bf16", "fp16"), precisions, strict=True):
        found, warning = select_precision(asked, device)
        assert found == expected
        assert (warning is None) == (asked in ("auto", found))
        assert warning is None or f"precision {asked}: " in warning
    if kind == "cpu":
        with pytest.raises(UserError, match="--use_gpu: no GPU here"):
            select_device(use_gpu=True)
    else:
        assert select_device(use_gpu=True) == device
    assert select_device(use_cpu=True).type == "cpu"


@pytest.mark.parametrize(
    ("device", "precision", "deterministic", "expected"),
    [
        ("cuda", "fp32", False, ["high"]),
        ("cuda", "fp32", True, ["highest"]),
        ("cuda", "bf16", False, []),
        ("cpu", "fp32", False, []),
    ],
)
def test_fp32_on_a_gpu_is_tf32_unless_deterministic(
    monkeypatch, device, precision, deterministic, expected
):
    settings, cudnn = [], []
    monkeypatch.setattr("runtime.device.select_precision", lambda *_: (precision, None))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", settings.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    Compute(device, precision, deterministic)
    assert settings == expected
    assert cudnn == [False] * (device == "cuda")


def test_deterministic_is_warned_of_where_it_would_refuse_operations(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", None)
    assert Compute("mps", "fp32", True).warning == "deterministic: no effect on mps"


MEMORY = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SPIN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("names", "of_user", "expected"),
    [
        (MEMORY, None, "expandable_segments:True"),
        (MEMORY, MEMORY[0], "mine"),
        (MEMORY, MEMORY[1], None),  # torch prefers the other name
        (SPIN, None, "5000"),
        (SPIN, SPIN[0], "mine"),
        (SPIN, SPIN[1], None),
    ],
)
def test_a_gpus_memory_and_waiting_threads_are_set_up_unless_the_user_did(
    monkeypatch, names, of_user, expected
):
    for name in names:
        monkeypatch.setenv(name, "mine")  # and put back what was there
        if name != of_user:
            monkeypatch.delenv(name)
    runpy.run_path(str(REPOSITORY / "runtime" / "script.py"))
    assert os.environ.get(names[0]) == expected


@pytest.mark.parametrize(
    ("platform", "has_mallopt"), [("linux", True), ("linux", False), ("darwin", True)]
)
def test_freed_memory_is_kept_by_glibcs_settings(monkeypatch, platform, has_mallopt):
    """Another C library, such as musl, has none; another system is not even asked."""
    opened, settings = [], {}
    library = SimpleNamespace(**{"mallopt": settings.__setitem__} if has_mallopt else {})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(name) or library)
    monkeypatch.setattr(sys, "platform", platform)
    Compute("cpu", "fp32")
    is_linux = platform == "linux"
    assert opened == ([None] if is_linux else [])  # the library that this process runs with
    kept = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
    assert settings == (kept if is_linux and has_mallopt else {})
