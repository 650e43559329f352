"""The training and evaluation scripts end to end, on a tiny encoder and a part of the sample."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import termios
from functools import partial
from itertools import cycle, product
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, ROWS, SAMPLE, keep_rows
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bert
import evaluation
import multitask_bert
import multitask_classifier
from config import MODES, TASKS, UserError
from lora import LORA_TARGETS
from reporting.ensemble import finished_run
from runtime.device import Compute, seed_everything
from runtime.files import OutputError
from runtime.script import NotFinite, run_script
from training import saved_models, setup
from training.flags import default_flags, make_parser, parse_command
from training.log import Meter, Step, numbers_of_step
from training.run_folder import RunFolder, run_path

BOTH_SIMCSE = "--unsupervised_simcse --supervised_simcse"
THREE = ("sst", "para", "sts")
SMALL = "--pretrained encoder --data_dir data --batch_size 4 --log_every 1"
LORA = "--fine-tune-mode LoRA --LoRA_r"
DORA = f"{LORA} 4 --LoRA_variant dora --LoRA_lr_ratio 4 --LoRA_layers 1 --LoRA_dropout 0.1"
FROZEN = "--fine-tune-mode last-linear-layer"
ALONE = "--tasks sst sts --mlm sst sts --loss_weights sst=0 sts=0"  # no task is trained
PAL = "--fine-tune-mode PAL"
STILL = "--lr 1e-30 --head_lr 1e-30"  # rates that move nothing
IN_BEST = "README.md heads.json heads.safetensors manifest.json special_tokens_map.json "
IN_BEST += "tokenizer.json tokenizer_config.json vocab.txt "
ADAPTER, ENCODER = "adapter_config.json adapter_model.safetensors", "config.json model.safetensors"
POOLING = " modules.json 1_Pooling sentence_bert_config.json"


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def train(tiny_folder, cut_sample):
    """Runs the training script in this process and returns the `RunFolder`.

    On the tiny encoder, or with `--start_from` on that run's.
    """
    shutil.copytree(cut_sample, "data")

    def run(flags):
        small = SMALL.removeprefix("--pretrained encoder") if "--start_from" in flags else SMALL
        words = f"{small} {flags}".split()
        multitask_classifier.main(words)
        return RunFolder(run_path(make_parser().parse_args(words)))

    return run


def lines_of(run, kind):
    """The lines of a run's log that are of a kind, "train" or "eval"."""
    return [line for line in run.metrics() if line["kind"] == kind]


def losses_of(run):
    """The losses of each step."""
    return [line["losses"] for line in lines_of(run, "train")]


def prediction_files(folder):
    """Contents of the prediction files by name."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("*-output.csv")}


def weights_of(run):
    """Tensors of the best model's encoder by name."""
    return load_file(run.best / "model.safetensors")


def assert_complete(run, tasks=THREE, steps=3):
    """A finished run left everything that it should, its predictions in the files' order."""
    written = prediction_files("predictions")
    assert set(written) == {f"{n}-{split}-output.csv" for n in tasks for split in ("dev", "test")}
    assert prediction_files(run.path / "predictions") == written
    for name in tasks:
        assert (run.path / "predictions" / f"{name}-dev-scores.tsv").is_file()
        for split in ("dev", "test"):
            _, *lines = written[f"{name}-{split}-output.csv"].decode().splitlines()
            with open(Path("data") / TASKS[name].file_name(split), newline="") as file:
                ids = [row["id"] for row in csv.DictReader(file, delimiter="\t")]
            assert [line.split(" , ")[0] for line in lines] == ids
    assert [line["step"] for line in lines_of(run, "train")] == list(range(1, steps + 1))
    evaluations = lines_of(run, "eval")
    assert evaluations[-1]["step"] == steps
    assert set(evaluations[-1]["dev"]) == set(tasks)
    for line, name in product(evaluations, tasks):
        assert line["dev"][name]["loss"] > 0 and line["train"][name]["loss"] > 0
    assert run.best.is_symlink()
    assert list((run.path / "state").iterdir())
    assert not list(run.path.rglob(".tmp-*"))


# -------------------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize(
    "flags",
    [
        FROZEN,
        f"{LORA} 2 --pair_encoding joint --unsupervised_simcse",
        f"{DORA} --gradient_surgery mean --unsupervised_simcse --r_drop sst",
        f"{LORA} 4 --gradient_surgery vaccine --sampling proportional --swap_pairs --r_drop para",
        "--gradient_surgery main --main_tasks sst para --unsupervised_simcse --sampling annealed",
        "--pair_encoding para=joint --pooling cls --sst_head linear --sts_head linear",
        "--para_head dot --max_length 12 --loss_weights para=0.5 --patience 1",
        "--accumulate 3 --para_head cosine --clip 0 --warmup 0",
        f"{LORA} 4 --LoRA_dropout 0.1 --mlm sst para --loss_weights mlm_sst=0.1 --accumulate 2",
        "--mlm sst sts --unsupervised_simcse --gradient_surgery --freeze_word_embeddings",
        f"{PAL} --PAL_size 8 --PAL_heads 2 --accumulate 2 --recipe best --batch_size 4",
        f"{PAL} --gradient_surgery {BOTH_SIMCSE}",
        "--pals --PAL_heads 4 --unsupervised_simcse --pair_encoding para=both",
        # the paper's command line, with fewer epochs
        "--fine-tune-mode=full-model --lr=1e-5 --weight_decay=1e-3 --epoch=1 --batch_size=16 "
        "--supervised_simcse --unsupervised_simcse --model_file_suffix=both_simcse_batch_16",
    ],
)
def test_a_run_of_three_steps_and_its_evaluation(train, capsys, flags):
    """A complete folder and six prediction files; evaluation.py writes the same bytes."""
    run = train(f"{flags} --epochs 1 --steps_per_epoch 3")
    assert_complete(run)
    own = ADAPTER if LORA in flags else ENCODER if "pal" in flags.lower() else ENCODER + POOLING
    assert {path.name for path in run.best.iterdir()} == set(f"{IN_BEST} {own}".split())
    written = prediction_files("predictions")
    shutil.rmtree("predictions")
    capsys.readouterr()
    evaluation.main([])  # the newest run, its own encoder, data and precision
    assert prediction_files("predictions") == written
    said = capsys.readouterr().out
    assert all(w in said for w in ("accuracy", "macro_f1", "pearson", "spearman", "overall"))


def test_the_real_command(train):
    """The paper's second command line, where no terminal shows a progress bar."""
    words = "--fine-tune-mode=LoRA --LoRA_r=4 --lr=1e-4 --weight_decay=1e-2 --epoch=1 "
    words += "--data_dir data --pretrained encoder --log_every 1"
    command = [sys.executable, str(REPOSITORY / "multitask_classifier.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "step 3/3" in done.stdout and "overall" in done.stdout
    assert_complete(RunFolder("runs/LoRA"))


def test_run_json_describes_the_run(train, monkeypatch):
    """The command is that of the flags given, fit to be resumed with --resume added."""
    monkeypatch.setattr(sys, "argv", ["x", "--as", "a notebook's"])
    flags = f"{LORA} 4 --epochs 1 --steps_per_epoch 2"
    description = train(f"{flags} --overwrite").description()
    assert description["command"] == f"python multitask_classifier.py {SMALL} {flags}"
    assert description["args"].keys() == default_flags().keys()
    assert description["args"]["LoRA_r"] == 4
    assert description["encoder"]["substituted"] is False
    assert description["encoder"]["name"] == str(Path("encoder").resolve())
    assert description["data"]["sst"]["train"]["examples"] == ROWS["train"]
    assert len(description["data"]["para"]["dev"]["sha256"]) == 64
    assert {"torch", "numpy", "tokenizers", "python"} <= set(description["versions"])
    assert 0 < description["parameters"]["trained"] < description["parameters"]["all"]


def test_a_logged_step_has_losses_speed_rate_and_conflicts(train):
    flags = "--unsupervised_simcse --gradient_surgery --epochs 1 --steps_per_epoch 3 --warmup 0.34"
    lines = lines_of(train(flags), "train")
    for line in lines:
        assert set(line["losses"]) == {*THREE, *(f"simcse_{name}" for name in THREE)}
        assert line["sentences_per_s"] > 0 and line["tokens_per_s"] > 0
        assert 0 <= line["conflicts"] <= 1
        assert -1.001 <= line["cosine sst para"] <= 1.001
    for name, peak in (("lr", 5e-5), ("head_lr", 5e-4)):  # one step of warm-up
        assert [line[name] for line in lines] == pytest.approx([peak, peak, peak / 2])
    flags = f"{FROZEN} --overwrite --epochs 1 --steps_per_epoch 1"
    (line,) = lines_of(train(flags), "train")
    assert (line["lr"], line["head_lr"]) == (0, 1e-3)


def test_use_cpu_leaves_the_gpu_alone(train, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    run = train("--epochs 0 --use_cpu")
    assert run.description()["device"].startswith("cpu")
    evaluation.main(["--use_cpu"])
    with pytest.raises(UserError, match="use_gpu: not allowed with argument --use_cpu"):
        evaluation.main(["--use_cpu", "--use_gpu"])


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [
        (FROZEN, ""),
        ("--fine-tune-mode full-model", "pooler"),
        ("--freeze_word_embeddings", "pooler|embeddings.word_embeddings"),
        (PAL, "(?!.*LayerNorm)"),
    ],
)
def test_what_is_frozen_is_saved_as_it_was_read(train, flags, frozen):
    """Computing with bf16 copies is fine; saving them would make another encoder."""
    run = train(f"--epochs 1 --steps_per_epoch 2 --precision bf16 {flags}")
    before, after = load_file("encoder/model.safetensors"), weights_of(run)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not re.match(frozen, name)}


def test_lora_adapts_the_named_layers_only(train):
    run = train(f"{LORA} 3 --LoRA_targets query output --LoRA_layers 1 --epochs 0")
    layers = [f"layer.1.{LORA_TARGETS[target]}" for target in ("query", "output")]
    names = {f"base_model.model.encoder.{layer}.lora_{m}.weight" for layer in layers for m in "AB"}
    assert load_file(run.best / "adapter_model.safetensors").keys() == names


def test_pals_lie_with_the_heads_and_the_encoder_is_not_passed_off_as_the_model(train):
    run = train("--pals --PAL_size 24 --epochs 0")
    names = load_file(run.best / "heads.safetensors")
    assert names["pals.sst.V_E.weight"].shape == (24, 32)
    assert "pals.para.attention.1.value.bias" in names
    assert not any("pals" in name for name in weights_of(run))
    card = (run.best / "README.md").read_text()
    assert "alone is not the model" in card and "SentenceTransformer" not in card
    assert "library_name" not in card and "pipeline_tag" not in card
    with pytest.raises(UserError, match="has PALs, which no other tool reads"):
        evaluation.main(["--checkpoint", str(run.path), "--export", "new"])
    assert not Path("new").exists()


@pytest.mark.parametrize("tasks", [("sst", "para", "sts", "cfimdb"), ("cfimdb",)])
def test_other_sets_of_tasks_and_a_review_beyond_every_limit(train, tasks):
    path = Path("data") / TASKS["cfimdb"].file_name("train")
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"99\tlong1\t{'a truly awful film . ' * 400}\t0\n")
    run = train(f"--tasks {' '.join(tasks)} --epochs 1 --steps_per_epoch 7")
    assert_complete(run, tasks, steps=7)  # 25 reviews in batches of 4: the long one was in one
    assert all("cfimdb" in losses for losses in losses_of(run))


# ------------------------------------------------------------------------------ where files may lie


def test_prediction_files_may_be_named(train):
    train("--epochs 0 --predictions_dir mine --sst_dev_out mine/leaderboard.csv")
    names = {path.name for path in Path("mine").iterdir()}
    both = {f"{name}-{split}-output.csv" for name in THREE for split in ("dev", "test")}
    assert names == both - {"sst-dev-output.csv"} | {"leaderboard.csv"}
    own = Path("runs/full-model/predictions").resolve()  # which is written to anyway
    train(f"--epochs 0 --overwrite --predictions_dir {own}")
    assert set(prediction_files(own)) == both
    assert not Path("predictions").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--para_dev_out folder", "folder: not a file; predictions need a new file"),
        ("--predictions_dir file", r"sst-dev-output.csv: not a file"),
        ("--sst_test_out /dev/null", "/dev/null: not a file"),
        ("--sst_dev_out data/../data/ids-sst-dev.csv", r"sst-dev.csv: a data file; .* \(sst dev\)"),
    ],
)
def test_wrong_places_for_predictions_are_refused_before_training(train, flags, message):
    """Above all the data: `--sst_dev_out` in place of `--sst_dev` would destroy the labels."""
    Path("folder").mkdir()
    Path("file").write_text("mine")
    files = {path: path.read_bytes() for path in Path("data").iterdir()}
    with pytest.raises(UserError, match=message):
        train(f"--epochs 0 {flags}")
    assert {path: path.read_bytes() for path in files} == files
    assert not Path("runs").exists()


def test_a_folder_without_write_permission_is_found_before_training(train, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="not writable"):
        train("--epochs 0")
    assert not Path("runs").exists()


def test_commands_to_paste_name_the_script_where_it_is(train, monkeypatch, capsys):
    """The script was started from another folder, which has no script of that name."""
    script = str(REPOSITORY / "multitask_classifier.py")
    monkeypatch.setattr(sys, "argv", [script])
    train("--epochs 0 --recipe cosine")
    expanded = re.search("--recipe cosine is: (.*)", capsys.readouterr().out)[1]
    with pytest.raises(UserError) as error:
        train("--epochs 0 --recipe cosine")
    for command in (f"{expanded} --resume", re.search("`(.* --resume)`", str(error.value))[1]):
        assert command.startswith(f"python {script} ")
        assert parse_command(shlex.split(command)[2:]).flags.resume


# -------------------------------------------------------------------------------- messages and bars


@pytest.mark.parametrize(
    ("flags", "is_warned"),
    [
        ("--unsupervised_simcse", False),
        ("--unsupervised_simcse --hidden_dropout_prob 0", True),
        (f"--unsupervised_simcse --hidden_dropout_prob 0 {LORA} 4 --LoRA_dropout 0.1", False),
        ("--hidden_dropout_prob 0 --r_drop sst para --swap_pairs", True),  # sst has no pairs
        ("--hidden_dropout_prob 0 --r_drop para --swap_pairs", False),
    ],
)
def test_equal_passes_are_warned_of(train, capsys, flags, is_warned):
    train(f"--epochs 0 {flags}")
    said = capsys.readouterr().out
    assert ("warning: without dropout the two passes of SimCSE" in said) == is_warned


@pytest.mark.parametrize("size", [(0, 0), (40, 120)])
def test_a_terminal_of_any_size_shows_a_progress_bar(train, monkeypatch, capsys, size):
    """A terminal that does not know its size says 0: tqdm would draw nothing.

    With `| tee log` standard output is none, and gets the lines.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    with open(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        train("--epochs 1 --steps_per_epoch 2")
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert "2/2 [" in shown.decode() and "sst" in shown.decode()
    said = capsys.readouterr().out
    assert "step 2/2  sst" in said and "on training examples  sst" in said


def test_names_that_the_terminal_cannot_show_do_not_end_a_run(train, monkeypatch):
    shown = io.BytesIO()
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(shown, encoding="ascii"))
    assert run_script(lambda _: train("--epochs 0 --runs_dir läufe")) == 0
    assert rb"run l\xe4ufe/full-model" in shown.getvalue()


# ----------------------------------------------------------------------------------------- training


def test_the_best_model_is_the_first_with_the_best_score(train):
    run = train("--epochs 4 --steps_per_epoch 3 --lr 0.01")
    evaluations = lines_of(run, "eval")
    assert [line["epoch"] for line in evaluations] == [1, 2, 3, 4]
    first_best = max(evaluations, key=lambda line: line["overall"])
    assert run.describe_best() == f"best model of step {first_best['step']}"


def test_patience_ends_a_run_whose_score_stays(train):
    run = train(f"--epochs 9 --steps_per_epoch 1 {STILL} --patience 2")
    assert [line["epoch"] for line in lines_of(run, "eval")] == [1, 2, 3]


@pytest.mark.parametrize("flags", ["", FROZEN])
def test_calibration_moves_the_predictions_and_nothing_in_training(train, flags):
    """With dropout on: an evaluation that drew random numbers would change the losses."""
    flags += " --epochs 2 --steps_per_epoch 2 --model_file_suffix"
    plain = train(f"{flags} plain --calibration_examples 0")
    calibrated = train(f"{flags} calibrated --calibration_examples 10")
    assert losses_of(plain) == losses_of(calibrated)
    assert len(losses_of(plain)) == 4
    assert [line["train"] for line in lines_of(plain, "eval")] == [{}, {}]
    heads = [load_file(run.best / "heads.safetensors") for run in (plain, calibrated)]
    for name in THREE:
        assert not heads[0][f"offset_{name}"].any()
        assert heads[1][f"offset_{name}"].all()


def test_layers_learn_at_rates_that_fall_from_the_top(train):
    """The first step of AdamW moves each weight that has a gradient by its learning rate."""
    flags = "--warmup 0 --weight_decay 0 --clip 0 --lr 1e-3 --head_lr 1e-2 --epochs 1"
    run = train(f"{flags} --steps_per_epoch 1 --layer_decay 0.5 --precision fp32")
    before, after = load_file("encoder/model.safetensors"), weights_of(run)
    for name, rate in {
        "encoder.layer.1.output.dense.weight": 1e-3,
        "encoder.layer.0.output.dense.weight": 5e-4,
        "embeddings.word_embeddings.weight": 2.5e-4,
    }.items():
        largest = float((after[name] - before[name]).abs().max())
        assert largest == pytest.approx(rate, rel=1e-2), name


@pytest.mark.parametrize(
    "flags",
    [
        "--lr 3e-3 --head_lr 1e-2",
        f"{LORA} 8 --lr 2e-2 --head_lr 1e-2",
        f"{FROZEN} --lr 1e-2 --sts_head linear",
        f"{PAL} --lr 1e-2 --head_lr 1e-2",
    ],
)
def test_losses_fall_on_a_small_sample(train, flags):
    """Eight examples of each task, sixty times over: every mode must learn them."""
    for name in THREE:
        keep_rows(Path("data") / TASKS[name].file_name("train"), 8)
    flags += " --hidden_dropout_prob 0 --batch_size 8 --epochs 1 --steps_per_epoch 60"
    losses = losses_of(train(f"{flags} --precision fp32"))
    assert all(losses[-1][name] < 0.7 * losses[0][name] for name in THREE), losses[-1]


def test_seeds_of_steps_and_passes_do_not_coincide():
    """Steps that share dropout masks would train less than they seem to."""
    seen = set()
    for numbers in np.ndindex(50, 2, 2):  # step, batch of the step, rank
        seed_everything(11711, *numbers)
        seen.add(tuple(torch.randint(2**62, (2,)).tolist()))
    assert len(seen) == 200


def test_a_frozen_encoder_encodes_in_advance_what_fits(train, monkeypatch, capsys):
    """The rest is encoded again in each step, with the same losses; a finished run encodes none."""
    flags = f"{FROZEN} --epochs 1 --precision fp32"
    losses, said = [], []
    for more, mib in (("", 1), ("--resume", 1), ("--overwrite", 0)):
        monkeypatch.setattr(multitask_bert, "VECTOR_CACHE_MIB", mib)
        losses.append(losses_of(train(f"{flags} {more}")))
        text = capsys.readouterr().out
        said.append(("encoding" in text, "sentence vectors are kept" in text))
    assert said == [(True, False), (False, False), (False, True)]
    for one, other in zip(losses[0], losses[2], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_an_encoder_with_one_segment_takes_no_joint_pairs(train):
    config = json.loads(Path("encoder/config.json").read_text(encoding="utf-8"))
    Path("encoder/config.json").write_text(json.dumps(config | {"type_vocab_size": 1}))
    with pytest.raises(UserError, match="has one segment"):
        train("--pair_encoding para=both")


def test_in_fp16_a_gradient_that_is_never_finite_ends_the_run(train, monkeypatch):
    """The scaler would skip every step and leave an untrained model as the result."""
    monkeypatch.setattr("runtime.device.select_precision", lambda *_: ("fp16", None))
    compute_gradients = multitask_classifier.compute_gradients

    def overflow(model, *rest):
        found = compute_gradients(model, *rest)
        next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return found

    flags = "--tasks sst --epochs 1 --steps_per_epoch 20 --model_file_suffix"
    assert len(losses_of(train(f"{flags} sound"))) == 20
    monkeypatch.setattr(multitask_classifier, "compute_gradients", overflow)
    with pytest.raises(NotFinite, match="step 18: gradient of the loss sst"):  # 65,536 is 2^16
        train(f"{flags} broken")


def test_mean_cosines_leave_out_the_steps_that_had_none():
    """Such as a step that fp16's scaler skips."""
    meter = Meter({})
    for loss, extra in ((1.0, {}), (2.0, {"conflicts": 0.5})):
        meter.add(Step({"sst": loss}, extra, 1.0, 1.0, 4, 40, False))
    assert meter.take()[0] == {"sst": 1.5, "conflicts": 0.5}


# ------------------------------------------------------------------------------- waiting for a GPU

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}


class Dispatched(TorchDispatchMode):
    """Notes in `events` every operation on whose result the CPU would wait."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        of_index = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        if name in WAITS or any(i is not None and i.dtype == torch.bool for i in of_index):
            self.events.append(name)
        return function(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Notes copies of our own code to or from a GPU: on a CPU they dispatch nothing."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, caller = getattr(function, "__name__", ""), sys._getframe(1).f_code
        to_device = name == "to" and any(isinstance(a, str | torch.device) for a in args[1:])
        is_copy = to_device or name in ("tolist", "cpu", "numpy", "tensor", "new_tensor")
        is_ours = str(REPOSITORY) in caller.co_filename and caller.co_name != "to_device"
        if is_copy and is_ours:
            self.events.append(name)
        return function(*args, **(kwargs or {}))


def do_before(part, act, monkeypatch):
    """Call `act` before a function of the training script."""
    original = getattr(multitask_classifier, part)
    monkeypatch.setattr(multitask_classifier, part, lambda *args: act() or original(*args))


@pytest.fixture
def events(monkeypatch):
    """The parts of each step, in order, and within them what a CPU would wait for."""
    events = []
    for part in ("compute_gradients", "prepare_step", "read_back", "log_step"):
        do_before(part, partial(events.append, part), monkeypatch)
    monkeypatch.setattr(bert.FastDropout, "forward", torch.nn.Dropout.forward)  # as on a GPU
    return events


def watch(train, events, flags):
    """The events of each step of a run."""
    with Dispatched(events), Called(events):
        train(f"{flags} --epochs 1 --steps_per_epoch 2")
    steps, step = [], None
    for event in events:
        if event == "compute_gradients":
            steps.append(step := [])
        if step is not None:
            step.append(event)
        if event == "log_step":
            step = None
    return steps


ONE_WAIT = ["compute_gradients", "prepare_step", "read_back", "tolist", "log_step"]
STEPS = [
    BOTH_SIMCSE,
    "--recipe best --batch_size 4",
    f"{LORA} 4 --unsupervised_simcse --accumulate 2 --LoRA_dropout 0.1 --pooling cls",
    f"{LORA} 4 --gradient_surgery {BOTH_SIMCSE}",
    f"--gradient_surgery main {BOTH_SIMCSE}",
    "--gradient_surgery vaccine --sampling annealed",
    DORA,
    FROZEN,
    "--mlm sst para --accumulate 2",
    f"{PAL} --unsupervised_simcse --mlm sts",
]


@pytest.mark.parametrize(
    ("flags", "precision"), [*zip(STEPS, cycle(["fp32", "fp16", "bf16"]), strict=False)]
)
def test_a_step_waits_once_after_the_next_batches_are_built(
    train, events, monkeypatch, flags, precision
):
    """Each other wait would leave a GPU without work."""
    monkeypatch.setattr("runtime.device.select_precision", lambda *_: (precision, None))
    assert watch(train, events, flags) == [ONE_WAIT] * 2


@pytest.mark.parametrize(
    ("wait", "noted"),
    [
        (lambda outputs: outputs[0] > 0 or None, "_local_scalar_dense"),
        (lambda outputs: outputs[outputs > 0], "index"),
        (lambda outputs: outputs.to(torch.device("cpu")), "to"),
        (lambda outputs: outputs.new_tensor([1.0]), "new_tensor"),
    ],
)
def test_twin_another_wait_shows(train, events, monkeypatch, wait, noted):
    task_loss = multitask_bert.task_loss

    def with_wait(task, outputs, labels):
        wait(outputs)
        return task_loss(task, outputs, labels)

    monkeypatch.setattr(multitask_bert, "task_loss", with_wait)
    for step in watch(train, events, "--tasks sts"):
        assert step == [ONE_WAIT[0], noted, *ONE_WAIT[1:]]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [None, 0, 2])
def test_a_step_with_a_bad_number_changes_nothing(fused, bad):
    """Two losses and the norm; the numbers after them do not matter. Not even AdamW counts it."""
    numbers, extra = torch.tensor([1.0, 2.0, 3.0]), {"cosine": torch.tensor(math.nan)}
    model = SimpleNamespace(encoded_sequences=0, encoded_tokens=0)
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer, plain = (torch.optim.AdamW([w], fused=fused) for w in weights)
    for step in range(3):
        for weight in weights:
            weight.grad = torch.tensor([1.0, -2.0, step])
        if step == 2 and bad is not None:
            numbers[bad], weights[0].grad[0] = math.inf, math.nan
        else:
            plain.step()
        losses = {"sst": numbers[0], "sts": numbers[1]}
        _, is_bad = numbers_of_step(losses, extra, numbers[2], model, Compute("cpu", "fp32").scaler)
        multitask_classifier.step_unless(optimizer, is_bad)
    assert torch.equal(*weights)
    states = [of.state_dict()["state"] for of in (optimizer, plain)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------- resuming


def assert_resumed_is_unbroken(train, monkeypatch, flags):
    """A run of two epochs that breaks off at its first checkpoint ends as the unbroken one."""
    flags += " --epochs 2 --steps_per_epoch 3 --batch_size 3 --model_file_suffix"
    whole = train(f"{flags} whole")
    save_checkpoint = RunFolder.save_checkpoint

    def save_and_break(run, tensors):
        save_checkpoint(run, tensors)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save_checkpoint", save_and_break)
        train(f"{flags} broken")
    broken = train(f"{flags} broken --resume")
    assert losses_of(broken) == losses_of(whole)
    found, expected = (load_file(max((x.path / "state").iterdir())) for x in (broken, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found, expected = (prediction_files(x.path / "predictions") for x in (broken, whole))
    assert found == expected


def test_tensorboard_has_every_number_of_the_log_once(train, monkeypatch):
    """Of a run that broke off in the middle of an epoch and did some steps again, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--tensorboard --tasks sst --epochs 2 --steps_per_epoch 4"
    log = RunFolder.log

    def break_off(run, **line):
        log(run, **line)
        if line["step"] == 6:  # after the checkpoint of step 4
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "log", break_off)
        train(flags)
    run = train(f"{flags} --resume")
    found = EventAccumulator(str(run.path / "tensorboard"))
    found.Reload()
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    for kind, name, value in (
        ("train", "losses/sst", lambda line: line["losses"]["sst"]),
        ("eval", "dev/sst/loss", lambda line: line["dev"]["sst"]["loss"]),
    ):
        expected = [(line["step"], pytest.approx(value(line))) for line in lines_of(run, kind)]
        assert [(event.step, event.value) for event in found.Scalars(name)] == expected
    assert {"lr", "tokens_per_s", "overall", "dev/sst/accuracy"} <= set(found.Tags()["scalars"])
    assert not (train("--overwrite --tasks sst --epochs 0").path / "tensorboard").exists()


def test_tensorboard_that_is_not_installed_is_the_users_mistake(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tensorboard: the package is not installed; pip"):
        parse_command(["--tensorboard"])


@pytest.mark.parametrize(
    "flags",
    [
        f"{FROZEN} --precision fp32",
        "--precision bf16",
        f"{LORA} 32 --precision fp32",
        f"{LORA} 4 --mlm sst para --precision bf16",
        f"{DORA} --precision bf16",
        "--pals --freeze_word_embeddings --precision bf16",
        f"{PAL} --gradient_surgery --unsupervised_simcse --precision bf16",
        f"{ALONE} --precision bf16",
    ],
)
def test_a_resumed_run_is_the_unbroken_one(train, monkeypatch, flags):
    """Vectors of a frozen encoder too: their last bits depend on the batch they are encoded in."""
    assert_resumed_is_unbroken(train, monkeypatch, flags)


@pytest.mark.parametrize(
    "flags",
    [
        "--precision bf16 --gradient_surgery vaccine --sampling annealed",
        "--gradient_surgery main --unsupervised_simcse --sampling annealed --save_every 2",
        f"{FROZEN} --sampling annealed --precision bf16",
        "--sampling proportional --accumulate 2 --precision fp32",
    ],
)
def test_a_resumed_run_samples_and_turns_gradients_as_the_unbroken_one(train, monkeypatch, flags):
    """Of tasks of 4, 24 and 24 examples: 1, 4 and 4 of a batch of 9, then 2, 4 and 3."""
    keep_rows(Path("data") / TASKS["sst"].file_name("train"), 4)
    assert_resumed_is_unbroken(train, monkeypatch, flags)


def test_twin_without_the_vaccines_averages_a_resumed_run_is_another(train, monkeypatch):
    forgotten, restore = [], setup.restore

    def without(model, optimizer, compute, progress, tensors):
        forgotten.append(tensors.pop("cosine_targets:model")[0, 1])
        restore(model, optimizer, compute, progress, tensors)

    monkeypatch.setattr(setup, "restore", without)
    with pytest.raises(AssertionError):
        assert_resumed_is_unbroken(train, monkeypatch, "--gradient_surgery vaccine")
    assert forgotten[0] != 0


def test_what_a_sampled_run_says_of_its_batches(train, monkeypatch, capsys):
    """As many processes are part of the run: each share is a multiple of their number."""
    keep_rows(Path("data") / TASKS["sst"].file_name("train"), 4)
    flags = "--sampling annealed --batch_size 12 --epochs 2 --steps_per_epoch 1"
    train(flags)
    said = capsys.readouterr().out
    first, last = "3 of sst, 17 of para, 16 of sts", "9 of sst, 14 of para, 13 of sts"
    assert f"batch {first} in the first epoch and in the last {last}; learning" in said
    assert "warning: sst: a batch of 9 holds training examples several times" in said
    assert "warning: para" not in said
    monkeypatch.setattr(multitask_classifier.distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="settings: number of processes is 2, was 1"):
        train(f"{flags} --resume")


@pytest.mark.parametrize("flags", ["--freeze_word_embeddings --mlm sts", f"{LORA} 4"])
def test_a_resumed_run_that_began_with_another_is_the_unbroken_one(train, monkeypatch, flags):
    """What it does not train, a checkpoint does not have: it is read from that run again."""
    train(f"{ALONE} --epochs 1 --steps_per_epoch 2 --model_file_suffix first")
    assert_resumed_is_unbroken(train, monkeypatch, f"{flags} --start_from runs/full-model-first")


def test_a_run_is_resumed_in_its_own_precision(train, monkeypatch):
    """Begun where `auto` is fp32, moved to a machine where it is bf16."""
    flags = "--epochs 1 --steps_per_epoch 2"
    for has_bf16 in (False, True):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda has=has_bf16: has, raising=False)
        description = train(f"{flags} --resume").description()
        assert (description["precision"], description["args"]["precision"]) == ("fp32", "auto")


def test_a_resumed_run_of_the_sample_says_so(train, capsys):
    """The course's files may have been fetched since; the run stays with the sample."""
    shutil.copytree("data", "data/sample")
    train("--epochs 0 --data_dir data/sample")
    capsys.readouterr()
    new = shutil.copy(Path("data") / TASKS["sst"].file_name("test"), "new.csv")
    multitask_classifier.main(["--resume", "--sst_test", new])  # the other files are the run's own
    assert "warning: the data is the small generated sample" in capsys.readouterr().out


def test_resuming_a_finished_run_without_its_checkpoints_removes_nothing(train):
    """They are the largest files, so they may have been removed to save room."""
    run = train("--epochs 0")
    shutil.rmtree(run.path / "state")
    with pytest.raises(UserError, match="a finished run whose checkpoints"):
        train("--epochs 0 --resume")
    assert run.best.exists() and prediction_files(run.path / "predictions")


def test_a_run_that_starts_over_keeps_the_command_that_began_it(train):
    """Killed before its first checkpoint; the second call leaves out a flag of the first."""
    run = train(f"{LORA} 4 --epochs 0")
    for name in ("state", "predictions"):
        shutil.rmtree(run.path / name)
    train("--fine-tune-mode LoRA --epochs 0 --resume")
    description = run.description()
    assert description["args"]["LoRA_r"] == 4 and "--LoRA_r 4" in description["command"]


def test_a_resumed_run_keeps_the_encoder_that_it_fell_back_to(
    cut_sample, bundled_folder, monkeypatch, capsys
):
    """Begun without the hub and resumed with it: the hub's encoder would be another one."""
    flags = f"--data_dir {cut_sample} --tasks sst --epochs 0 {LORA} 1".split()
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: None)  # no answer
    multitask_classifier.main(flags)
    assert "warning: the encoder is the bundled all-MiniLM-L6-v2" in capsys.readouterr().out
    assert RunFolder("runs/LoRA").description()["encoder"]["substituted"] is True
    for function in ("get_session", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, function, lambda *_, **__: pytest.fail("asks the hub"))
    for main, argv in ((multitask_classifier.main, [*flags, "--resume"]), (evaluation.main, [])):
        main(argv)
        said = capsys.readouterr().out
        assert "when the run began, bert-base-uncased was not in the cache" in said


# ------------------------------------------------------------------------ masked language modelling


def test_masked_language_modelling_alone_keeps_the_lowest_loss_and_evaluates_no_task(
    train, monkeypatch
):
    """The dev loss falls, and rises again in the last epoch, whose rate is far too high."""

    def set_learning_rate(optimizer, step, plan):
        for group in optimizer.param_groups:
            group["lr"] = 1.0 if step >= 12 else 3e-3

    monkeypatch.setattr(multitask_classifier, "set_learning_rate", set_learning_rate)
    run = train(f"{ALONE} --epochs 4 --steps_per_epoch 4 --precision fp32")
    assert all(set(losses) == {"mlm_sst", "mlm_sts"} for losses in losses_of(run))
    evaluations = lines_of(run, "eval")
    means = [np.mean([of["loss"] for of in line["dev"].values()]) for line in evaluations]
    assert [set(line["dev"]) for line in evaluations] == [{"mlm_sst", "mlm_sts"}] * 4
    assert [line["overall"] for line in evaluations] == pytest.approx([-mean for mean in means])
    assert means[3] > means[2] > 0 and means[2] < means[0]
    assert run.describe_best() == f"best model of step {4 * (1 + int(np.argmin(means)))}"
    assert not Path("predictions").exists() and not (run.path / "predictions").exists()
    assert {name.split(".")[0] for name in load_file(run.best / "heads.safetensors")} == {"mlm"}


def test_masks_on_dev_are_the_same_in_each_evaluation(train):
    """Rates that move nothing leave the loss as it was, to the last bit."""
    run = train(f"{ALONE} --epochs 2 --steps_per_epoch 1 {STILL}")
    first, second = (line["dev"] for line in lines_of(run, "eval"))
    assert first == second


def test_a_run_of_masked_language_modelling_alone_has_nothing_to_evaluate(train):
    train("--epochs 0 --model_file_suffix tasks")
    run = train(f"{ALONE} --epochs 0").path
    several = ["--checkpoint", str(run), "runs/full-model-tasks"]
    for argv in ([], ["--sentence", "x"], ["--report", str(run)], several):
        with pytest.raises(UserError, match=f"{run}: .* no task to predict; train tasks with"):
            evaluation.main(argv)
    evaluation.main(["--checkpoint", "runs/full-model", "--export", "exported"])
    assert (Path("exported") / "model.safetensors").is_file()


def test_reviews_may_serve_masked_language_modelling_alone(train):
    """The task of weight 0 has no head, no score and no prediction file; the others have theirs."""
    flags = "--tasks sst para sts cfimdb --mlm cfimdb --loss_weights cfimdb=0 mlm_cfimdb=0.1"
    run = train(f"{flags} --epochs 1 --steps_per_epoch 3")
    assert_complete(run)
    assert all(set(losses) == {*THREE, "mlm_cfimdb"} for losses in losses_of(run))
    assert not any("cfimdb" in n for n in load_file(run.best / "heads.safetensors"))
    assert set(finished_run(run).dev) == set(THREE)
    evaluation.main([])


# ------------------------------------------------------------------- begun with another run's model

OTHER = f"{LORA} 4 --LoRA_targets query output"


def numbers_of(run):
    """Every number in the prediction files of a run, by file."""
    return {
        name: [float(row.split()[-1]) for row in text.decode().splitlines()[1:]]
        for name, text in prediction_files(run.path / "predictions").items()
    }


@pytest.mark.parametrize(("first", "second"), [("", ""), ("", OTHER), (OTHER, OTHER), (OTHER, "")])
def test_a_run_begins_with_the_predictions_of_another(train, first, second):
    """Encoder and heads of every task are the other run's; adapters are taken or merged."""
    flags = "--precision fp32 --unsupervised_simcse --mlm sst --model_file_suffix"
    source = train(f"{flags} one {first} --epochs 2 --steps_per_epoch 3 --lr 1e-2")
    run = train(f"{flags} two {second} --epochs 0 --start_from {source.path}")
    found, description = prediction_files(run.path / "predictions"), run.description()
    for name, numbers in numbers_of(source).items():
        assert numbers_of(run)[name] == pytest.approx(numbers, abs=2e-4), name
    assert numbers_of(train("--epochs 0")) != numbers_of(run)
    for name, tensor in load_file(source.best / "heads.safetensors").items():
        if not name.startswith("offset_"):
            assert torch.equal(load_file(run.best / "heads.safetensors")[name], tensor), name
    assert description["encoder"]["name"] == str(Path("encoder").resolve())
    manifest = (source.best / "manifest.json").read_bytes()
    assert description["start_from"] == hashlib.sha256(manifest).hexdigest()
    evaluation.main(["--checkpoint", str(run.path), "--predictions_dir", "again"])
    assert prediction_files("again") == found


def test_heads_of_another_shape_and_of_other_tasks_start_anew(train, capsys):
    train("--tasks sst para --pals --epochs 0 --model_file_suffix one --seed 1")
    capsys.readouterr()
    flags = "--start_from runs/full-model-one --sst_head linear --model_file_suffix two"
    train(f"{flags} --epochs 0")
    said = capsys.readouterr().out
    assert "warning: keep runs/full-model-one as it is until this run is finished" in said
    assert "copied: encoder, para; new: sst; dropped: pals\n" in said


def test_one_run_after_another_after_a_third(train, capsys, monkeypatch):
    """Adapters on the encoder of a run of the whole model, a run that begins with those; moved."""
    train(f"{ALONE} --epochs 1 --steps_per_epoch 2 --model_file_suffix one")
    start = f"{LORA} 2 --epochs 1 --steps_per_epoch 2 --start_from runs"
    second = train(f"{start}/full-model-one --model_file_suffix two")
    third = train(f"{start}/LoRA-two --model_file_suffix three")
    assert capsys.readouterr().out.count("runs/full-model-one as it is: do not resume") == 2
    best = str(Path("runs/full-model-one/best").resolve())
    for run in (second, third):
        settings = json.loads((run.best / "adapter_config.json").read_text(encoding="utf-8"))
        assert settings["base_model_name_or_path"] == best
        assert run.description()["encoder"]["best"] == best
        evaluation.main(["--checkpoint", str(run.path)])
    Path("moved").mkdir()
    Path("runs").rename("moved/runs")
    monkeypatch.chdir("moved")
    evaluation.main(["--checkpoint", "runs/LoRA-three"])
    words = ["--resume", "--fine-tune-mode", "LoRA", "--model_file_suffix", "two"]
    multitask_classifier.main(words)
    shutil.rmtree("runs/full-model-one")
    with pytest.raises(UserError, match="cannot be loaded, and no other will do"):
        evaluation.main(["--checkpoint", "runs/LoRA-three"])


def test_models_that_a_run_cannot_begin_with(train):
    train(f"{LORA} 4 --epochs 0 --model_file_suffix one")
    train("--epochs 0 --start_from runs/LoRA-one")
    train(f"{LORA} 4 --epochs 0 --model_file_suffix one --overwrite --seed 3")
    shutil.rmtree(train("--epochs 0 --model_file_suffix begun").best.resolve())
    for flags, message in (
        (f"{LORA} 3 --start_from runs/LoRA-one", "r is 4, expected 3"),
        ("--overwrite --start_from runs/nothing", "not the description of a run"),
        ("--overwrite --start_from runs/full-model-begun", "no best model yet"),
        ("--resume --start_from runs/LoRA-one", "best model of --start_from is"),
    ):
        with pytest.raises(UserError, match=message):
            train(f"--epochs 0 {flags}")


# --------------------------------------------------------------------------------------- evaluation


def test_a_run_of_an_older_version_is_evaluated(train):
    """It has no word of newer flags."""
    run = train(f"{LORA} 4 --epochs 0")
    before, description = prediction_files(run.path / "predictions"), run.description()
    for flag in [*description["args"]]:
        if flag in ("mlm", "start_from", "pals") or flag.startswith(("PAL_", "LoRA_l", "LoRA_v")):
            del description["args"][flag]
    del description["start_from"], description["encoder"]["best"]
    (run.path / "run.json").write_text(json.dumps(description), encoding="utf-8")
    evaluation.main(["--predictions_dir", "again"])
    assert prediction_files("again") == before
    evaluation.main(["--report", str(run.path)])
    evaluation.main(["--export", "exported"])


def test_the_newest_run_of_a_folder_is_the_one_evaluated(train, capsys):
    run = train("--epochs 0 --runs_dir mine").path
    later = (run / "best").stat().st_mtime
    for name in ("y", "x", "z"):  # neither the first nor the last by name
        later += 1
        copy = shutil.copytree(run, run.with_name(name), symlinks=True)
        os.utime(copy / "best", (later, later))
        capsys.readouterr()
        evaluation.main(["--runs_dir", "mine", "--sentence", "x"])
        assert f"run mine/{name}, " in capsys.readouterr().out


def test_a_run_is_evaluated_on_its_own_files_wherever_they_are(train, monkeypatch):
    """Moved ones are named by their folder; changed ones are refused."""
    before = prediction_files(train("--epochs 0").path / "predictions")
    Path("data").rename("moved")
    argv = ["--data_dir", "moved", "--predictions_dir", "again"]
    evaluation.main(argv)
    assert prediction_files("again") == before
    monkeypatch.setattr(evaluation, "load_run", None)  # the files are checked before weights load
    with pytest.raises(UserError, match=r"ids-sst-dev.csv: no such file.*--data_dir"):
        evaluation.main([])
    test = Path("moved") / TASKS["sts"].file_name("test")
    test.rename(test.with_suffix(".away"))
    test.symlink_to("nowhere")
    with pytest.raises(UserError, match="a dangling link to nowhere"):
        evaluation.main(argv)
    test.with_suffix(".away").rename(test)
    content = test.read_bytes()
    test.write_bytes(content.replace(b" a ", b" the "))
    assert test.read_bytes() != content
    with pytest.raises(UserError, match="changed since"):
        evaluation.main(argv)


def test_a_deterministic_run_is_evaluated_so(train):
    """Else its predictions would not be those that it wrote, on a GPU."""
    train("--epochs 0 --deterministic")
    torch.use_deterministic_algorithms(False)
    evaluation.main([])
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


def test_a_run_that_still_trains_is_evaluated_as_one_model(train, monkeypatch):
    """The link to the best model may be exchanged between the reading of two files."""
    run = train("--epochs 1 --steps_per_epoch 1")
    wanted = load_file(run.best / "heads.safetensors")
    load_encoder, later = saved_models.load_encoder, RunFolder(run.path)
    later.progress.step = 99

    def exchange_and_load(name):
        later.save_best(lambda folder: save_file(wrong, folder / "heads.safetensors"))
        return load_encoder(name)

    wrong = {name: tensor + 1 for name, tensor in wanted.items()}
    monkeypatch.setattr(saved_models, "load_encoder", exchange_and_load)
    model, _ = saved_models.load_run(run, torch.device("cpu"))
    assert run.describe_best() == "best model of step 99"
    found = {n: t for n, t in model.state_dict().items() if not n.startswith("bert.")}
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_copy_whose_best_is_a_folder_is_evaluated_and_resumed(train, capsys):
    """`cp -rL` and some archives follow the link."""
    run = train("--epochs 0")
    shutil.copytree(run.path, "copy")
    shutil.rmtree(run.path)
    shutil.move("copy", run.path)
    assert not run.best.is_symlink()
    capsys.readouterr()
    evaluation.main(["--sentence", "x"])
    assert "best model, cpu" in capsys.readouterr().out
    train("--epochs 0 --resume")
    assert run.best.is_symlink() and run.describe_best() == "best model of step 0"


# ----------------------------------------------------------------- slow: the bundled encoder learns


@pytest.mark.slow
def test_the_bundled_encoder_learns_the_sample(bundled_folder):
    """Well above chance (0.2) within a few CPU minutes."""
    multitask_classifier.main(f"--pretrained bundled {LORA} 32 --epochs 4".split())
    best = max(lines_of(RunFolder("runs/LoRA"), "eval"), key=lambda line: line["overall"])
    assert best["dev"]["sst"]["accuracy"] > 0.4
    assert best["dev"]["para"]["accuracy"] > 0.65
    assert best["dev"]["sts"]["pearson"] > 0.5


@pytest.mark.slow
def test_bf16_reaches_the_dev_scores_of_fp32(bundled_folder):
    """Over three seeds, the scores differ no more than those of seeds do."""
    if Compute("cpu", "bf16").precision != "bf16":
        pytest.skip("this CPU has no bf16")
    flags = f"--pretrained bundled --data_dir {SAMPLE} --epochs 1 --steps_per_epoch 80 --overwrite"
    scores, run = {"fp32": [], "bf16": []}, RunFolder("runs/full-model")
    for precision, of_precision in scores.items():
        for seed in (1, 2, 3):
            more = f"--batch_size 16 --precision {precision} --seed {seed}"
            multitask_classifier.main(f"{flags} {more}".split())
            assert run.description()["precision"] == precision
            of_precision.append(finished_run(run).overall)
    difference = abs(np.mean(scores["fp32"]) - np.mean(scores["bf16"]))
    spread = np.sqrt(sum(np.var(values, ddof=1) for values in scores.values()) / 3)
    assert min(scores["fp32"]) > 0.65, "so little was learned that nothing could differ"
    assert difference <= max(3 * spread, 0.01), scores


# --------------------------------------------------------------- on a GPU: python -m pytest -m cuda


@pytest.fixture
def gpu(monkeypatch):
    """Skips where there is no GPU; `--deterministic` ends with the test."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_scores_of_a_gpu_are_those_of_the_cpu(gpu, train, monkeypatch, mode):
    """fp32, without dropout, whose random numbers differ: the same batches, the same updates."""
    flags = f"--fine-tune-mode {mode} --epochs 2 --steps_per_epoch 4 --precision fp32 --clip 0.5"
    flags += " --hidden_dropout_prob 0 --deterministic --model_file_suffix"  # which means no TF32
    on_gpu = train(f"{flags} gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = train(f"{flags} cpu")
    assert "cpu" not in on_gpu.description()["device"]
    for one, other in zip(on_gpu.metrics(), on_cpu.metrics(), strict=True):
        if one["kind"] == "train":
            assert one["losses"] == pytest.approx(other["losses"], rel=1e-3)
            assert one["peak_memory_mib"] < other["peak_memory_mib"]  # of tensors alone
        else:
            assert one["overall"] == pytest.approx(other["overall"], abs=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_on_a_gpu_is_the_unbroken_one(gpu, train, monkeypatch, mode, precision):
    """Weights, AdamW's state and fp16's scaler come back to the device that computes."""
    flags = f"--fine-tune-mode {mode} --precision {precision} --deterministic"
    assert_resumed_is_unbroken(train, monkeypatch, flags)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("flags", STEPS)
def test_a_gpu_is_not_waited_for_until_the_numbers_are_read_back(
    gpu, train, monkeypatch, flags, precision
):
    """CUDA itself reports every wait, from the forward pass to the next batches."""
    mode = torch.cuda.set_sync_debug_mode
    do_before("compute_gradients", partial(mode, "error"), monkeypatch)
    do_before("read_back", partial(mode, "default"), monkeypatch)
    try:
        train(f"{flags} --precision {precision} --epochs 1 --steps_per_epoch 3")
    finally:
        mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_fused_kernel_takes_our_mask_and_dropout(gpu, train, precision):
    """Without one, attention would hold its scores for every head in memory."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        train(f"--precision {precision} --epochs 1 --steps_per_epoch 2")
