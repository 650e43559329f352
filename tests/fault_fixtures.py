"""Shared by tests/test_faults*.py: the server of runs, a tiny encoder, a little data, base runs."""

import re
import signal
from collections import Counter

import pytest
import torch
from fault_hooks import REPOSITORY, Program, outcome

from bert import BertModel
from config import TASKS, BertConfig
from tokenizer import SPECIAL_TOKENS, BertTokenizer

TRAIN, DEV, TEST = 24, 10, 6  # rows of each file
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


class Tiny:
    """An encoder's folder, a data folder, and the flags of a run of ten steps on them."""

    def __init__(self, encoder, data):
        self.encoder, self.data = encoder, data

    def argv(self, *more, data=None, encoder=None):
        """The base run's command line, with more flags behind it."""
        return [
            "--pretrained", encoder or self.encoder, "--data_dir", data or self.data,
            "--epochs", 2, "--steps_per_epoch", 5, "--save_every", 2, "--log_every", 1,
            "--batch_size", 4, "--precision", "fp32", "--unsupervised_simcse", *more,
        ]  # fmt: skip

    def lora_argv(self, *more):
        """A LoRA run of three steps."""
        return [
            "--pretrained", self.encoder, "--data_dir", self.data, "--fine-tune-mode", "LoRA",
            "--LoRA_r", 4, "--epochs", 1, "--steps_per_epoch", 3, "--batch_size", 4,
            "--precision", "fp32", *more,
        ]  # fmt: skip


@pytest.fixture(scope="session")
def program():
    """The scripts, each run in a process of its own."""
    program = Program()
    yield program
    program.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A few rows of the shipped sample, and a random encoder that knows their words."""
    data = tmp_path_factory.mktemp("data")
    words = Counter()
    for name in ("sst", "para", "sts"):
        for split, rows in (("train", TRAIN), ("dev", DEV), ("test", TEST)):
            file = TASKS[name].file_name(split)
            text = (REPOSITORY / "data" / "sample" / file).read_text(encoding="utf-8")
            text = "".join(text.splitlines(keepends=True)[: rows + 1])
            (data / file).write_text(text, encoding="utf-8")
            words.update(re.findall(r"[a-z]{2,}", text.lower()))
    pieces = [*LETTERS, *(f"##{letter}" for letter in LETTERS), *".,?!'\"-"]
    vocab = [*SPECIAL_TOKENS, *pieces, *(word for word, _ in words.most_common(150))]
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    encoder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(config).save_pretrained(encoder, BertTokenizer(vocab))
    return Tiny(encoder, data)


@pytest.fixture(scope="session")
def unbroken(program, tiny, tmp_path_factory):
    """The folder of the base run, begun and ended without a break."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = program.run(folder, tiny.argv(), [("kill_at", {"number": 0})])  # 0: it only counts
    assert done.code == 0, done
    return folder


@pytest.fixture(scope="session")
def writing_calls(unbroken):
    """Number of calls that write in the base run."""
    return int((unbroken / "calls").read_text())


@pytest.fixture(scope="session")
def halfway(program, tiny, tmp_path_factory):
    """The base run, killed in step 8: with a best model of step 5, and states of step 5 and 6."""
    folder = tmp_path_factory.mktemp("halfway")
    hook = ("signal_in", {"where": "step", "number": signal.SIGKILL, "step": 8})
    assert program.run(folder, tiny.argv(), [hook]).code == -signal.SIGKILL
    return folder


@pytest.fixture(scope="session")
def lora_run(program, tiny, tmp_path_factory):
    """The folder of a finished LoRA run."""
    folder = tmp_path_factory.mktemp("lora")
    done = program.run(folder, tiny.lora_argv())
    assert done.code == 0, done
    return folder


@pytest.fixture(scope="session")
def expected(unbroken):
    """What every broken and continued base run has to end with."""
    return outcome(unbroken)
