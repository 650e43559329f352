"""Shared by all tests: a tiny encoder, a toy vocabulary, and the folders of data and weights."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bert import BertModel
from config import TASKS, BertConfig, MultitaskConfig, UserError
from datasets import TaskBatch
from multitask_bert import MultitaskBERT
from runtime.hub import resolve_encoder
from tokenizer import SPECIAL_TOKENS, BertTokenizer, wordpiece

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY / "data" / "sample"
ROWS = {"train": 24, "dev": 12, "test": 6}  # of each file of `cut_sample`
REAL_DATA = Path(os.environ.get("REAL_DATA_DIR") or REPOSITORY.parent / "shared" / "data")
THREADS = 1  # the matrices are small, and on a busy machine two threads would wait for each other

# The toy vocabulary also has every lower-case letter, alone and as the rest of a word, so that no
# English text becomes [UNK].
TOY_WORDS = (
    "the a an of and is it not to in this that movie film good bad great awful how what why do i "
    "my you can best way learn dog cat man woman running playing un "
    "##ing ##ed ##s ##ly ##er ##est ##un ##able"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

# Made-up examples of `make_batch`.
NAMES = tuple(TASKS)
LABELS = {"sst": [0, 4, 2, 1], "para": [1, 0, 1, 0], "sts": [0.5, 5, 3.25, 2]}
LABELS |= {"cfimdb": [1, 0, 0, 1]}


def pytest_configure(config):
    """Hide the GPU, since expected numbers are those of a CPU, unless `-m` asks for `cuda`."""
    torch.set_num_threads(THREADS)  # fixtures of a module or a session come before `seeded`
    if not re.search(r"(?<!not )\bcuda\b", config.getoption("markexpr", "")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.backends.mps.is_available = lambda: False


def load_script(path):
    """Import a script that is in no package."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_under_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pipeline_of(pieces, *rules, **more):
    """BERT's pipeline of word pieces in the order of their ids."""
    return wordpiece({piece: number for number, piece in enumerate(pieces)}, *rules, **more)


def keep_rows(path, count):
    """Cut a data file to its first rows."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: count + 1]), encoding="utf-8")


def train_in(folder, *commands):
    """Start the training script in a folder, in this process; pytest keeps its signal handlers."""
    import multitask_classifier

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(signal, "signal", lambda *_: None)
        for command in commands:
            multitask_classifier.main(command.split())


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins with the same random numbers and threads."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(11711)


@pytest.fixture(scope="session")
def toy_vocab():
    """Word pieces of the toy vocabulary in the order of their ids."""
    letters = [*LETTERS, *(f"##{letter}" for letter in LETTERS), *".,?!'\"-()"]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *TOY_WORDS.split(), *letters]))


@pytest.fixture(scope="session")
def toy_vocab_folder(toy_vocab, tmp_path_factory):
    """A folder with the toy vocabulary as `vocab.txt`, and `tokenizer_config.json`."""
    folder = tmp_path_factory.mktemp("toy_vocab")
    (folder / "vocab.txt").write_text("\n".join(toy_vocab) + "\n", encoding="utf-8")
    settings = {"do_lower_case": True, "model_max_length": 40}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(toy_vocab_folder):
    """The toy vocabulary's tokenizer; 40 tokens at most."""
    return BertTokenizer.from_pretrained(toy_vocab_folder)


@pytest.fixture(scope="session")
def tiny_config(toy_vocab):
    """A tiny encoder whose sizes all differ, so that swapped axes cannot pass."""
    return BertConfig(
        vocab_size=len(toy_vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=52,
        max_position_embeddings=40,
    )


def make_batch(name, vocab_size, seed=0):
    """Four made-up examples of a task; a sentence is `[CLS] … [SEP]` of 3 to 12 tokens."""
    random = np.random.default_rng([seed, NAMES.index(name)])

    def sentence():
        inner = random.integers(5, vocab_size, random.integers(1, 11))
        return np.array([2, *inner, 3], dtype=np.int32)

    first, second = ([sentence() for _ in range(4)] for _ in range(2))
    labels = torch.tensor(LABELS[name], dtype=torch.float32)
    second = second if TASKS[name].is_pair else None
    return TaskBatch([f"{name}{i}" for i in range(4)], first, second, labels)


@pytest.fixture
def batches(tiny_config):
    """A batch of each of the three tasks."""
    return {name: make_batch(name, tiny_config.vocab_size) for name in NAMES[:3]}


@pytest.fixture
def build(tiny_config, tokenizer):
    """Makes a model over a tiny encoder, without dropout unless `dropout` is given."""

    def make(frozen=False, dropout=0.0, **settings):
        torch.manual_seed(6)
        bert = BertModel(replace(tiny_config, initializer_range=0.2))
        bert.set_dropout(dropout)
        config = MultitaskConfig(**{"dropout": dropout, "max_length": 40, **settings})
        return MultitaskBERT(bert, config, tokenizer, frozen).train()

    return make


@pytest.fixture(scope="session")
def write_encoder(tiny_config, toy_vocab_folder):
    """Writes a tiny random encoder with its tokenizer into a folder, and returns that.

    A large `initializer_range` makes sentences differ, so that a wrong figure shows.
    """

    def write(folder, seed=2, **settings):
        torch.manual_seed(seed)
        tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
        BertModel(replace(tiny_config, **settings)).save_pretrained(folder, tokenizer)
        return folder

    return write


@pytest.fixture
def tiny_folder(write_encoder, tmp_path):
    """The folder of a tiny encoder with its tokenizer."""
    return write_encoder(tmp_path / "encoder")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory for a test; pytest keeps its signal handlers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture(scope="session")
def cut_sample(tmp_path_factory):
    """The first rows of each file of the sample, in a folder that counts as the sample."""
    folder = tmp_path_factory.mktemp("cut") / "data" / "sample"
    folder.mkdir(parents=True)
    for task in TASKS.values():
        for split, count in ROWS.items():
            shutil.copy(SAMPLE / task.file_name(split), folder)
            keep_rows(folder / task.file_name(split), count)
    return folder


@pytest.fixture(scope="session")
def real_data():
    """The folder of the course's own files (REAL_DATA_DIR, else shared/data beside the project)."""
    if not (REAL_DATA / "ids-sst-train.csv").is_file():
        pytest.skip(f"no real data in {REAL_DATA}; name its folder in REAL_DATA_DIR")
    return REAL_DATA


@pytest.fixture(scope="session")
def bundled_folder():
    """The folder of the bundled encoder, all-MiniLM-L6-v2."""
    try:
        return resolve_encoder("bundled").folder
    except UserError as error:
        pytest.skip(f"the bundled encoder is not installed: {error}")
