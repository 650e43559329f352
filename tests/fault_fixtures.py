"""Shared by tests/test_faults*.py: a tiny encoder, a little data, and runs to break."""

import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from conftest import SAMPLE, keep_rows
from fault_hooks import kill_at, outcome, run, signal_at


class Tiny:
    """An encoder's folder, a data folder, and the flags of a run on them."""

    def __init__(self, encoder, data):
        self.encoder, self.data = encoder, data

    def argv(self, *more, data=None, encoder=None):
        """The base run: ten steps, a checkpoint every second step and after each epoch of five."""
        files = ["--pretrained", encoder or self.encoder, "--data_dir", data or self.data]
        flags = "--epochs 2 --steps_per_epoch 5 --save_every 2 --log_every 1 --unsupervised_simcse"
        return [*files, *flags.split(), "--batch_size", 4, "--precision", "fp32", *more]


@pytest.fixture(scope="session")
def tiny(write_encoder, tmp_path_factory):
    """The header and 20 rows of each file of the sample, and a random encoder."""
    data = tmp_path_factory.mktemp("data")
    for path in SAMPLE.glob("*.csv"):
        keep_rows(Path(shutil.copy(path, data)), 20)
    return Tiny(write_encoder(tmp_path_factory.mktemp("encoder"), seed=0), data)


@pytest.fixture(scope="session")
def unbroken(tiny, tmp_path_factory):
    """The folder of the base run, finished without a break."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(folder, tiny.argv(), partial(kill_at, 0))  # 0: only counts
    assert done.returncode == 0, done
    return folder


@pytest.fixture(scope="session")
def writing_calls(unbroken):
    """Number of calls that write in the base run."""
    return (unbroken / "calls").stat().st_size


@pytest.fixture(scope="session")
def expected(unbroken):
    """The outcome of the base run, however often it is broken and resumed."""
    return outcome(unbroken)


@pytest.fixture(scope="session")
def halfway(tiny, tmp_path_factory):
    """The base run, killed in step 8: a best model of step 5, checkpoints of steps 5 and 6."""
    folder = tmp_path_factory.mktemp("halfway")
    done = run(folder, tiny.argv(), partial(signal_at, "forward", 8, signal.SIGKILL))
    assert done.returncode == -signal.SIGKILL, done
    return folder
