"""Prediction of a user's own texts, and the export of a run's best model."""

import csv
import errno
import io
import json
import os
import re
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_in

import evaluation
import multitask_classifier
from bert import BertModel
from config import TASKS, UserError
from evaluation import parse_flags, predict_sentences
from reporting import texts
from reporting.texts import read_chunks
from runtime.device import Compute
from runtime.files import OutputError
from training.run_folder import RunFolder
from training.saved_models import load_run

SMALL = "--pretrained encoder --fine-tune-mode LoRA --LoRA_r 4 --lr 0.05 --epochs 1 "
SMALL += "--steps_per_epoch 3 --batch_size 4 --pooling cls"


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def trained(write_encoder, cut_sample, tmp_path_factory):
    """A folder with a tiny encoder and a finished LoRA run of the three tasks."""
    folder = tmp_path_factory.mktemp("trained")
    write_encoder(folder / "encoder")
    train_in(folder, f"{SMALL} --data_dir {cut_sample}")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run in the working directory."""
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    return RunFolder("runs/LoRA")


def rows_of(path):
    """The sentences of all rows of a file of texts."""
    return [row.sentences for chunk in read_chunks(path) for row in chunk]


# ------------------------------------------------------------------------------- files of texts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a b\nc, d\n\ne", [("a b",), ("c, d",), ("",), ("e",)]),
        ("a b\r\nc\r\n", [("a b",), ("c",)]),
        ("a b\r\r\nc\r\r\n", [("a b",), ("c",)]),  # of Windows' text mode, written twice
        ("\ufeffa\0b\n", [("ab",)]),
        ('"a" b\n"c\n', [('"a" b',), ('"c',)]),  # plain lines: a quote is text
        ("a\u2028b\x85c\n", [("a\u2028b\x85c",)]),
        ("a\tb\nc\t\n", [("a", "b"), ("c", "")]),
        ("id\tsentence\n1\ta\n2\tb\tmore\n", [("a",), ("b",)]),
        ("Sentence , id\na,1\n\nb,2\n", [("a",), ("b",)]),
        ('id,sentence2,sentence1\n1,"b, ""x""","a\nc"\n', [("a\nc", 'b, "x"')]),
        ("sentence\na\n", [("a",)]),
        ("sentence\tsentence1\tsentence2\nx\ta\tb\n", [("a", "b")]),
        ("a sentence\nb\n", [("a sentence",), ("b",)]),
        (200_000 * "a" + "\nb\n", [(200_000 * "a",), ("b",)]),  # more than csv's own limit
    ],
)
def test_a_header_names_the_columns_and_other_lines_are_texts(tmp_path, content, expected):
    (tmp_path / "x").write_bytes(content.encode())
    assert rows_of("x") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: an empty file"),
        (b"a\nb\tc\n", "x:2: 2 fields; expected one sentence, or two"),
        (b"a\tb\nc\n", "x:2: 1 fields"),
        (b"a\tb\tc\n", "x:1: 3 fields"),
        (b"id\tsentence\n1\ta\n2\n", "x:3: 1 fields; expected at least 2"),
        (b'id,sentence\n1,a\n2,"b\n3,c\n', "x:3: a quote .* without its end"),
        (b'id,sentence\n\n1,"a\nb"\n2,"c"d\n', "x:5: a quote .*, or text after its end"),
        (b"a\nb\xe9\n", "x:2: byte 0xe9 is not UTF-8"),
        (b"PK\x03\x04...", "x: a zip or Excel file"),
        (b"id\tsentence\n1\ta\rb\n", "x:2: a carriage return inside the line"),
        (b"a\rb\rc", "x:1: a carriage return inside the line"),
        (None, "x: not readable: No such file"),
    ],
)
def test_a_file_that_cannot_be_read_names_the_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=f"^{message}"):
        rows_of("x")


def test_a_long_file_is_read_in_pieces(tmp_path):
    (tmp_path / "x").write_text("a good movie and a long line of text\n" * 60_000)
    tracemalloc.start()
    assert sum(map(len, read_chunks("x"))) == 60_000
    assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    tracemalloc.stop()


# ----------------------------------------------------------------------------------- predictions


def table_of(output):
    """A written table as rows of cells."""
    return list(csv.reader(io.StringIO(output.decode()), delimiter="\t"))


@pytest.mark.parametrize("pairs", [False, True])
def test_the_table_has_each_text_and_what_each_task_predicts(run, capsysbinary, monkeypatch, pairs):
    """In the order of the rows, the same as for the text alone; nothing else on standard output."""
    monkeypatch.setattr(texts, "CHUNK_ROWS", 2)
    sentences = ["a good movie", 'bad, "bad" film é', "", "the cat", "-not good-"]
    rows = [(a, b) for a, b in zip(sentences, sentences[::-1], strict=True)] if pairs else []
    rows = rows or [(text,) for text in sentences]
    content = "\n".join("\t".join(row) for row in rows).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    evaluation.main(["--predict", "-"])
    header, *found = table_of(capsysbinary.readouterr().out)
    scored = [f"sst_score_{i}" for i in range(5)]
    expected = ["sentence", "sst", *scored]
    if pairs:
        expected = ["sentence1", "sentence2", "para", "para_score_0", "sts", "sts_score_0"]
    assert header == expected
    assert [tuple(row[: len(rows[0])]) for row in found] == rows
    model, _ = load_run(run, torch.device("cpu"))
    for name in ("para", "sts") if pairs else ("sst",):
        place = header.index(name)
        for row, cells in zip(rows, found, strict=True):
            alone = predict_sentences(model, name, [row], Compute("cpu", "fp32"))
            assert cells[place] == TASKS[name].format(alone.predictions[0]) or name == "sts"
            scores = [float(cell) for cell in cells[place + 1 : place + 1 + len(alone.scores[0])]]
            np.testing.assert_allclose(scores, alone.scores[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
def test_the_scores_on_labelled_rows_are_printed(run, cut_sample, monkeypatch, capsys, name):
    """Those of the run on its dev file; a row without a label, or a wrong one, does not count."""
    monkeypatch.setattr(texts, "CHUNK_ROWS", 5)
    content = (cut_sample / TASKS[name].file_name("dev")).read_text(encoding="utf-8")
    header, *lines = content.splitlines()
    row = lines[-1].rpartition("\t")[0]
    lines = [header, row, *lines, f"{row}\t", f"{row}\tgood", ""]
    Path("x").write_text("\n".join(lines), encoding="utf-8")
    evaluation.main(["--predict", "x", "--out", "table"])
    lines = [line for line in capsys.readouterr().err.splitlines() if " rows with a " in line]
    (metrics,) = (line["dev"][name] for line in run.metrics() if line["kind"] == "eval")
    expected = "  ".join(f"{key} {metrics[key]:.3f}" for key in metrics if key != "loss")
    task = TASKS[name]
    where = f"12 rows with a {task.label} from 0 to {task.high:g}"
    assert lines == [f"{name}: {where}  {expected}"]


def test_out_appears_whole_or_not_at_all(run, tmp_path, capsysbinary):
    (tmp_path / "x").write_text("good\n" * 5000 + "a\tb\n")
    (tmp_path / "out.tsv").write_text("earlier")
    with pytest.raises(UserError, match="x:5001: 2 fields"):
        evaluation.main(["--predict", "x", "--out", "out.tsv"])
    assert (tmp_path / "out.tsv").read_text() == "earlier"
    (tmp_path / "x").write_text("good\n" * 3)
    evaluation.main(["--predict", "x", "--out", "new/out.tsv"])
    assert len(table_of((tmp_path / "new" / "out.tsv").read_bytes())) == 4
    assert capsysbinary.readouterr().out == b""
    assert not list(tmp_path.rglob(".tmp-*"))
    with pytest.raises(OutputError, match=r"out\.tsv/x: not written: "):
        evaluation.main(["--predict", "x", "--out", "out.tsv/x"])
    with pytest.raises(UserError, match=r"--out \./x: the file of --predict"):
        evaluation.main(["--predict", "x", "--out", "./x"])
    evaluation.main(["--predict", "x", "--out", "-"])
    assert len(table_of(capsysbinary.readouterr().out)) == 4


def test_a_file_of_a_header_alone_is_named(run, tmp_path):
    (tmp_path / "x").write_text("sentence\n\n")
    with pytest.raises(UserError, match="x: only a header"):
        evaluation.main(["--predict", "x"])


def test_a_full_disk_that_shows_in_the_last_flush_is_named(run, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def reconfigure(self, **_):
            pass

        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    (tmp_path / "x").write_text("good\n")
    with pytest.raises(OutputError, match="output: not written: No space left on device"):
        evaluation.main(["--predict", "x"])


def test_a_reader_that_closes_standard_output_ends_it_quietly(run, tmp_path, monkeypatch):
    class Closed(io.TextIOWrapper):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed(io.BytesIO()))
    (tmp_path / "x").write_text("good\n")
    evaluation.main(["--predict", "x"])


@pytest.mark.parametrize(
    ("tasks", "argv", "expected"),
    [
        (["sst"], ["--predict", "x"], "leave the second sentence out"),
        (["para", "sts"], ["--sentence", "x"], r"pair tasks only \(para, sts\): add a second"),
    ],
)
def test_texts_of_the_wrong_kind_are_refused_before_the_model_is_loaded(
    run, tmp_path, monkeypatch, tasks, argv, expected
):
    description = run.description()
    description["args"]["tasks"] = tasks
    (run.path / "run.json").write_text(json.dumps(description))
    monkeypatch.setattr(evaluation, "load_run", None)
    (tmp_path / "x").write_text("a\tb\n")
    with pytest.raises(UserError, match=expected):
        evaluation.main(argv)


def test_a_sentence_or_a_pair_is_predicted_by_the_tasks_that_fit(run, capsys):
    sentence = ["--sentence", "A man sleeps."]
    pair = [*sentence, "--sentence2", "A man is asleep."]
    p = r"[01]\.\d{3}"
    sst = rf"sst     sentiment: [0-4]  \(probabilities of 0 to 4: {' '.join([p] * 5)}\)"
    para = rf"para    paraphrase: [01]\.0  \(probability of 1: {p}\)"
    sts = r"sts     similarity: [0-5]\.\d+"
    for argv, expected in ((sentence, [sst]), (pair, [para, sts])):
        evaluation.main(argv)
        _, _, *lines = capsys.readouterr().out.splitlines()  # the run, and that it saw the sample
        for line, pattern in zip(lines, expected, strict=True):
            assert re.fullmatch(pattern, line)


@pytest.mark.parametrize("text", ["-LRB-", "-1", "--sst", "-LRB- a -RRB-"])
def test_a_sentence_may_begin_with_a_dash(text):
    flags = parse_flags(["--sentence", text, "--sentence2", text])
    assert (flags.sentence, flags.sentence2) == (text, text)
    assert parse_flags([f"--sentence={text}"]).sentence == text


# ---------------------------------------------------------------------------------------- export


def test_an_export_is_an_encoder_with_lora_merged_that_a_new_run_starts_from(run, capsysbinary):
    evaluation.main(["--export", "out/merged"])
    assert b"wrote out/merged" in capsysbinary.readouterr().out
    model, _ = load_run(run, torch.device("cpu"))
    ids = torch.tensor([[2, 9, 14, 22, 3]])
    expected = model.bert(ids, torch.ones_like(ids))["last_hidden_state"]
    exported = BertModel.from_pretrained("out/merged")
    found = exported(ids, torch.ones_like(ids))["last_hidden_state"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    base = BertModel.from_pretrained("encoder")(ids, torch.ones_like(ids))["last_hidden_state"]
    assert (found - base).abs().max() > 1e-3  # the twin: training moved it
    flags = SMALL.replace("--pretrained encoder", "--pretrained out/merged")
    multitask_classifier.main([*flags.split(), "--model_file_suffix", "next"])
    assert RunFolder("runs/LoRA-next").description()["encoder"]["name"].endswith("out/merged")


def test_an_export_replaces_nothing_and_leaves_no_part(run, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="--export there: exists"):
        evaluation.main(["--export", "there"])
    with pytest.raises(OutputError, match="not written"):
        evaluation.main(["--export", "runs/LoRA/run.json/x"])
    shutil.rmtree(run.best.resolve())
    with pytest.raises(UserError, match="no best model yet"):
        evaluation.main(["--checkpoint", "runs/LoRA", "--export", "new"])
    assert not [p for p in tmp_path.iterdir() if p.name == "new" or p.name.startswith(".tmp-")]
