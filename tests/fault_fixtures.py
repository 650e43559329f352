"""Shared by tests/test_faults*.py: a tiny encoder, a little data, and runs to break."""

import re
import signal
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import SAMPLE
from fault_hooks import kill_at, outcome, run, signal_at

from bert import BertModel
from config import TASKS, BertConfig
from tokenizer import SPECIAL_TOKENS, BertTokenizer

ROWS = {"train": 24, "dev": 10, "test": 6}  # of each file
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


class Tiny:
    """An encoder's folder, a data folder, and the flags of runs on them."""

    def __init__(self, encoder, data):
        self.encoder, self.data = encoder, data

    def argv(self, *more, data=None, encoder=None):
        """The base run: ten steps, a checkpoint every second step and after each epoch of five."""
        flags = "--epochs 2 --steps_per_epoch 5 --save_every 2 --log_every 1 --unsupervised_simcse"
        return [*self._common(data, encoder), *flags.split(), *more]

    def lora_argv(self, *more, encoder=None):
        """A LoRA run of three steps."""
        flags = "--fine-tune-mode LoRA --LoRA_r 4 --epochs 1 --steps_per_epoch 3"
        return [*self._common(None, encoder), *flags.split(), *more]

    def _common(self, data, encoder):
        files = ["--pretrained", encoder or self.encoder, "--data_dir", data or self.data]
        return [*files, "--batch_size", 4, "--precision", "fp32"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A few rows of the shipped sample, and a random encoder that knows their words."""
    data, encoder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("encoder")
    words = Counter()
    for name in ("sst", "para", "sts"):
        for split, rows in ROWS.items():
            file = TASKS[name].file_name(split)
            lines = (SAMPLE / file).read_text(encoding="utf-8").splitlines(keepends=True)
            text = "".join(lines[: rows + 1])
            (data / file).write_text(text, encoding="utf-8")
            words.update(re.findall(r"[a-z]{2,}", text.lower()))
    pieces = [*LETTERS, *(f"##{letter}" for letter in LETTERS), *".,?!'\"-"]
    vocab = [*SPECIAL_TOKENS, *pieces, *(word for word, _ in words.most_common(150))]
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(encoder, BertTokenizer(vocab))
    return Tiny(encoder, data)


@pytest.fixture(scope="session")
def unbroken(tiny, tmp_path_factory):
    """The folder of the base run, finished without a break."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(folder, tiny.argv(), partial(kill_at, 0))  # 0: only counts
    assert done.code == 0, done
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
    assert done.code == -signal.SIGKILL, done
    return folder


@pytest.fixture(scope="session")
def lora_run(tiny, tmp_path_factory):
    """The folder of a finished LoRA run."""
    folder = tmp_path_factory.mktemp("lora")
    done = run(folder, tiny.lora_argv())
    assert done.code == 0, done
    return folder
