"""Shared by test_report.py and test_html.py: four finished runs, and their report."""

import signal

import pytest
from conftest import SAMPLE
from report_helpers import RUNS, make_report

import multitask_classifier
from bert import BertModel
from tokenizer import BertTokenizer


@pytest.fixture(scope="session")
def runs(tiny_config, toy_vocab_folder, tmp_path_factory):
    """Folder of four finished runs of a tiny random encoder on the sample."""
    folder = tmp_path_factory.mktemp("report")
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    BertModel(tiny_config).save_pretrained(folder / "encoder", tokenizer)
    paths = {"pretrained": "encoder", "runs_dir": "runs", "predictions_dir": "predictions"}
    command = [word for flag, name in paths.items() for word in (f"--{flag}", str(folder / name))]
    command += ["--data_dir", str(SAMPLE), "--batch_size", "4", "--log_every", "1"]
    command += ["--epochs", "2", "--steps_per_epoch", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
        for flags in RUNS.values():
            multitask_classifier.main([*command, *flags])
    assert {path.name for path in (folder / "runs").iterdir()} == set(RUNS)
    return folder / "runs"


@pytest.fixture(scope="session")
def written(runs, tmp_path_factory):
    """The folder of the report of all four, and its text."""
    folder = tmp_path_factory.mktemp("written") / "report"
    return folder, make_report([runs / name for name in RUNS], folder)
