"""What is set on the machine before a run computes."""

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from config import UserError
from device import keep_freed_memory, select_device, select_precision

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@pytest.fixture
def library(monkeypatch):
    """Puts another C library in the place of this one, on a platform; returns the names asked."""

    def put(c_library, platform="linux"):
        opened = []
        monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(name) or c_library)
        monkeypatch.setattr(sys, "platform", platform)
        return opened

    return put


@pytest.fixture
def hardware(monkeypatch):
    """Puts other hardware in the place of this one: a GPU by its compute capability, a Mac's GPU,
    a CPU with or without bf16."""

    def put(capability=None, mps=False, cpu_has_bf16=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: cpu_has_bf16, raising=False)

    return put


DEVICES = [
    # hardware, device, what "auto", "bf16" and "fp16" come to
    ({"capability": (9, 0), "mps": True}, "cuda", ("bf16", "bf16", "fp16")),
    ({"capability": (7, 5)}, "cuda", ("fp16", "fp32", "fp16")),
    ({"mps": True}, "mps", ("fp32", "fp32", "fp32")),
    ({}, "cpu", ("fp32", "fp32", "fp32")),
    ({"cpu_has_bf16": True}, "cpu", ("bf16", "bf16", "fp32")),
]


@pytest.mark.parametrize(("parts", "kind", "expected"), DEVICES)
def test_the_best_device_and_the_precisions_that_it_has(hardware, parts, kind, expected):
    """What was asked for and cannot be is said; fp32 is always had."""
    hardware(**parts)
    device = select_device()
    assert device.type == kind
    for asked, precision in zip(("auto", "bf16", "fp16"), expected, strict=True):
        found, warning = select_precision(asked, device)
        assert found == precision
        assert (warning is not None) == (asked not in ("auto", found)), asked
        assert warning is None or asked in warning
    assert select_precision("fp32", device) == ("fp32", None)
    if kind == "cpu":
        with pytest.raises(UserError, match="--use_gpu: no GPU here"):
            select_device(use_gpu=True)
    else:
        assert select_device(use_gpu=True) == device


def test_freed_memory_is_kept_by_glibcs_settings(library):
    """No memory of its own for a large tensor, which would go back, and none given back below."""
    settings = {}
    opened = library(SimpleNamespace(mallopt=settings.__setitem__))
    keep_freed_memory()
    assert opened == [None]  # the library this process runs with
    assert settings == {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}


def test_a_c_library_without_the_settings_is_left_as_it_is(library):
    """Such as musl's."""
    opened = library(SimpleNamespace())
    keep_freed_memory()
    assert opened == [None]


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_not_asked(library, platform):
    """`CDLL(None)` is an error on Windows."""
    opened = library(SimpleNamespace(), platform)
    keep_freed_memory()
    assert opened == []
