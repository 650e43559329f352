"""Task files and batches: what is read, what is refused, and the order of training.

Numbers in names are rows of the fault table, of which test_faults.py runs some as commands.
"""

import codecs
import csv
import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_DATA, SAMPLE

from bert import BertModel
from config import TASKS, UserError
from datasets import Example, MultitaskBatches, TaskDataset, odd_labels, read_task_file

SST, STS = "\tid\tsentence\tsentiment\n", "\tid\tsentence1\tsentence2\tsimilarity\n"
BOM, OPEN = codecs.BOM_UTF8, '0\tid0\t"open\t3\n'


def rows(count):
    """Good rows of an SST file."""
    return "".join(f"{i}\tid{i}\tsentence {i}\t3\n" for i in range(count))


def labelled(task, label):
    """A file of one row, with the id "a"."""
    columns = ["id", *TASKS[task].sentences, TASKS[task].label]
    return "\t".join(columns) + "\na" + "\tx" * len(TASKS[task].sentences) + f"\t{label}\n"


def read(folder, content, task="sst", split="train"):
    """Write a file, text or bytes, and read it."""
    path = folder / "file.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_task_file(path, TASKS[task], split)


def assert_refused(folder, content, *words, task="sst", split="train"):
    """The file is refused with a message of one line that has all of `words`."""
    with pytest.raises(UserError) as error:
        read(folder, content, task, split)
    assert "\n" not in str(error.value)
    assert not [word for word in ("file.csv:", *words) if word not in str(error.value)], error.value


# ---------------------------------------------------------------------------------------- reading

# fmt: off
WRONG_LABELS = {
    "sst": ["5", "7", "-1", "-100", "2.5", "３", "1_0", "two", "nan", "0x1", "1e0"],
    "para": ["2", "nan"],
    "sts": ["nan", "inf", "6", "5.01", "-0.1", "３", "1_0", "1e999", "high"],
    "cfimdb": ["2"],
}
RIGHT_LABELS = {
    "sst": {"3": 3, " 3.0 ": 3, "3.": 3, "+4": 4},
    "para": {"1.0": 1, "0": 0},
    "sts": {"2.875": 2.875, "3.75": 3.75, "1e-1": 0.1, ".5": 0.5, "0.0": 0, "5": 5},
    "cfimdb": {"1": 1},
}
WRONG_IDS = ["=cmd()", "a , b", "", "-x", ".x", "a  b", "a\u00a0b", "é", "a/b", "x" * 81, "a;b"]
RIGHT_IDS = ["65977 641bc8de-b905-4ae4-a0ee-abea15fbc88e", "x" * 80, "a.b_c-d", "0"]
OPEN_QUOTES = [  # rows, each with a quote that ends with the file or at a later row's; its line
    (OPEN + rows(3), 2),
    (OPEN + '1\tid1\t"quoted"\t2\n' + rows(2), 2),
    (OPEN + '1\tid1\tin the "middle" of it\t2\n' + rows(2), 2),
    (OPEN + '1\tid1\tat the end"\t2\n' + rows(2), 2),
    (OPEN + rows(2) + '1\tidx\tat the end"\t2\n', 2),
    ('0\tid0\tx\t"3\n1\tid1\ty\t3"\n', 2),
    ('0\tid0\t"open\n1\tid1\tat the end"\t3\n', 2),
    ('0\tid0\t"open\n1\tid1\tx\t3\nat the end"\t3\n', 2),
    ('0\tid0\t"open\nat the end"\tx\t3\n', 2),
    (rows(1) + '\n\n1\tid9\t"open at the end\n', 5),
    (rows(1) + '1\tid9\t"open at the end\t3', 3),
]
SEVERAL_LINES = '0\ta\t"one\ntwo ""three"" \n\nfour"\t3\n1\tb\t"tab\tin it\nand more"\t2\n'
LATIN_1 = (SST + "0\ta\tna\xefve\t3\n").encode("latin-1")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
REFUSED = [  # row of the fault table, task, file, words of the message
    ("08", "sst", LATIN_1, [":2:", "byte 0xef at offset 29 "]),
    ("08", "sst", BOM + LATIN_1, [":2:", "byte 0xef at offset 32 "]),
    ("08", "sst", BOM + SST.encode() + b"\xe90\ta\tx\t3\n", [":2:", "byte 0xe9 at offset 26 "]),
    ("10", "sst", "id\tsentence\na\tx\n", [":1:", "sentiment", "['id', 'sentence']"]),
    ("10", "sst", "id\tid\tsentence\tsentiment\n", [":1:", "id missing or repeated"]),
    ("13", "sst", SST + rows(94) + "0\tbad\tx\t\n" * 6, [":96:", "6 of 100 rows"]),
    ("13", "sst", SST + rows(700) + "0\tbad\tx\t\n" * 8, [":702:", "8 of 708 rows"]),
    ("13", "sst", SST + "0\tbad\tx\t\n", [":2:", "1 of 1 rows"]),  # no other row is left
    *(("14", task, labelled(task, text),
       [f":2: {TASKS[task].label} {text!r}; expected a", f"number from 0 to {TASKS[task].high:g}"])
      for task, texts in WRONG_LABELS.items() for text in texts),
    *(("16", "sst", f"{SST}0\t{name}\tx\t3\n", [":2:", "1 to 80 letters"]) for name in WRONG_IDS),
    *(("18", "sst", SST + text, [f":{line}:", "a quote"]) for text, line in OPEN_QUOTES),
    ("18", "sst", SST[1:] + 'a\t"open\t3\nb\tat the end"\t2\n', [":2:", "a quote"]),
    ("18", "sts", STS + '0\ta\t"open\tx\t3\nat the end"\tx\t3\n', [":2:", "a quote"]),
    ("18", "sst", SST + SEVERAL_LINES + "2\tc\tx\t9\n", [":8:"]),  # as an editor counts lines
    ("22", "sst", b"", ["an empty file"]),
    ("22", "sst", BOM + b" \n\n", ["an empty file"]),
    ("22", "sst", SST, ["only a header"]),
    ("22", "sst", LFS, ["a git-LFS pointer"]),
    ("22", "sst", "\n<!DOCTYPE html>\n<html><body>404</body></html>", ["an HTML page"]),
    ("22", "sst", BOM + b"<!-- 404 --><html></html>", ["an HTML page"]),
    ("54", "sst", (SST + rows(3)).replace("\t", ","), [":1:", "looks separated by commas"]),
    ("54", "sst", (SST + rows(3)).encode("utf-16"), ["UTF-16 text"]),
    ("54", "sst", gzip.compress(SST.encode()), ["a gzip file"]),
    ("54", "sst", b"PK\x03\x04 workbook", ["a zip or Excel file"]),
]
QUOTED = SST + '0\ta\t"of ""two""\nlines"\t0\n'
READ = [  # row of the fault table, task, file, (id, sentences, label) of its rows
    ("07", "sst", QUOTED, [("a", 'of "two"\nlines', 0)]),
    ("07", "sst", BOM + QUOTED.encode(), [("a", 'of "two"\nlines', 0)]),
    ("07", "sst", QUOTED.replace("\n", "\r\n"), [("a", 'of "two"\nlines', 0)]),
    ("09", "sst", SST + "0\ta\tx\0y\0z\t3\n", [("a", "xyz", 3)]),
    ("10", "sst", "sentiment\tsentence\tnote\tID \n3\ta film\t?\ta\n", [("a", "a film", 3)]),
    *(("14", task, labelled(task, text), [("a", *["x"] * len(TASKS[task].sentences), label)])
      for task, labels in RIGHT_LABELS.items() for text, label in labels.items()),
    *(("16", "sst", f"{SST}0\t{name}\tx\t3\n", [(name, "x", 3)]) for name in RIGHT_IDS),
    ("18", "sst", SST + SEVERAL_LINES,
     [("a", 'one\ntwo "three" \n\nfour', 3), ("b", "tab\tin it\nand more", 2)]),
    ("19", "sts", STS + '0\ta\t"a ""b""\tc"\tsay "so"\t3\n1\tb\t"x" y\t"""z"""\t2\n',
     [("a", 'a "b"\tc', 'say "so"', 3), ("b", "x y", '"z"', 2)]),
    ("19", "sst", SST + '0\ta\t"Great" film\t3', [("a", "Great film", 3)]),  # no final newline
]
# fmt: on


@pytest.mark.parametrize(("row", "task", "content", "words"), REFUSED, ids=[f[0] for f in REFUSED])
def test_fault_08_to_22_refused_files(tmp_path, row, task, content, words):
    for split in ("train", "dev"):
        assert_refused(tmp_path, content, *words, task=task, split=split)


@pytest.mark.parametrize(("row", "task", "content", "expected"), READ, ids=[f[0] for f in READ])
def test_fault_07_to_19_files_that_are_read(tmp_path, row, task, content, expected):
    found = read(tmp_path, content, task)
    assert [(e.id, *e.sentences, e.label) for e in found.examples] == expected
    assert found.warnings == ([f"{found.path}: 2 NUL characters removed"] if row == "09" else [])


def test_fault_11_the_odd_test_header(tmp_path):
    """Labels in a test file, right or wrong, are not read."""
    for text in ("0\t\tid\tsentence\n1\t0.0\ta\t A film .\n", f"{SST}0\ta\t A film .\t77\n"):
        assert read(tmp_path, text, split="test").examples == [Example("a", (" A film .",), None)]


@pytest.mark.parametrize("bad", ["0\tbad\tx\n", "0\tbad\tx\t3\t4\n", "0\tbad\tx\t\n", "0\n"])
def test_fault_12_skipped_rows(tmp_path, bad):
    found = read(tmp_path, SST + rows(700) + bad * 6)
    assert (len(found.examples), found.rows) == (700, 706)
    (warning,) = found.warnings
    assert "6 of 706 rows skipped" in warning
    assert [f":{line}:" in warning for line in range(701, 708)] == [False, *[True] * 5, False]
    assert_refused(tmp_path, SST + rows(3) + "0\n", ":5:", "1 fields; expected 4", split="test")


def test_fault_15_repeated_ids(tmp_path):
    other = SST + rows(3) + "3\tid1\tanother sentence\t3\n"
    same = SST + rows(3) + "3\tid1\tsentence 1\t3\n"
    for split in ("dev", "test"):
        assert_refused(tmp_path, other, ":5:", "id id1 on lines 3 and 5", split=split)
    for text, split, count in ((same, "dev", 3), (same, "train", 4), (other, "train", 4)):
        found = read(tmp_path, text, split=split)
        assert (len(found.examples), found.rows) == (count, 4)
        assert ":5: id id1 again, first on line 3" in found.warnings[0]


ODD = ["", "  ", "😀 👩‍👩‍👧", "x" * 101, "a [SEP] b [CLS] [PAD]", "\u200b\ufffd\U0010ffff", "漢字"]


def test_fault_17_and_21_empty_and_odd_text_gives_finite_vectors(tmp_path, tokenizer, tiny_config):
    """Its markers, written out, are text: there is one real [CLS] and [SEP] each."""
    file = read(tmp_path, SST + "".join(f"0\tid{i}\t{text}\t3\n" for i, text in enumerate(ODD)))
    assert [e.sentences for e in file.examples] == [(text,) for text in ODD]
    for ids in TaskDataset(file.examples, TASKS["sst"], tokenizer, 40).sentences[0]:
        assert [list(ids).count(i) for i in (tokenizer.cls_id, tokenizer.sep_id)] == [1, 1]
        row = torch.tensor(ids[None]).long()
        assert BertModel(tiny_config)(row, torch.ones_like(row))["pooler_output"].isfinite().all()


def as_the_course_reads(path, task, split):
    """The rows of a file by `csv` alone, without those that have no label."""
    with open(path, encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file, delimiter="\t"))
    examples = []
    for record in records:
        label = None if split == "test" else record[task.label]
        texts = tuple(record[name] for name in task.sentences)
        examples += [Example(record["id"], texts, label and float(label))] * (label != "")
    return examples


@pytest.mark.parametrize("folder", [SAMPLE, REAL_DATA], ids=["sample", "real"])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("name", TASKS)
def test_fault_19_files_are_read_as_the_course_reads_them(folder, name, split):
    """The real Quora file has two rows without a label (row 12)."""
    task = TASKS[name]
    path = folder / task.file_name(split)
    if folder == REAL_DATA and not path.exists():
        pytest.skip(f"no real data in {folder}; name its folder in REAL_DATA_DIR")
    found = read_task_file(path, task, split)
    assert found.examples == as_the_course_reads(path, task, split)
    skipped = 2 if (folder, name, split) == (REAL_DATA, "para", "train") else 0
    assert (found.rows - len(found.examples), len(found.warnings)) == (skipped, skipped // 2)


def test_fault_20_a_sentence_of_10_mb(tmp_path, tokenizer):
    began = time.monotonic()
    file = read(tmp_path, f"{SST}9\tbig\t{'great film ' * 1_000_000}\t4\n")
    assert TaskDataset(file.examples, TASKS["sst"], tokenizer, 40).longest() == 40
    assert time.monotonic() - began < 2  # without the cut, 6


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("nowhere"), "a dangling link to nowhere"),
        (os.mkfifo, "a pipe or a device"),
        (Path.exists, "no such file; fetch the data with: python data/prepare.py"),
    ],
)
def test_fault_22_paths_that_are_no_file(tmp_path, make, problem):
    make(tmp_path / "x.csv")
    with pytest.raises(UserError, match=f"x.csv: {problem}"):
        read_task_file(tmp_path / "x.csv", TASKS["sst"], "train")


# ------------------------------------------------------------------------------ examples to batches


def made_up(name, count, tokenizer, words=lambda i: 1 + i % 7):
    """A dataset of `count` examples; each sentence of example i has `words(i)` words."""
    task = TASKS[name]
    sentences = [("good " * words(i),) * len(task.sentences) for i in range(count)]
    examples = [Example(f"id{i}", s, float(i % 2)) for i, s in enumerate(sentences)]
    return TaskDataset(examples, task, tokenizer, 40)


@pytest.fixture
def batches(tokenizer):
    """Training batches of 4 from tasks of 10, 10 and 3 examples."""
    sizes = {"sst": 10, "para": 10, "sts": 3}
    return MultitaskBatches({n: made_up(n, k, tokenizer) for n, k in sizes.items()}, 4, seed=5)


def test_a_batch_holds_the_rows_asked_for_in_that_order(tokenizer):
    batch = made_up("para", 6, tokenizer).batch([3, 0])
    assert batch.ids == ["id3", "id0"]
    assert [len(ids) for ids in batch.first] == [len(ids) for ids in batch.second] == [6, 3]
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [1.0, 0.0]
    examples = [Example("a", ("good",), None)]  # of a test file of sentences
    batch = TaskDataset(examples, TASKS["sst"], tokenizer, 40).batch([0])
    assert (batch.second, batch.labels) == (None, None)


def test_the_order_is_a_pure_function_of_seed_and_step(batches):
    """A resumed run starts in the middle and must meet the batches of an unbroken one."""

    def at(batches, step):
        return {name: batches.rows(name, step).tolist() for name in batches.datasets}

    steps = [at(batches, step) for step in range(12)]
    torch.manual_seed(1)
    np.random.seed(1)
    fresh = MultitaskBatches(batches.datasets, 4, seed=5)
    assert [at(fresh, step) for step in (11, 0, 7, 7, 3)] == [steps[i] for i in (11, 0, 7, 7, 3)]
    assert at(MultitaskBatches(batches.datasets, 4, seed=6), 0)["sst"] != steps[0]["sst"]
    assert steps[0]["sst"] != steps[0]["para"]  # tasks of one size have different orders,
    alone = MultitaskBatches({"para": batches.datasets["para"]}, 4, seed=5)
    assert at(alone, 7)["para"] == steps[7]["para"]  # whatever the other tasks are


@pytest.mark.parametrize("name", ["sst", "sts"])
def test_each_pass_sees_every_example_once_in_a_fresh_order(batches, name):
    """A batch at the end of a pass is filled from the next one: none is short, no row is lost."""
    size = len(batches.datasets[name])
    steps = [batches.rows(name, step) for step in range(size)]  # 4 passes
    assert {len(rows) for rows in steps} == {4}
    passes = np.concatenate(steps).reshape(4, size).tolist()
    assert passes == [batches.permutation(name, number).tolist() for number in range(4)]
    assert all(sorted(one) == list(range(size)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_the_shares_of_several_processes_are_the_whole_batch(batches):
    slices = (slice(0, 2), slice(2, 4))
    parts = [MultitaskBatches(batches.datasets, 4, 5, [dict.fromkeys(TASKS, s)]) for s in slices]
    for name, batch in batches[3].items():
        assert [i for part in parts for i in part[3][name].ids] == batch.ids
        rows = {int(row) for step in range(3) for row in batches.rows(name, step)[:2]}
        assert parts[0].rows_until(name, 3).tolist() == sorted(rows)


def test_batch_sizes_that_change_by_epoch_leave_no_row_out(batches):
    """Epochs of 3 batches. A later epoch begins where the sizes before it ended; the last stays."""
    sizes = [{"sst": 1, "para": 6}, {"sst": 4, "para": 3}, {"sst": 2, "para": 5}]
    slices = [{"sst": slice(0, 1), "para": slice(2, size["para"])} for size in sizes]
    datasets = {name: batches.datasets[name] for name in ("sst", "para")}
    sampled = MultitaskBatches(datasets, sizes, 5, slices, epoch_length=3)
    for name in datasets:
        order = np.concatenate([batches.permutation(name, number) for number in range(6)]).tolist()
        wanted = [size[name] for size in sizes for _ in range(3)] + [sizes[2][name]]
        rows = [sampled.rows(name, step).tolist() for step in (9, 4, *range(10))]  # in any order
        assert [len(part) for part in rows[2:]] == wanted
        assert np.concatenate(rows[2:]).tolist() == order[: sum(wanted)]
        assert rows[:2] == [rows[11], rows[6]]
        mine = [rows[2 + step][slices[step // 3][name]] for step in range(9)]
        assert sampled.rows_until(name, 9).tolist() == sorted({i for part in mine for i in part})
        for step, part in enumerate(mine):
            assert sampled[step][name].ids == [f"id{row}" for row in part]


@pytest.mark.parametrize("name", ["sst", "para"])
@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_batches_of_tokens_cover_every_row_once_within_the_budget(tokenizer, name, budget):
    """Each is as large as the budget allows: the next example would not have fitted."""
    dataset = made_up(name, 53, tokenizer, words=lambda i: 1 + (i * i) % 17)
    parts, before = [], budget
    for rows, batch in dataset.batches_of(budget):
        pairs = zip(batch.first, batch.second or [[]] * len(rows), strict=True)
        lengths = [len(first) + len(second) for first, second in pairs]
        assert batch.ids == [f"id{row}" for row in rows]
        assert len(rows) == 1 or sum(lengths) <= budget
        assert before + lengths[0] > budget
        before = sum(lengths)
        parts.append(rows.tolist())
    assert sorted(row for rows in parts for row in rows) == list(range(53))
    assert [rows.tolist() for rows, _ in dataset.batches_of(budget)] == parts  # the same each time


def test_batches_of_tokens_mix_lengths(tokenizer):
    """Sorted ones would leave the rows of `bert.pack` half empty: two of 40 tokens share none."""
    dataset = made_up("sst", 200, tokenizer, words=lambda i: 3 + i // 10)
    lengths = [[len(ids) for ids in batch.first] for _, batch in dataset.batches_of(400)]
    assert all(max(of_batch) - min(of_batch) > 8 for of_batch in lengths[:-1])


def test_batches_of_tokens_of_chosen_rows(tokenizer):
    dataset = made_up("sst", 10, tokenizer, words=lambda i: 3)  # 5 tokens each
    batches = [rows.tolist() for rows, _ in dataset.batches_of(20, np.array([9, 1, 4, 5, 7]))]
    assert [len(rows) for rows in batches] == [4, 1]
    assert sorted(np.concatenate(batches).tolist()) == [1, 4, 5, 7, 9]


@pytest.mark.parametrize(
    ("task", "labels", "words"),
    [
        ("sst", [0, 1, 2, 4], "no row has sentiment 3; found 0, 1, 2, 4"),
        ("sst", range(5), None),
        ("para", [1], "no row has is_duplicate 0; found 1"),
        ("sts", [0.0, 0.5, 1.0], "every similarity is from 0 to 1; expected a scale from 0 to 5"),
        ("sts", [0.0, 1.1], None),
    ],
)
def test_fault_47_training_labels_on_another_scale_are_warned_of(task, labels, words):
    examples = [Example("a", ("x",), float(label)) for label in labels]
    assert odd_labels(TASKS[task], examples) == words
