"""The training and evaluation scripts end to end, on a tiny encoder and a cut of the sample."""

import contextlib
import csv
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from functools import partial

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SAMPLE
from safetensors.torch import load_file, save_file

import base_bert
import device
import evaluation
import multitask_bert
import multitask_classifier
import saved_models
from bert import BertModel
from config import TASKS, BertConfig, UserError
from lora import LORA_TARGETS
from run_folder import OutputError, RunFolder
from script import NotFinite
from tokenizer import BertTokenizer

ROWS = {"train": 24, "dev": 12, "test": 6}  # of each file of the sample
THREE = ("sst", "para", "sts")
SMALL = "--pretrained encoder --data_dir data --batch_size 4 --log_every 1"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A working directory of the test's own; pytest keeps its signal handlers.

    One thread: two would spend the time waiting for each other on models this small.
    """
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_encoder(toy_vocab_folder, toy_vocab, tmp_path_factory):
    """A random encoder of 512 positions with the toy vocabulary, as a folder."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(toy_vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=52, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    tokenizer.model_max_length = 512
    BertModel(config).save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def cut_sample(tmp_path_factory):
    """The first rows of each file of the sample."""
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS.values():
        for split, count in ROWS.items():
            name = task.file_name(split)
            lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / name).write_text("".join(lines[: count + 1]), encoding="utf-8")
    return folder


@pytest.fixture
def train(workplace, tiny_encoder, cut_sample):
    """Runs the training script in this process and gives back the run's folder."""
    shutil.copytree(tiny_encoder, workplace / "encoder")
    shutil.copytree(cut_sample, workplace / "data")

    def run(flags, expected):
        multitask_classifier.main(f"{SMALL} {flags}".split())
        return workplace / "runs" / expected

    return run


def metrics(run, kind):
    """Lines of a kind of a run's metrics."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def prediction_files(folder):
    """Content of the prediction files by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*-output.csv")}


def check_complete(run, workplace, tasks=THREE, steps=3):
    """Everything that a finished run leaves, and in the course's formats."""
    names = {f"{name}-{split}-output.csv" for name in tasks for split in ("dev", "test")}
    written = prediction_files(workplace / "predictions")
    assert set(written) == names
    assert prediction_files(run / "predictions") == written
    for name in tasks:
        for split in ("dev", "test"):
            lines = written[f"{name}-{split}-output.csv"].decode().splitlines()
            assert lines[0] == f"id \t {TASKS[name].header} "
            ids = [line.split(" , ")[0] for line in lines[1:]]
            assert ids == read_ids(workplace / "data" / TASKS[name].file_name(split))
            assert all(line.endswith(" ") for line in lines)
        assert (run / "predictions" / f"{name}-dev-scores.tsv").is_file()
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, steps + 1))
    evaluations = metrics(run, "eval")
    assert evaluations[-1]["step"] == steps
    assert set(evaluations[-1]["dev"]) == set(tasks)
    assert all(line["dev"][name]["loss"] > 0 for line in evaluations for name in tasks)
    assert (run / "best").is_symlink()
    assert list((run / "state").iterdir())
    assert not list(run.rglob(".tmp-*"))


def read_ids(path):
    """Ids of a task file in order."""
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    return [row[header.index("id")] for row in rows]


# ------------------------------------------------------------------------------- the three modes


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--fine-tune-mode last-linear-layer", "last-linear-layer"),
        ("--fine-tune-mode full-model", "full-model"),
        ("--fine-tune-mode LoRA --LoRA_r 4 --LoRA_dropout 0.1", "LoRA"),
        ("--unsupervised_simcse --supervised_simcse --model_file_suffix simcse",
         "full-model-simcse"),
        ("--fine-tune-mode LoRA --LoRA_r 2 --pair_encoding joint --unsupervised_simcse", "LoRA"),
        ("--gradient_surgery --unsupervised_simcse --supervised_simcse", "full-model"),
        ("--fine-tune-mode LoRA --LoRA_r 4 --gradient_surgery mean", "LoRA"),
        ("--pair_encoding para=joint --pooling cls --sst_head linear --sts_head linear",
         "full-model"),
        ("--para_head dot --max_length 12 --loss_weights para=0.5 --patience 1", "full-model"),
        ("--accumulate 3 --para_head cosine --clip 0 --warmup 0", "full-model"),
    ],
)  # fmt: skip
def test_a_run_of_three_steps_and_its_evaluation(train, workplace, flags, name):
    """The full run folder, six prediction files, and evaluation.py writes the very same bytes."""
    run = train(f"{flags} --epochs 1 --steps_per_epoch 3", name)
    check_complete(run, workplace)
    lora = "--fine-tune-mode LoRA" in flags
    best = {path.name for path in (run / "best").iterdir()}
    assert ("adapter_model.safetensors" in best) == lora
    assert ("model.safetensors" in best) == (not lora)
    written = prediction_files(workplace / "predictions")
    shutil.rmtree(workplace / "predictions")
    evaluation.main([])  # the newest run, its own encoder, data and precision
    assert prediction_files(workplace / "predictions") == written


def test_what_run_json_says(train, workplace):
    run = train("--fine-tune-mode LoRA --LoRA_r 4 --epochs 1 --steps_per_epoch 2", "LoRA")
    description = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert description["args"]["LoRA_r"] == 4
    assert description["encoder"]["substituted"] is False
    assert description["encoder"]["name"] == str(workplace / "encoder")
    assert description["data"]["sst"]["train"]["examples"] == ROWS["train"]
    assert len(description["data"]["para"]["dev"]["sha256"]) == 64
    assert {"torch", "numpy", "tokenizers", "python"} <= set(description["versions"])
    count = description["parameters"]
    assert 0 < count["trained"] < count["all"]


def test_what_a_logged_step_says(train):
    run = train("--unsupervised_simcse --epochs 1 --steps_per_epoch 3 --warmup 0.34", "full-model")
    lines = metrics(run, "train")
    names = {*THREE, *(f"simcse_{name}" for name in THREE)}
    assert all(set(line["losses"]) == names for line in lines)
    assert all(line["sentences_per_s"] > 0 and line["tokens_per_s"] > 0 for line in lines)
    rates = [line["lr"] for line in lines]
    assert rates == pytest.approx([5e-4, 5e-4, 2.5e-4])  # a step of warm-up; of the two, the heads'


def test_gradient_surgery_logs_the_conflicts(train):
    run = train("--gradient_surgery --epochs 1 --steps_per_epoch 2", "full-model")
    for line in metrics(run, "train"):
        assert 0 <= line["conflicts"] <= 1
        assert -1.001 <= line["cosine sst para"] <= 1.001


@pytest.mark.parametrize(
    ("flags", "name", "changes"),
    [
        ("--fine-tune-mode last-linear-layer", "last-linear-layer", False),
        ("--fine-tune-mode full-model", "full-model", True),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_frozen_is_saved_as_it_was_read(train, tiny_encoder, flags, name, changes,
                                                 precision):  # fmt: skip
    """bf16 copies of frozen weights are for computing; rounded ones are another encoder."""
    run = train(f"{flags} --epochs 1 --steps_per_epoch 2 --precision {precision}", name)
    before = load_file(tiny_encoder / "model.safetensors")
    after = load_file(run / "best" / "model.safetensors")
    assert before.keys() == after.keys()
    frozen = [n for n in before if not changes or n.startswith("pooler.")]
    for tensor in frozen:
        assert torch.equal(before[tensor], after[tensor]), tensor
    if changes:
        assert any(not torch.equal(before[n], after[n]) for n in before)


def test_lora_saves_adapters_of_the_named_layers_alone(train):
    run = train(
        "--fine-tune-mode LoRA --LoRA_r 3 --LoRA_targets query output --epochs 1 "
        "--steps_per_epoch 2", "LoRA",
    )  # fmt: skip
    names = load_file(run / "best" / "adapter_model.safetensors")
    expected = [LORA_TARGETS["query"], LORA_TARGETS["output"]]
    assert len(names) == 2 * 2 * 2  # layers, kinds, matrices
    assert all(any(f".{layer}." in name for layer in expected) for name in names)
    assert all(".attention.output." not in name for name in names)


# ------------------------------------------------------------------------- corners of the command


def test_no_epochs_only_evaluate(train, workplace, tiny_encoder):
    run = train("--epochs 0 --precision fp32", "full-model")
    check_complete(run, workplace, steps=0)
    saved = load_file(run / "best" / "model.safetensors")
    before = load_file(tiny_encoder / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_the_fourth_task_with_a_review_beyond_every_limit(train, workplace):
    path = workplace / "data" / TASKS["cfimdb"].file_name("train")
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"99\tlong1\t{'a truly awful film . ' * 400}\t0\n")
    run = train("--tasks sst para sts cfimdb --epochs 1 --steps_per_epoch 7 --batch_size 4",
                "full-model")  # fmt: skip
    check_complete(run, workplace, tasks=TASKS, steps=7)  # 25 reviews by 4: it was in one
    assert all("cfimdb" in line["losses"] for line in metrics(run, "train"))


def test_a_single_task(train, workplace):
    run = train("--tasks cfimdb --epochs 1 --steps_per_epoch 2", "full-model")
    check_complete(run, workplace, tasks=("cfimdb",), steps=2)
    accuracy = metrics(run, "eval")[-1]["dev"]["cfimdb"]["accuracy"]
    assert metrics(run, "eval")[-1]["overall"] == accuracy


def test_named_prediction_files_and_a_folder_of_ones_own(train, workplace):
    train("--epochs 0 --predictions_dir mine --sst_dev_out mine/leaderboard.csv", "full-model")
    names = {path.name for path in (workplace / "mine").iterdir()}
    assert "leaderboard.csv" in names
    assert "sst-dev-output.csv" not in names
    assert "sst-test-output.csv" in names
    assert not (workplace / "predictions").exists()


def test_predictions_need_a_place_for_files(train, workplace):
    """Found before training: a folder of that name, or a file where the folder should be."""
    (workplace / "folder").mkdir()
    with pytest.raises(UserError, match="folder: for predictions; expected a file"):
        train("--epochs 0 --para_dev_out folder", "")
    (workplace / "predictions").write_text("mine")
    with pytest.raises(UserError, match=r"sst-dev-output.csv: for predictions"):
        train("--epochs 0", "")
    with pytest.raises(UserError, match="/dev/null: for predictions"):
        train("--epochs 0 --predictions_dir other --sst_test_out /dev/null", "")


def test_predictions_do_not_replace_the_data(train, workplace):
    """`--sst_dev_out` where `--sst_dev` was meant would leave the labels nowhere."""
    files = {path: path.read_bytes() for path in (workplace / "data").iterdir()}
    with pytest.raises(UserError, match=r"sst-dev.csv: for predictions \(sst dev\), which would"):
        train("--epochs 0 --sst_dev_out data/../data/ids-sst-dev.csv", "")
    assert {path: path.read_bytes() for path in files} == files
    assert not (workplace / "runs").exists()


def test_targets_named_twice_and_in_another_order_are_the_same(train):
    """`peft`'s file lists them once, in order: the run could not be read again."""
    flags = "--fine-tune-mode LoRA --LoRA_r 2 --epochs 1 --steps_per_epoch 2 --LoRA_targets"
    run = train(f"{flags} output query output", "LoRA")
    assert RunFolder(run).description()["args"]["LoRA_targets"] == ["query", "output"]
    train(f"{flags} query output --resume", "LoRA")
    evaluation.main([])


def test_a_run_goes_on_in_its_own_precision(train, monkeypatch):
    """Begun where `auto` is fp32, moved to a machine where it is bf16."""
    flags = "--epochs 1 --steps_per_epoch 2"
    with monkeypatch.context() as older:
        older.setattr(device, "_has_bf16", lambda _: False)
        run = RunFolder(train(flags, "full-model"))
    assert (run.description()["precision"], run.description()["args"]["precision"]) == (
        "fp32", "auto",
    )  # fmt: skip
    monkeypatch.setattr(device, "_has_bf16", lambda _: True)
    train(f"{flags} --resume", "full-model")
    train(f"{flags} --resume --precision fp32", "full-model")
    with pytest.raises(UserError, match="--precision is bf16, was auto or fp32"):
        train(f"{flags} --resume --precision bf16", "full-model")


def test_a_finished_run_of_a_frozen_encoder_is_not_encoded_again(train, capsys):
    flags = "--fine-tune-mode last-linear-layer --epochs 1 --steps_per_epoch 2"
    train(flags, "last-linear-layer")
    assert "encoding" in capsys.readouterr().out
    train(f"{flags} --resume", "last-linear-layer")
    assert "encoding" not in capsys.readouterr().out


def test_an_encoder_of_one_segment_takes_no_joint_pairs(train, workplace):
    config = workplace / "encoder/config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"type_vocab_size": 1}
    config.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match="knows one segment"):
        train("--pair_encoding para=both", "")


def test_a_run_of_the_sample_says_so_when_it_is_continued_too(train, workplace, capsys):
    """After the course's files were fetched the old run still goes on with the sample."""
    shutil.copytree(workplace / "data", workplace / "data/sample")
    train("--epochs 0 --data_dir data/sample", "full-model")
    capsys.readouterr()
    multitask_classifier.main(["--resume"])
    assert "continuing on the small generated sample" in capsys.readouterr().out


def test_the_recorded_command_can_be_continued(train, monkeypatch):
    """A broken-off run is told to go on with it and --resume, which --overwrite excludes."""
    monkeypatch.setattr(sys, "argv", ["x", "--as", "a notebook's"])
    run = RunFolder(train("--epochs 0 --overwrite", "full-model"))
    assert run.description()["command"] == f"python multitask_classifier.py {SMALL} --epochs 0"


def test_two_passes_without_dropout_are_warned_of(train, capsys):
    flags = "--epochs 0 --unsupervised_simcse --overwrite"
    train(f"{flags} --hidden_dropout_prob 0", "full-model")
    assert "warning: without dropout the two passes of SimCSE" in capsys.readouterr().out
    both = "--epochs 0 --overwrite --hidden_dropout_prob 0 --r_drop sst para --swap_pairs"
    train(both, "full-model")
    assert "warning: without dropout" in capsys.readouterr().out  # sst has no pairs to swap
    train("--epochs 0 --overwrite --hidden_dropout_prob 0 --r_drop para --swap_pairs", "full-model")
    train(f"{flags} --hidden_dropout_prob 0 --fine-tune-mode LoRA --LoRA_dropout 0.1", "LoRA")
    train(flags, "full-model")
    assert "without dropout" not in capsys.readouterr().out


def test_a_folder_that_may_not_be_written_is_told_before_training(train, workplace, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="not writable"):
        train("--epochs 0", "full-model")
    assert not (workplace / "runs").exists()


def test_predictions_may_go_to_the_runs_own_folder_by_another_spelling(train, workplace):
    own = workplace / "runs/full-model/predictions"
    train(f"--epochs 0 --predictions_dir {own}", "full-model")
    assert len(prediction_files(own)) == 6


@pytest.mark.parametrize("size", [(0, 0), (40, 120)])
def test_a_terminal_of_any_size_shows_a_progress_bar(train, workplace, size):
    """One that does not know its size says 0, where there would be neither a bar nor lines."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    command = [sys.executable, str(REPOSITORY / "multitask_classifier.py"), *SMALL.split(),
               "--epochs", "1", "--steps_per_epoch", "2"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    assert "2/2 [" in shown.decode() and "sst" in shown.decode()


def test_an_epoch_is_one_pass_with_accumulated_batches_too(train):
    """Small batches in place of large ones, where memory is short, are the same training."""
    run = train("--epochs 1 --accumulate 4", "full-model")
    assert [line["step"] for line in metrics(run, "train")] == [1, 2]  # 24 rows, 16 a step


def test_a_frozen_encoders_vectors_that_do_not_fit_are_encoded_again(train, monkeypatch, capsys):
    """It says so and trains the same."""
    flags = "--fine-tune-mode last-linear-layer --epochs 1 --precision fp32 --model_file_suffix"
    kept = train(f"{flags} kept", "last-linear-layer-kept")
    assert "sentence vectors are kept" not in capsys.readouterr().out
    monkeypatch.setattr(multitask_bert, "VECTOR_CACHE_MIB", 0)
    again = train(f"{flags} again", "last-linear-layer-again")
    assert "sentence vectors are kept" in capsys.readouterr().out
    losses = [[line["losses"] for line in metrics(run, "train")] for run in (kept, again)]
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_without_a_test_file_dev_is_written_and_no_partial_test_file(train, workplace, capsys):
    (workplace / "data" / TASKS["sts"].file_name("test")).unlink()
    train("--epochs 0", "full-model")
    assert "no test predictions for sts" in capsys.readouterr().out
    names = set(prediction_files(workplace / "predictions"))
    assert "sts-dev-output.csv" in names
    assert "sts-test-output.csv" not in names
    assert "sst-test-output.csv" in names


def test_epochs_evaluations_and_patience(train):
    """Three epochs are three evaluations; a rate that moves nothing stops the run early."""
    run = train("--epochs 3 --steps_per_epoch 2", "full-model")
    assert [line["epoch"] for line in metrics(run, "eval")] == [1, 2, 3]
    still = "--lr 1e-30 --head_lr 1e-30 --patience 2 --overwrite"
    run = train(f"--epochs 9 --steps_per_epoch 1 {still}", "full-model")
    assert [line["epoch"] for line in metrics(run, "eval")] == [1, 2, 3]


@pytest.mark.parametrize("mode", ["full-model", "LoRA", "last-linear-layer"])
def test_calibrating_moves_the_predictions_and_nothing_in_training(train, mode):
    """With dropout on: an evaluation that drew from its generators would show in the losses."""
    flags = f"--epochs 2 --steps_per_epoch 2 --fine-tune-mode {mode} --model_file_suffix"
    plain = train(f"{flags} plain --calibration_examples 0", f"{mode}-plain")
    calibrated = train(f"{flags} calibrated --calibration_examples 10", f"{mode}-calibrated")
    losses = [[s["losses"] for s in metrics(run, "train")] for run in (plain, calibrated)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    for name in THREE:
        offsets = [load_file(run / "best/heads.safetensors")[f"offset_{name}"]
                   for run in (plain, calibrated)]  # fmt: skip
        assert not offsets[0].any()
        assert offsets[1].all()


def test_layers_learn_at_rates_that_fall_from_the_top(train):
    """The first step of AdamW moves each weight that has a gradient by its learning rate."""
    flags = "--warmup 0 --weight_decay 0 --clip 0 --lr 1e-3 --head_lr 1e-2 --epochs 1"
    run = train(f"{flags} --steps_per_epoch 1 --layer_decay 0.5 --precision fp32", "full-model")
    before = load_file("encoder/model.safetensors")
    after = load_file(run / "best" / "model.safetensors")
    largest = {
        name: float((after[name] - before[name]).abs().max())
        for name in ("encoder.layer.1.output.dense.weight", "encoder.layer.0.output.dense.weight",
                     "embeddings.word_embeddings.weight")
    }  # fmt: skip
    assert list(largest.values()) == pytest.approx([1e-3, 5e-4, 2.5e-4], rel=1e-2)


def test_word_embeddings_may_be_left_as_they_are(train):
    run = train("--epochs 1 --steps_per_epoch 2 --freeze_word_embeddings", "full-model")
    before = load_file("encoder/model.safetensors")
    after = load_file(run / "best" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        n for n in before if not n.startswith(("embeddings.word_embeddings", "pooler"))
    }


def test_the_best_model_is_the_one_with_the_best_score(train):
    run = train("--epochs 4 --steps_per_epoch 3 --lr 0.01", "full-model")
    evaluations = metrics(run, "eval")
    best = max(evaluations, key=lambda line: line["overall"])
    first = next(line for line in evaluations if line["overall"] == best["overall"])
    assert int((run / "best").readlink().name.split("-")[1].split(".")[0]) == first["step"]


def test_the_default_number_of_steps_is_a_pass_of_the_largest_task(train, workplace):
    sst = workplace / "data" / TASKS["sst"].file_name("train")
    lines = sst.read_text(encoding="utf-8").splitlines(keepends=True)
    sst.write_text("".join(lines[:10]), encoding="utf-8")
    run = train("--epochs 1 --batch_size 8", "full-model")
    assert metrics(run, "eval")[-1]["step"] == 3  # 24 pairs in batches of 8


def test_two_runs_of_one_seed_are_the_same_and_of_another_are_not(train, workplace):
    """Weights to the last bit, so that a result can be had again."""
    flags = "--unsupervised_simcse --epochs 1 --steps_per_epoch 3 --model_file_suffix"
    runs = [
        train(f"{flags} {name} --seed {seed}", f"full-model-{name}")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    weights = [load_file(run / "best" / "model.safetensors") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_accumulated_batches_equal_one_large_one(train):
    """Without contrastive losses, whose negatives stay those of one batch. Dropout off, fp32."""
    flags = "--precision fp32 --hidden_dropout_prob 0 --epochs 1 --steps_per_epoch 3"
    one = train(f"{flags} --batch_size 8 --model_file_suffix one", "full-model-one")
    two = train(f"{flags} --batch_size 4 --accumulate 2 --model_file_suffix two", "full-model-two")
    a, b = (load_file(run / "best" / "model.safetensors") for run in (one, two))
    for name in a:
        # AdamW's first steps have the size of the rate whatever the gradient: where that is zero
        # in exact arithmetic, as for key.bias, its sign is rounding's
        if not name.endswith("key.bias"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=3e-5, msg=name)


class Broken(Exception):
    """Stands for a kill right after a state was saved."""


@pytest.mark.parametrize(
    "mode", ["last-linear-layer", "full-model", "LoRA", "full-model --freeze_word_embeddings"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_broken_and_continued_run_is_the_unbroken_one(train, monkeypatch, mode, precision):
    """To the last bit, in every mode: a frozen encoder's kept vectors are gone with the process,
    and may not come back with other bits for having been encoded in another batch."""
    check_broken_and_continued(train, monkeypatch, mode, f"--precision {precision}")


def check_broken_and_continued(train, monkeypatch, mode, flags):
    """A run that is broken off after a third, and continued, ends as the unbroken one, bitwise."""
    flags = f"--fine-tune-mode {mode} {flags} --epochs 3 --steps_per_epoch 5 --batch_size 3"
    flags += " --model_file_suffix"
    mode = mode.split()[0]
    whole = train(f"{flags} whole", f"{mode}-whole")
    save_state = RunFolder.save_state

    def save_and_break(run, values, tensors):
        save_state(run, values, tensors)
        if values["step"] == 5:
            raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", save_and_break)
        with pytest.raises(Broken):
            train(f"{flags} broken", "")
    broken = train(f"{flags} broken --resume", f"{mode}-broken")
    states = []
    for run in (whole, broken):
        newest = max((run / "state").iterdir())
        states.append({p.name: load_file(p) for p in newest.glob("*.safetensors")})
    assert states[0].keys() == states[1].keys()
    for file, tensors in states[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(states[1][file][name], tensor), (file, name)
    assert prediction_files(broken / "predictions") == prediction_files(whole / "predictions")


def test_a_continued_run_keeps_the_encoder_that_stood_in(workplace, cut_sample, bundled_folder,
                                                          monkeypatch, capsys):  # fmt: skip
    """Begun without the hub and continued with it: the hub's encoder would be another one."""
    flags = f"--data_dir {cut_sample} --tasks sst --fine-tune-mode LoRA --LoRA_r 1 --epochs 0"
    monkeypatch.setattr(base_bert, "_cached_folder", lambda repo: None)
    monkeypatch.setattr(base_bert, "_hub_reachable", lambda: False)
    multitask_classifier.main(flags.split())
    assert "warning: bert-base-uncased is not in the cache and the hub" in capsys.readouterr().out
    description = json.loads((workplace / "runs/LoRA/run.json").read_text(encoding="utf-8"))
    assert description["encoder"]["substituted"] is True
    asked = []
    monkeypatch.setattr(base_bert, "_hub_reachable", lambda: asked.append("hub") or True)
    monkeypatch.setattr(base_bert, "_download", lambda repo: pytest.fail(f"downloads {repo}"))
    for repeat in (partial(multitask_classifier.main, [*flags.split(), "--resume"]),
                   partial(evaluation.main, [])):  # fmt: skip
        capsys.readouterr()
        repeat()
        said = capsys.readouterr().out
        assert "which stood in for bert-base-uncased" in said
        assert "cannot be reached" not in said
    assert not asked


# ----------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--fine-tune-mode full-model --lr 3e-3 --head_lr 1e-2", "full-model"),
        ("--fine-tune-mode LoRA --LoRA_r 8 --lr 2e-2 --head_lr 1e-2", "LoRA"),
        ("--fine-tune-mode last-linear-layer --lr 1e-2 --sts_head linear", "last-linear-layer"),
    ],
)
def test_losses_fall_on_a_small_sample(train, workplace, flags, name):
    """Eight examples of each task, sixty times over: every mode has to learn them."""
    for task in (TASKS[n] for n in THREE):
        path = workplace / "data" / task.file_name("train")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:9]), encoding="utf-8")
    run = train(f"{flags} --hidden_dropout_prob 0 --batch_size 8 --epochs 1 --steps_per_epoch 60 "
                "--precision fp32", name)  # fmt: skip
    lines = metrics(run, "train")
    for task in THREE:
        first, last = lines[0]["losses"][task], lines[-1]["losses"][task]
        assert last < 0.7 * first, (task, first, last)


# ---------------------------------------------------------------------- the scripts as processes


def run_script(script, *flags):
    """A script in a process of its own."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / script), *flags], capture_output=True, text=True,
        timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


PAPER = {
    "full-model-both_simcse_batch_16": (
        "--fine-tune-mode=full-model --lr=1e-5 --weight_decay=1e-3 --epoch=1 --batch_size=16 "
        "--supervised_simcse --unsupervised_simcse --model_file_suffix=both_simcse_batch_16"
    ),
    "LoRA": "--fine-tune-mode=LoRA --LoRA_r=4 --lr=1e-4 --weight_decay=1e-2 --epoch=1",
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_command_lines_run_as_printed(train, workplace, name):
    """With the data and an encoder added, and fewer epochs."""
    done = run_script("multitask_classifier.py", *PAPER[name].split(), "--data_dir", "data",
                      "--pretrained", "encoder", "--log_every", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = workplace / "runs" / name
    steps = metrics(run, "eval")[-1]["step"]
    check_complete(run, workplace, steps=steps)
    assert "overall" in done.stdout
    assert f"step {steps}/{steps}" in done.stdout  # plain lines where there is no terminal
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(),
                    reason="there is a GPU")  # fmt: skip
def test_use_gpu_without_a_gpu_is_one_clear_line(train, workplace):
    done = run_script("multitask_classifier.py", "--use_gpu", *PAPER["LoRA"].split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: --use_gpu")
    assert "cpu" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (workplace / "runs").exists()


def test_commands_to_paste_name_the_script_where_it_lies(train, workplace):
    """The script was started from another folder, in which there is none of that name."""
    flags = [*SMALL.split(), "--epochs", "0"]
    assert run_script("multitask_classifier.py", *flags).returncode == 0
    done = run_script("multitask_classifier.py", *flags)
    assert done.returncode == 2
    command = re.search("`(python .* --resume)`", done.stderr)[1]
    done = run_script("multitask_classifier.py", *flags, "--recipe", "cosine")
    expanded = re.search("--recipe cosine is: (.*)", done.stdout)[1]
    for pasted in (command, f"{expanded} --resume"):
        words = [sys.executable, *shlex.split(pasted)[1:]]
        done = subprocess.run(words, capture_output=True, timeout=300)
        assert done.returncode == 0, done


def test_names_that_the_terminal_cannot_show_do_not_end_a_run(train, workplace):
    script = REPOSITORY / "multitask_classifier.py"
    flags = [*SMALL.split(), "--epochs", "0", "--runs_dir", "läufe"]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, timeout=300,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"run l\xe4ufe/full-model" in done.stdout


def test_evaluation_as_a_process_prints_the_table(train, workplace):
    run = train("--epochs 0", "full-model")
    written = prediction_files(workplace / "predictions")
    done = run_script("evaluation.py", "--checkpoint", str(run), "--predictions_dir", "again")
    assert done.returncode == 0, done.stderr
    for word in ("accuracy", "macro_f1", "pearson", "spearman", "overall"):
        assert word in done.stdout
    assert prediction_files(workplace / "again") == written


# ------------------------------------------------------------------------------------ evaluation


def test_predictions_on_text(train, capsys):
    train("--epochs 0", "full-model")
    capsys.readouterr()
    evaluation.main(["--sentence", "A film to fall in love with."])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "sst"]
    evaluation.main(["--sentence", "A man sleeps.", "--sentence2", "A man is asleep."])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "run", "para", "sts",
    ]  # fmt: skip


def test_the_newest_run_is_the_one_evaluated(train, capsys):
    for name in ("b", "a", "c"):  # neither the first nor the last by name
        train(f"--epochs 0 --model_file_suffix {name}", f"full-model-{name}")
        capsys.readouterr()
        evaluation.main(["--sentence", "x"])
        assert f"full-model-{name}" in capsys.readouterr().out


def test_changed_data_or_encoder_is_not_evaluated_in_silence(train, workplace):
    run = train("--epochs 0 --fine-tune-mode LoRA --LoRA_r 2", "LoRA")
    dev = workplace / "data" / TASKS["sst"].file_name("dev")
    content = dev.read_bytes()
    dev.write_bytes(content.replace(b"\t2\n", b"\t3\n"))
    assert dev.read_bytes() != content
    with pytest.raises(UserError, match="changed since"):
        evaluation.main(["--checkpoint", str(run)])
    dev.write_bytes(content)
    evaluation.main(["--checkpoint", str(run)])
    torch.manual_seed(77)
    encoder = workplace / "encoder"
    BertModel(BertConfig.from_file(encoder / "config.json")).save_pretrained(encoder)
    with pytest.raises(UserError, match="not the encoder"):
        evaluation.main(["--checkpoint", str(run)])


def test_a_run_is_evaluated_on_its_files_where_they_lie_now(train, workplace, capsys):
    """Moved ones are named by their folder; a test file that is gone is spoken of."""
    run = train("--epochs 0", "full-model")
    before = prediction_files(run / "predictions")
    (workplace / "data").rename(workplace / "moved")
    with pytest.raises(UserError, match=r"ids-sst-dev.csv: no such file.*--data_dir"):
        evaluation.main([])
    evaluation.main(["--data_dir", "moved", "--predictions_dir", "again"])
    assert prediction_files(workplace / "again") == before
    with pytest.raises(UserError, match="--data_dir goes with"):
        evaluation.main(["--data_dir", "moved", "--report", str(run)])
    (workplace / "moved" / TASKS["sst"].file_name("test")).unlink()
    capsys.readouterr()
    evaluation.main(["--data_dir", "moved", "--predictions_dir", "fewer"])
    assert "no test predictions for sst" in capsys.readouterr().out
    assert len(prediction_files(workplace / "fewer")) == 5


def test_a_text_that_no_task_takes_is_an_error(train):
    train("--epochs 0 --tasks para sts", "full-model")
    with pytest.raises(UserError, match="on para, sts, of two sentences: add --sentence2"):
        evaluation.main(["--sentence", "x"])
    train("--epochs 0 --tasks sst --overwrite", "full-model")
    with pytest.raises(UserError, match="on sst, of one sentence: omit --sentence2"):
        evaluation.main(["--sentence", "x", "--sentence2", "y"])


def test_a_run_that_still_trains_is_evaluated_as_one_model(train, monkeypatch):
    """Between two files that are read the link to the best model may be exchanged."""
    run = RunFolder(train("--epochs 1 --steps_per_epoch 1", "full-model"))
    wanted = load_file(run.best / "heads.safetensors")
    read = saved_models.load_encoder

    def read_and_exchange(name):
        found = read(name)
        other = run.path / "best-00000099.0"
        shutil.copytree(run.best.resolve(), other)
        save_file({n: t + 1 for n, t in wanted.items()}, other / "heads.safetensors")
        run._link_best(other)
        return found

    monkeypatch.setattr(saved_models, "load_encoder", read_and_exchange)
    model, _, _ = saved_models.load_run(run, torch.device("cpu"))
    assert run.best_step() == 99
    for name, tensor in model.state_dict().items():
        if not name.startswith("bert."):
            assert torch.equal(tensor, wanted[name]), name


def test_a_copy_whose_best_is_a_folder_is_evaluated(train, workplace, capsys):
    """`cp -rL` and some archives follow the link."""
    run = train("--epochs 0", "full-model")
    shutil.copytree(run, workplace / "runs/copy")
    assert not (workplace / "runs/copy/best").is_symlink()
    capsys.readouterr()
    evaluation.main(["--checkpoint", "runs/copy", "--sentence", "x"])
    assert "best model, cpu" in capsys.readouterr().out


def test_without_a_run_there_is_nothing_to_evaluate():
    with pytest.raises(UserError, match="no finished run"):
        evaluation.main([])


# ---------------------------------------------------------------------------------- the default


@pytest.mark.slow
def test_the_bundled_encoder_learns_the_sample(workplace, bundled_folder):
    """Well above chance (0.2) within a few CPU minutes."""
    flags = "--pretrained bundled --fine-tune-mode LoRA --LoRA_r 32 --epochs 4"
    multitask_classifier.main(flags.split())
    best = max(metrics(workplace / "runs" / "LoRA", "eval"), key=lambda line: line["overall"])
    assert best["dev"]["sst"]["accuracy"] > 0.4
    assert best["dev"]["para"]["accuracy"] > 0.65
    assert best["dev"]["sts"]["pearson"] > 0.5


def test_seeds_of_steps_and_passes_do_not_coincide():
    """Steps that share dropout masks would train less than they seem to."""
    numbers = [(11711, step, micro, rank) for step in range(50) for micro in (0, 1)
               for rank in (0, 1)]  # fmt: skip
    seen = set()
    for seeds in numbers:
        multitask_classifier.seed_everything(*seeds)
        seen.add(tuple(torch.randint(2**62, (2,)).tolist()))
    assert len(seen) == len(numbers)
    random.seed(0)  # and Python's own generator takes no part
    multitask_classifier.seed_everything(11711, 0, 0, 0)
    assert tuple(torch.randint(2**62, (2,)).tolist()) in seen


# ---------------------------------------------------------------------------------- precisions


@pytest.mark.slow
def test_bf16_reaches_the_dev_scores_of_fp32(workplace):
    """Over three seeds, the bundled encoder on the sample: apart by no more than seeds are."""
    scores = {"fp32": [], "bf16": []}
    for precision, of_precision in scores.items():
        for seed in (1, 2, 3):
            name = f"{precision}-{seed}"
            multitask_classifier.main([
                "--pretrained", "bundled", "--data_dir", str(SAMPLE), "--epochs", "1",
                "--steps_per_epoch", "80", "--batch_size", "16", "--precision", precision,
                "--seed", str(seed), "--model_file_suffix", name,
            ])  # fmt: skip
            run = RunFolder(workplace / "runs" / f"full-model-{name}")
            assert run.description()["precision"] == precision
            of_precision.append(evaluation.finished_run(run).overall)
    apart = abs(np.mean(scores["fp32"]) - np.mean(scores["bf16"]))
    spread = np.sqrt(sum(np.var(values, ddof=1) for values in scores.values()) / 3)
    print(scores)
    assert min(scores["fp32"]) > 0.65, "so little was learned that nothing could differ"
    assert apart <= max(3 * spread, 0.01), scores


def test_in_fp16_a_gradient_that_is_never_finite_ends_the_run(train, monkeypatch):
    """The scaler would skip every step to the end and leave an untrained model as the result."""
    monkeypatch.setattr(multitask_classifier, "select_precision", lambda *_: ("fp16", None))
    backward = multitask_classifier.backward

    def overflowing(model, *rest):
        losses, extra = backward(model, *rest)
        if broken:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return losses, extra

    monkeypatch.setattr(multitask_classifier, "backward", overflowing)
    flags = "--tasks sst --epochs 1 --steps_per_epoch 40 --model_file_suffix"
    broken = False
    run = train(f"{flags} sound", "full-model-sound")
    assert metrics(run, "train")[-1]["step"] == 40
    broken = True
    with pytest.raises(NotFinite, match="step 18: gradient of the loss sst"):  # 65,536 is 2^16
        train(f"{flags} broken", "")


def test_a_step_that_fp16_skips_is_left_out_of_the_mean_cosines():
    meter = multitask_classifier.Meter()
    meter.add({"sst": 1.0}, 4, 40)
    meter.add({"sst": 2.0, "conflicts": 0.5}, 4, 40)
    assert meter.means() == {"sst": 1.5, "conflicts": 0.5}


# ------------------------------------------------------------- on a GPU: python -m pytest -m cuda

MODES = ["last-linear-layer", "full-model", "LoRA"]


@pytest.fixture
def gpu(monkeypatch):
    """Skips where there is none; `--deterministic` ends with the test."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_a_gpus_losses_and_scores_are_the_cpus(gpu, train, monkeypatch, mode):
    """fp32, no dropout, whose random numbers differ: the same batches, the same updates."""
    flags = f"--fine-tune-mode {mode} --epochs 2 --steps_per_epoch 4 --precision fp32 --clip 0.5"
    flags += " --hidden_dropout_prob 0 --model_file_suffix"
    on_gpu = train(f"{flags} gpu", f"{mode}-gpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        on_cpu = train(f"{flags} cpu", f"{mode}-cpu")
    assert "cpu" not in RunFolder(on_gpu).description()["device"]
    for kind in ("train", "eval"):
        for one, other in zip(metrics(on_gpu, kind), metrics(on_cpu, kind), strict=True):
            if kind == "train":
                assert one["losses"] == pytest.approx(other["losses"], rel=1e-3)
                assert one["peak_memory_mib"] < other["peak_memory_mib"]  # of tensors alone
            else:
                assert one["overall"] == pytest.approx(other["overall"], abs=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_broken_and_continued_run_on_a_gpu_is_the_unbroken_one(gpu, train, monkeypatch, mode,
                                                                  precision):  # fmt: skip
    """Weights, AdamW's state and fp16's scaler come back to where they were computed on."""
    flags = f"--precision {precision} --deterministic"
    check_broken_and_continued(train, monkeypatch, mode, flags)
