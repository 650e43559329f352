"""The benchmark compares like with like: the reference computes the same losses and updates.

Both sides run in processes of their own, as in the benchmark; a tiny random encoder, dropout off.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_script

from bert import BertModel
from config import BertConfig
from tokenizer import SPECIAL_TOKENS, BertTokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "throughput.py"
SAMPLE = ROOT / "data" / "sample"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"

needs_references = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("transformers", "peft")),
    reason="transformers and peft, the benchmark's reference, are not installed",
)

throughput = load_script(SCRIPT)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny random encoder with a vocabulary of single characters."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = BertTokenizer([*SPECIAL_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS)])
    torch.manual_seed(3)
    # Wide initial weights, so that sentences differ and a wrong loss shows.
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2,
                        num_attention_heads=4, intermediate_size=80, initializer_range=0.2,
                        max_position_embeddings=256)  # fmt: skip
    BertModel(config).save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def bench(encoder, tmp_path_factory):
    """Settings, prepared data and both workers: what the tests below share."""
    folder = tmp_path_factory.mktemp("bench")
    settings = throughput.get_args(["--encoder", str(encoder), "--dropout", "0", "--threads", "1"])
    settings.folder, settings.workload = str(folder), str(folder)
    with (
        throughput.Worker("ours.py", folder) as ours,
        throughput.Worker("reference.py", folder) as reference,
    ):
        prepared = ours.ask("prepare", workload=str(folder), encoder=str(encoder),
                            data_dir=str(SAMPLE))  # fmt: skip
        yield argparse.Namespace(**locals())


def open_pair(bench, mode, simcse, kind="fp32", reference=None):
    """Both sides of a row at batch 3, `reference` in place of the reference's worker."""
    row = throughput.Row(mode, simcse, 3, kind)
    return throughput.Pair(
        row, bench.ours, reference or bench.reference, bench.prepared, bench.settings
    )


@needs_references
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
    assert sum(ours.values()) == pytest.approx(sum(reference.values()), rel=1e-4)


class WithoutSimCSE:
    """The reference's worker, told to leave the contrastive losses out."""

    def __init__(self, worker):
        self.worker = worker

    def ask(self, do, **values):
        """Pass the request on, SimCSE switched off."""
        return self.worker.ask(do, **values | ({"simcse": False} if do == "open" else {}))


@needs_references
def test_a_reference_without_the_simcse_terms_is_found_out(bench):
    """The twin: less work on the other side must fail the comparison, by group and by loss."""
    cheat = WithoutSimCSE(bench.reference)
    with pytest.raises(throughput.WorkerFailed, match="parameter groups differ"):
        open_pair(bench, "full-model", True, reference=cheat)
    ours, reference = open_pair(bench, "full-model", True).losses()
    for name in [name for name in reference if name.startswith("simcse_")]:
        less = {key: value for key, value in reference.items() if key != name}
        assert sum(less.values()) != pytest.approx(sum(ours.values()), rel=1e-4)
        with pytest.raises(throughput.WorkerFailed, match="other losses"):
            throughput.check_same_losses(ours, less, tolerance=1e-4)
        with pytest.raises(throughput.WorkerFailed, match=f"loss {name}"):
            throughput.check_same_losses(ours, reference | {name: 0.0}, tolerance=1e-4)


@needs_references
def test_two_training_steps_leave_both_sides_at_the_same_losses(bench):
    """Another batch order, clipping or rate would let the two models part. Weight decay would
    not, in two steps: the check of the parameter groups finds that."""
    pair = open_pair(bench, "full-model", True)
    before, _ = pair.losses()
    for _ in range(2):  # step 0 both times: our rate falls with the step, the reference's does not
        ours, reference = pair.train_ours(0, 1), pair.train_reference(0, 1)
        for name in ("sentences", "tokens", "squares"):
            assert ours[name] == reference[name]
        assert ours["sentences"] == 2 * 5 * 3  # two passes over five columns of batch 3
    ours, reference = pair.losses()
    assert abs(sum(ours.values()) - sum(before.values())) > 0.05
    throughput.check_same_losses(ours, reference, tolerance=1e-4)
    # The twin: one step on another batch, and they part.
    pair.train_ours(0, 1), pair.train_reference(1, 1)
    with pytest.raises(throughput.WorkerFailed, match="loss "):
        throughput.check_same_losses(*pair.losses(), tolerance=1e-4)


@needs_references
def test_evaluation_gives_the_same_scores(bench):
    """A side that skipped rows, or predicted them in another order than their labels, shows."""
    pair = open_pair(bench, "full-model", False)
    ours = pair.ours.ask("evaluate", limit=40)
    reference = pair.reference.ask("evaluate", limit=40, batch_size=16)
    assert ours["scores"] == pytest.approx(reference["scores"], abs=1e-4)
    assert (ours["sentences"], ours["tokens"]) == (reference["sentences"], reference["tokens"])
    assert ours["sentences"] == 5 * 40


def test_a_worker_that_died_is_reported_as_one_that_failed(tmp_path):
    """Closing its broken pipe must not take the report's place: the other rows go on."""
    with (
        pytest.raises(throughput.WorkerFailed, match=r"worker\.py ended with -9"),
        throughput.Worker("worker.py", tmp_path) as worker,
    ):
        worker.process.kill()
        worker.process.wait()
        worker.ask("describe")


def test_flops_of_one_layer_by_hand():
    """A wrong count would make the share of the device's rate wrong with it."""
    config = {"hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 1}
    turn = {"tokens": 5, "squares": 13}  # sentences of 2 and 3 tokens
    linear = 5 * 2 * (4 * 2 * 2 + 2 * 2 * 3)  # query, key, value, output; in and out
    attention = 2 * 2 * 2 * 13  # scores and weighted sum, multiply and add, hidden 2
    assert throughput.forward_flops(config, turn) == linear + attention


def test_the_full_grid_has_every_mode_and_no_simcse_without_an_encoder_to_train():
    rows = throughput.every_row([8, 16, 64])
    names = {row.name for row in rows}
    assert len(names) == len(rows) == 3 * 3 * 5 + 3
    assert "LoRA-simcse-64-bf16" in names
    assert not any("last-linear-layer-simcse" in name for name in names)
    assert {row.name for row in throughput.main_rows("cpu", [16])} <= names


@pytest.mark.slow
@needs_references
def test_the_command_prints_every_row_and_writes_its_figures(encoder, tmp_path):
    """End to end, one step a turn: tables, figures, exit code 0."""
    out = tmp_path / "out.json"
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--encoder", str(encoder), "--data_dir", str(SAMPLE),
         "--rows", "full-model-simcse-4-fp32", "last-linear-layer-plain-4-fp32",
         "--batch_sizes", "4", "--steps", "1", "--repeats", "2", "--frozen_examples", "12",
         "--threads", "1", "--json", str(out)],
        cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(out.read_text(encoding="utf-8"))
    full, frozen = report["rows"]
    assert [full["name"], frozen["name"]] == [
        "full-model-simcse-4-fp32", "last-linear-layer-plain-4-fp32"
    ]  # fmt: skip
    for row in report["rows"]:
        assert 0 < row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2]
        assert min(row[side]["peak_mib"] for side in ("ours", "reference")) > 50
        assert f"| {row['name']} | fp32 / fp32 |" in result.stdout
    assert 0 < full["ours"]["share"] < 1
    assert frozen["ours"]["share"] is None  # nothing is encoded
    assert [len(full[side]["turns"]) for side in ("ours", "reference")] == [2, 2]
