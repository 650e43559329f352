"""The benchmark compares like with like: the reference computes the same losses and updates.

Both sides are processes, as in the benchmark; a tiny random encoder, dropout off.
"""

import argparse
import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY, SAMPLE

from benchmarks import throughput

SCRIPT = REPOSITORY / "benchmarks" / "throughput.py"


@pytest.fixture(scope="module")
def encoder(write_encoder, tmp_path_factory):
    """The folder of a tiny random encoder, if the benchmark's reference can be compared with."""
    if not all(importlib.util.find_spec(name) for name in ("transformers", "peft")):
        pytest.skip("transformers and peft are not installed")
    return str(write_encoder(tmp_path_factory.mktemp("encoder"), seed=3, initializer_range=0.2))


@pytest.fixture(scope="module")
def bench(encoder, tmp_path_factory):
    """Settings, both workers and the encoder, with the data prepared."""
    folder = str(tmp_path_factory.mktemp("bench"))
    settings = throughput.parse_flags(["--encoder", encoder, "--dropout", "0", "--threads", "1"])
    settings.folder = settings.workload = folder
    with (
        throughput.WorkerProcess("ours.py", folder) as ours,
        throughput.WorkerProcess("reference.py", folder) as reference,
    ):
        ours.ask("prepare", workload=folder, encoder=encoder, data_dir=str(SAMPLE))
        yield argparse.Namespace(**locals())


def open_pair(bench, mode, simcse, reference=None):
    """Both sides of a row at batch 3; `reference` replaces the worker of the reference."""
    row = throughput.Row(mode, simcse, 3, "fp32")
    reference = reference or bench.reference
    return throughput.Sides(row, bench.ours, reference, bench.encoder, bench.settings)


@pytest.mark.parametrize(
    ("mode", "simcse"),
    [("full-model", True), ("full-model", False), ("LoRA", True), ("last-linear-layer", False)],
)
def test_both_sides_compute_the_same_losses(bench, mode, simcse):
    """Another head, pooling, loss, mask or batch on either side would make the ratio worthless."""
    ours, reference = open_pair(bench, mode, simcse).losses()
    tasks = ["sst", "para", "sts"]
    assert sorted(ours) == sorted(tasks + [f"simcse_{task}" for task in tasks if simcse])
    throughput.check_same_losses(ours, reference, tolerance=1e-4)


def test_a_reference_without_the_simcse_losses_fails_the_comparison(bench):
    """The twin: less work on the other side shows in the parameter groups and in the losses."""
    reference = bench.reference
    cheat = argparse.Namespace(ask=lambda do, **job: reference.ask(do, **job | {"simcse": False}))
    with pytest.raises(throughput.WorkerFailed, match="parameter groups differ"):
        open_pair(bench, "full-model", True, reference=cheat)
    ours, reference = open_pair(bench, "full-model", True).losses()
    with pytest.raises(throughput.WorkerFailed, match="loss simcse_sst"):
        throughput.check_same_losses(ours, reference | {"simcse_sst": 0.0}, tolerance=1e-4)
    del reference["simcse_sst"]
    with pytest.raises(throughput.WorkerFailed, match="other losses"):
        throughput.check_same_losses(ours, reference, tolerance=1e-4)


def test_two_training_steps_leave_both_sides_at_the_same_losses(bench):
    """Another batch order, clipping or rate would make the two models differ.

    Weight decay would not show after two steps; the check of the parameter groups covers it.
    """
    pair = open_pair(bench, "full-model", True)
    before, _ = pair.losses()
    for _ in range(2):  # step 0 both times: our rate falls with the step, the reference's does not
        ours, reference = pair.train_ours(0, 1), pair.train_reference(0, 1)
        for name in ("steps", "sentences", "tokens", "squares"):
            assert ours[name] == reference[name]
        assert ours["sentences"] == 2 * 5 * 3  # two passes over five columns of batch 3
    ours, reference = pair.losses()
    assert abs(sum(ours.values()) - sum(before.values())) > 0.05
    throughput.check_same_losses(ours, reference, tolerance=1e-4)
    # The twin: after one step on another batch, they differ.
    pair.train_ours(0, 1), pair.train_reference(1, 1)
    with pytest.raises(throughput.WorkerFailed, match="loss "):
        throughput.check_same_losses(*pair.losses(), tolerance=1e-4)


def test_evaluation_gives_the_same_scores(bench):
    """It shows if a side skips rows, or predicts them in another order than their labels."""
    pair = open_pair(bench, "evaluation", False)
    ours, reference = (side.ask("evaluate", limit=40) for side in (pair.ours, pair.reference))
    assert ours["scores"] == pytest.approx(reference["scores"], abs=1e-4)
    assert (ours["sentences"], ours["tokens"]) == (reference["sentences"], reference["tokens"])
    assert ours["sentences"] == 5 * 40


def test_a_dead_worker_is_reported_as_failed(tmp_path):
    """Closing its broken pipe must not hide that: the other rows are still measured."""
    with (
        pytest.raises(throughput.WorkerFailed, match=r"worker\.py ended with -9"),
        throughput.WorkerProcess("worker.py", tmp_path) as worker,
    ):
        worker.process.kill()
        worker.process.wait()
        worker.ask("open", device="cpu")


def test_flops_of_one_layer_by_hand():
    """A wrong count would make the share of the device's speed wrong too."""
    config = {"hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 1}
    turn = {"tokens": 5, "squares": 13}  # sentences of 2 and 3 tokens
    linear = 5 * 2 * (4 * 2 * 2 + 2 * 2 * 3)  # query, key, value, output; in and out
    attention = 2 * 2 * 2 * 13  # scores and weighted sum, multiply and add, hidden 2
    assert throughput.forward_flops(config, turn) == linear + attention


def names_of(*argv):
    """Names of the rows that a command line selects."""
    return [row.name for row in throughput.select_rows(throughput.parse_flags(argv))]


def test_the_rows_of_the_full_grid_and_of_the_main_table():
    """SimCSE cannot train a frozen encoder."""
    names = names_of("--all")
    assert len(set(names)) == len(names) == 3 * 3 * 5 + 3
    assert "LoRA-simcse-64-bf16" in names
    assert not any("last-linear-layer-simcse" in name for name in names)
    assert names_of("--rows", "LoRA-*-64-fp32") == ["LoRA-simcse-64-fp32", "LoRA-plain-64-fp32"]
    assert names_of("--startup") == []
    full = [f"full-model-simcse-16-{kind}" for kind in ("fp32", "bf16", "default")]
    others = ["LoRA-simcse-16", "last-linear-layer-plain-16", "evaluation-16"]
    assert names_of() == full + [f"{name}-default" for name in others]
    trained = [f"{m}-simcse-{size}" for m in ("full-model", "LoRA") for size in (16, 64, 256)]
    assert names_of("--device", "cuda") == [f"{name}-bf16" for name in trained + others[1:]]


@pytest.mark.slow
def test_the_command_prints_every_row_and_writes_its_figures(encoder, tmp_path):
    """End to end, one step per turn: table, figures, exit code 0."""
    names = ["full-model-simcse-4-fp32", "last-linear-layer-plain-4-fp32"]
    flags = f"--encoder {encoder} --data_dir {SAMPLE} --batch_sizes 4 --steps 1 --repeats 2"
    flags += f" --frozen_examples 12 --threads 1 --json {tmp_path}/out.json --rows"
    command = [sys.executable, str(SCRIPT), *flags.split(), *names]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    full, frozen = report["rows"]
    assert [full["name"], frozen["name"]] == names
    for row in report["rows"]:
        assert 0 < row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2]
        assert min(row[side]["peak_mib"] for side in ("ours", "reference")) > 50
        assert f"| {row['name']} | fp32 / fp32 |" in result.stdout
    assert 0 < full["ours"]["share"] < 1
    assert frozen["ours"]["share"] is None  # ours encodes nothing
    assert [len(full[side]["turns"]) for side in ("ours", "reference")] == [2, 2]
