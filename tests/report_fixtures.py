"""Shared by test_report.py and test_html.py: four finished runs, and their report."""

import pytest
from conftest import SAMPLE, train_in
from report_helpers import RUNS, make_report


@pytest.fixture(scope="session")
def runs(write_encoder, tmp_path_factory):
    """Folder of four finished runs of a tiny random encoder on the sample."""
    folder = tmp_path_factory.mktemp("report")
    command = f"--pretrained {write_encoder(folder / 'encoder')} --runs_dir {folder}/runs "
    command += f"--predictions_dir {folder}/predictions --data_dir {SAMPLE} --batch_size 4 "
    command += "--log_every 1 --epochs 2 --steps_per_epoch 3 --calibration_examples 100"
    train_in(folder, *(f"{command} {flags}" for flags in RUNS.values()))
    return folder / "runs"


@pytest.fixture(scope="session")
def written(runs, tmp_path_factory):
    """The folder of the report of all four, and its text."""
    folder = tmp_path_factory.mktemp("written") / "report"
    return folder, make_report([runs / name for name in RUNS], folder)
