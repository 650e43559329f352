"""What is set on the machine before a run computes."""

import ctypes
import sys
from types import SimpleNamespace

import pytest

from device import keep_freed_memory

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


def test_freed_memory_is_kept_here_without_an_error():
    assert keep_freed_memory() is None


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
