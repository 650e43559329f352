"""Files to batches: what is read, in which order it is trained on and evaluated."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config import TASKS, UserError
from datasets import Example, MultitaskBatches, TaskDataset, TaskFile, parse_label, read_task_file
from tokenizer import BertTokenizer

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"


@pytest.fixture(scope="module")
def tokenizer(toy_vocab_folder):
    """The toy vocabulary's tokenizer."""
    return BertTokenizer.from_pretrained(toy_vocab_folder)


def write(path, header, *rows):
    """A tab-separated file with csv quoting, as the course's."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    return path


def made_up(name, count, tokenizer, words=lambda i: 1 + i % 7):
    """A dataset of `count` examples; example i has `words(i)` words a sentence."""
    task = TASKS[name]
    sentences = [("good " * words(i),) * len(task.sentences) for i in range(count)]
    examples = [Example(f"id{i}", s, float(i % 2)) for i, s in enumerate(sentences)]
    return TaskDataset(TaskFile(Path(name), examples, [], count), task, tokenizer, 40)


# -------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_every_row_of_the_sample_is_read_as_the_courses_reader_reads_it(name, split):
    task = TASKS[name]
    path = SAMPLE / task.file_name(split)
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    header = [column.strip().lower() for column in header]
    found = read_task_file(path, task, split)
    assert (found.rows, len(found.examples), found.warnings) == (len(rows), len(rows), [])
    for example, row in zip(found.examples, rows, strict=True):
        values = dict(zip(header, row, strict=True))
        assert example.id == values["id"]
        assert example.sentences == tuple(values[column] for column in task.sentences)
        assert example.label == (None if split == "test" else float(values[task.label]))


def test_similarity_labels_keep_their_decimals(tmp_path):
    """The starter cuts them to integers."""
    header = ["id", "sentence1", "sentence2", "similarity"]
    rows = [["a", "x", "y", "3.75"], ["b", "x", "y", "0.0"], ["c", "x", "y", "5"]]
    found = read_task_file(write(tmp_path / "x.csv", header, *rows), TASKS["sts"], "train")
    assert [example.label for example in found.examples] == [3.75, 0.0, 5.0]


def test_columns_go_by_name_in_any_order_and_others_are_left_aside(tmp_path):
    header = ["sentiment", "sentence", "note", "ID "]
    path = write(tmp_path / "x.csv", header, ["3", "a film", "?", "q1"], ["0.0", "b", "", "q2"])
    found = read_task_file(path, TASKS["sst"], "dev")
    assert found.examples == [Example("q1", ("a film",), 3.0), Example("q2", ("b",), 0.0)]


def test_the_courses_odd_test_header_is_read(tmp_path):
    path = write(tmp_path / "x.csv", ["0", "", "id", "sentence"], ["1", "0.0", "a1", " A film ."])
    found = read_task_file(path, TASKS["sst"], "test")
    assert found.examples == [Example("a1", (" A film .",), None)]


def test_labels_in_a_test_file_are_left_aside(tmp_path):
    path = write(tmp_path / "x.csv", ["id", "sentence", "sentiment"], ["a", "x", "77"])
    assert read_task_file(path, TASKS["sst"], "test").examples[0].label is None


def test_quoted_fields_may_hold_tabs_quotes_and_line_breaks(tmp_path):
    text = 'a "good"\tfilm\nand more'
    path = write(tmp_path / "x.csv", ["id", "sentence", "sentiment"], ["a", text, "1"])
    assert read_task_file(path, TASKS["sst"], "train").examples[0].sentences == (text,)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("sst", "3", 3.0), ("sst", " 3.0 ", 3.0), ("sst", "+4", 4.0), ("para", "1.0", 1.0),
        ("sts", "2.875", 2.875), ("sts", "1e-1", 0.1), ("sts", ".5", 0.5), ("cfimdb", "1", 1.0),
    ],
)  # fmt: skip
def test_labels_that_are_right(name, text, value):
    assert parse_label(text, TASKS[name]) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sst", "5"), ("sst", "-1"), ("sst", "2.5"), ("sst", "３"), ("sst", "1_0"), ("sst", "two"),
        ("para", "2"), ("para", "nan"), ("sts", "nan"), ("sts", "inf"), ("sts", "5.01"),
        ("sts", "-0.1"), ("cfimdb", "2"),
    ],
)  # fmt: skip
def test_labels_that_are_wrong(name, text):
    with pytest.raises(ValueError, match="expected a"):
        parse_label(text, TASKS[name])


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"no such file.*prepare\.py"):
        read_task_file(tmp_path / "x.csv", TASKS["sst"], "train")


# ---------------------------------------------------------------------------- examples to batches


def test_a_batch_holds_what_was_asked_for_in_that_order(tokenizer):
    pairs = made_up("para", 6, tokenizer)
    batch = pairs.batch([4, 1])
    assert batch.ids == ["id4", "id1"]
    assert [len(ids) for ids in batch.first] == [len(ids) for ids in batch.second] == [7, 4]
    assert batch.labels.tolist() == [0.0, 1.0]
    assert batch.labels.dtype == torch.float32
    assert made_up("sst", 3, tokenizer).batch([0]).second is None


def test_a_test_file_has_no_labels(tokenizer):
    examples = [Example("a", ("good",), None), Example("b", ("bad",), None)]
    dataset = TaskDataset(TaskFile(Path("x"), examples, [], 2), TASKS["sst"], tokenizer, 40)
    assert dataset.labels is None
    assert dataset.batch([1]).labels is None


@pytest.fixture
def batches(tokenizer):
    """Training batches of 4 from tasks of 10, 7 and 3 examples."""
    sizes = {"sst": 10, "para": 7, "sts": 3}
    return MultitaskBatches({n: made_up(n, k, tokenizer) for n, k in sizes.items()}, 4, seed=5)


def test_order_is_a_pure_function_of_seed_and_step(batches):
    """A continued run begins in the middle: it has to meet the very batches of an unbroken one."""
    steps = [{name: batches.rows(name, step).tolist() for name in batches.datasets}
             for step in range(12)]  # fmt: skip
    fresh = MultitaskBatches(batches.datasets, 4, seed=5)
    for step in (11, 0, 7, 7, 3):
        assert {name: fresh.rows(name, step).tolist() for name in fresh.datasets} == steps[step]
    other = MultitaskBatches(batches.datasets, 4, seed=6)
    assert other.rows("sst", 0).tolist() != steps[0]["sst"]


def test_torchs_and_numpys_generators_do_not_touch_the_order(batches):
    expected = batches.rows("sst", 3).tolist()
    torch.manual_seed(1)
    np.random.seed(1)
    assert MultitaskBatches(batches.datasets, 4, seed=5).rows("sst", 3).tolist() == expected


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
def test_each_pass_sees_every_example_once_in_a_fresh_order(batches, name):
    size = len(batches.datasets[name])
    rows = np.concatenate([batches.rows(name, step) for step in range(size)])  # 4 passes
    passes = rows.reshape(4, size)
    assert all(sorted(one) == list(range(size)) for one in passes.tolist())
    assert len({tuple(one) for one in passes.tolist()}) > 1


def test_a_batch_over_the_end_of_a_pass_goes_on_with_the_next(batches):
    """All batches are of one size; none is cut short, nothing is left out."""
    last = batches.rows("sst", 2).tolist()
    assert last == [*batches.permutation("sst", 0)[8:], *batches.permutation("sst", 1)[:2]]
    assert all(len(batches.rows(name, step)) == 4 for name in batches.datasets for step in range(9))
    assert sorted(batches.rows("sts", 0)[:3].tolist()) == [0, 1, 2]  # a task smaller than a batch


def test_tasks_are_shuffled_apart_and_by_their_own_name(tokenizer):
    datasets = {name: made_up(name, 30, tokenizer) for name in ("sst", "para")}
    both = MultitaskBatches(datasets, 4, seed=5)
    assert both.permutation("sst", 0).tolist() != both.permutation("para", 0).tolist()
    alone = MultitaskBatches({"para": datasets["para"]}, 4, seed=5)
    assert alone.rows("para", 2).tolist() == both.rows("para", 2).tolist()


def test_a_step_has_one_batch_of_each_task(batches):
    step = batches[1]
    assert {name: len(batch.ids) for name, batch in step.items()} == {"sst": 4, "para": 4, "sts": 4}
    assert step["sst"].ids == [f"id{row}" for row in batches.rows("sst", 1)]


def test_tasks_may_have_batches_of_their_own_size(batches):
    """Each task still goes through its own permutations, in pieces of its own size."""
    sizes = {"sst": 4, "para": 5, "sts": 1}
    own = MultitaskBatches(batches.datasets, sizes, seed=5)
    assert {name: len(batch.ids) for name, batch in own[2].items()} == sizes
    order = np.concatenate([batches.permutation("para", number) for number in (0, 1, 2)])
    rows = np.concatenate([own.rows("para", step) for step in range(4)])
    assert rows.tolist() == order[:20].tolist()
    assert own.largest() == 3  # sst: 10 in pieces of 4, sts: 3 in pieces of 1


def test_shares_of_several_processes_are_the_whole_batch(batches):
    whole = batches[3]
    shares = [
        MultitaskBatches(batches.datasets, 4, 5, dict.fromkeys(whole, slice(start, start + 2)))[3]
        for start in (0, 2)
    ]
    for name, batch in whole.items():
        assert [i for share in shares for i in share[name].ids] == batch.ids


def test_largest_is_the_number_of_batches_of_the_largest_task(batches):
    assert batches.largest() == 3  # 10 examples in batches of 4


@pytest.mark.parametrize("name", ["sst", "para"])
@pytest.mark.parametrize("budget", [1, 20, 64, 10_000])
def test_batches_of_tokens_cover_every_row_once_within_the_budget(tokenizer, name, budget):
    """Each as large as the budget lets it: the next example would not have fitted."""
    dataset = made_up(name, 53, tokenizer, words=lambda i: 1 + (i * i) % 17)
    parts, before = [], None
    for rows, batch in dataset.batches_of(budget):
        lengths = dataset.lengths()[rows]
        assert batch.ids == [f"id{row}" for row in rows]
        assert len(rows) == 1 or lengths.sum() <= budget
        assert before is None or before + lengths[0] > budget
        before = lengths.sum()
        parts.append(rows.tolist())
    seen = [row for rows in parts for row in rows]
    assert sorted(seen) == list(range(53))
    assert [rows.tolist() for rows, _ in dataset.batches_of(budget)] == parts  # the same each time


def test_batches_of_tokens_mix_lengths(tokenizer):
    """Sorted ones would leave the rows of `bert.pack` half empty: two of 40 tokens share none."""
    dataset = made_up("sst", 200, tokenizer, words=lambda i: 3 + i // 10)
    lengths = [dataset.lengths()[rows] for rows, _ in dataset.batches_of(400)]
    assert all(of_batch.max() - of_batch.min() > 8 for of_batch in lengths[:-1])


def test_batches_of_tokens_of_some_rows_alone(tokenizer):
    dataset = made_up("sst", 10, tokenizer, words=lambda i: 3)  # 5 tokens each
    batches = [rows.tolist() for rows, _ in dataset.batches_of(20, np.array([9, 1, 4, 5, 7]))]
    assert [len(rows) for rows in batches] == [4, 1]
    assert sorted(np.concatenate(batches).tolist()) == [1, 4, 5, 7, 9]


def test_lengths_count_both_sentences(tokenizer):
    examples = [Example("a", ("good", "good bad"), 1.0)]
    pair = TaskDataset(TaskFile(Path("x"), examples, [], 1), TASKS["para"], tokenizer, 40)
    assert pair.lengths().tolist() == [3 + 4]


def test_examples_are_frozen(tokenizer):
    """A batch that changed an example would change every later pass."""
    example = Example("a", ("good",), 1.0)
    assert replace(example, id="b") != example
    with pytest.raises(AttributeError):
        example.label = 2.0
