"""Task files to examples, and examples to batches.

`read_task_file` checks every row and names the file and line of each fault. The order of the
batches is a pure function of (seed, step).
"""

import codecs
import csv
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import REPOSITORY, TASKS, UserError

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?: [A-Za-z0-9._-]+)*")
INTEGER = re.compile(r"[+-]?[0-9]+(?:\.0*)?")
DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
FETCH = f"fetch the data with: python {os.path.relpath(REPOSITORY / 'data/prepare.py')}"
FOREIGN = {  # how files of other kinds begin, in lower case
    (b"version https://git-lfs",): "a git-LFS pointer, not the data; run: git lfs pull",
    (b"<!doctype", b"<!--", b"<html", b"<head", b"<?xml"): f"an HTML page, not data; {FETCH}",
    (b"\x1f\x8b",): "a gzip file; unpack it first",
    (b"pk\x03\x04",): "a zip or Excel file; expected tab-separated UTF-8 text",
    (b"\xff\xfe", b"\xfe\xff"): "UTF-16 text; save it as UTF-8",
}


@dataclass(frozen=True)
class Example:
    """One row: its id, one or two sentences, and the label (None in a test file)."""

    id: str
    sentences: tuple
    label: float | None


@dataclass(frozen=True)
class TaskFile:
    """The examples of one file, and the warnings about it."""

    path: Path
    examples: list
    warnings: list
    rows: int  # data rows in the file, skipped ones included


class BadRow(ValueError):
    """A faulty row that may be skipped in train and dev files."""


def read_task_file(path, task, split):
    """Read one file of `task` (a row of `TASKS`); `split` is "train", "dev" or "test".

    The format: UTF-8, tab-separated with default csv quoting, columns found by name, labels
    required in train and dev. Train and dev files may have up to max(5, 1 %) incomplete rows, which
    are skipped and counted. NULs and harmless repeats of an id are warned of. Every other fault
    raises `UserError` with the file and its line.
    """
    path = Path(path)
    text, warnings = _decode(path)
    records = _records(path, text)
    line, header = next(records)
    columns = _columns(f"{path}:{line}", header, task, split)
    numbered, skipped = [], []
    for line, record in records:
        try:
            numbered.append((line, _example(record, len(header), columns, task)))
        except ValueError as error:
            skipped.append(f"{path}:{line}: {error}")
            if split == "test" or not isinstance(error, BadRow):
                raise UserError(skipped[-1]) from None
    rows = len(numbered) + len(skipped)
    if not rows:
        raise UserError(f"{path}: only a header; expected rows below it")
    if len(skipped) > max(5, rows // 100) or not numbered:
        raise UserError(f"{skipped[0]}; {len(skipped)} of {rows} rows like this, too many to skip")
    if skipped:
        listed = "\n".join(f"  {problem}" for problem in skipped[:5])
        warnings.append(f"{path}: {len(skipped)} of {rows} rows skipped:\n{listed}")
    examples, repeated = _without_repeats(path, numbered, split)
    return TaskFile(path, examples, warnings + repeated, rows)


def odd_labels(task, examples):
    """What is odd about training labels: another scale, or a class without examples; else None."""
    labels = [example.label for example in examples]
    low, high = min(labels), max(labels)
    if task.kind == "score":
        is_narrow = high - low <= (task.high - task.low) / 5
        expected = f"expected a scale from {task.low:g} to {task.high:g}"
        return f"every {task.label} is from {low:g} to {high:g}; {expected}" if is_narrow else None
    found = sorted({int(label) for label in labels})
    missing = [c for c in range(int(task.low), int(task.high) + 1) if c not in found]
    missing, found = (", ".join(map(str, classes)) for classes in (missing, found))
    return f"no row has {task.label} {missing}; found {found}" if missing else None


def _read_bytes(path):
    """The content of a file. Raises `UserError` where there is no regular, readable file."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder; expected a tab-separated file")
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: a dangling link to {path.readlink()}")
        if not path.exists():
            raise UserError(f"{path}: no such file; {FETCH}")
        if not path.is_file():
            raise UserError(f"{path}: a pipe or a device; expected a file that can be read twice")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not readable: {error.strerror}") from error


def foreign_kind(content):
    """What the beginning of a file looks like if it is not plain UTF-8 text, else None."""
    beginning = content[:1000].lstrip()[:30].lower()
    return next((kind for signs, kind in FOREIGN.items() if beginning.startswith(signs)), None)


def _decode(path):
    """A file's text without byte-order mark and NULs, and warnings."""
    content = _read_bytes(path)
    if not content.strip(b"\0\r\n\t " + codecs.BOM_UTF8):
        raise UserError(f"{path}: an empty file; {FETCH}")
    body = content.removeprefix(codecs.BOM_UTF8)
    if kind := foreign_kind(body):
        raise UserError(f"{path}: {kind}")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(content) - len(body)
        line = content.count(b"\n", 0, offset) + 1
        byte = f"byte 0x{content[offset]:02x} at offset {offset}"
        raise UserError(f"{path}:{line}: {byte} is not UTF-8; expected a UTF-8 file") from error
    nuls = text.count("\0")
    return text.replace("\0", ""), [f"{path}: {nuls} NUL characters removed"] if nuls else []


def csv_reader(lines, delimiter, strict=False):
    """As `csv.reader`, without its limit of 131,072 characters in a field."""
    csv.field_size_limit(2**31 - 1)
    return csv.reader(lines, delimiter=delimiter, strict=strict)


def _records(path, text):
    """Yield (line, fields) for each record, the header first; blank lines are skipped.

    Raises `UserError` at a quote that is never closed: it would swallow the rows after it.
    """
    lines = io.StringIO(text + "\n", newline=None).readlines()  # every line now ends in "\n"
    reader, start, width = csv_reader(lines, "\t"), 0, 0
    for record in reader:
        if record:
            width = width or len(record)
            if _quote_left_open("".join(lines[start : reader.line_num]), record, width):
                fault = "a quote that is not closed swallows the rows after it"
                raise UserError(f"{path}:{start + 1}: {fault}; expected its end on the same line")
            yield start + 1, record
        start = reader.line_num


def _quote_left_open(raw, record, width):
    """Whether an unclosed quote made one record of several rows; `raw` is the record's text.

    Such a quote reaches the end of the file, or ends at a quote of a later row. Its signs: csv's
    strict mode refuses the record; the number of fields is wrong; one line of a field has as many
    tabs as a whole row; or the first line of a field has as many tabs as follow the field in a row,
    or its last line as many as precede it. One of these last two signs alone needs two tabs.
    """
    fields = [(place, text.split("\n")) for place, text in enumerate(record) if "\n" in text]
    if not fields:
        return False
    try:
        next(csv_reader([raw], "\t", strict=True))
    except csv.Error:
        return True
    for before, lines in fields:
        after, tabs = width - 1 - before, [line.count("\t") for line in lines]
        ends, starts = tabs[0] >= after, tabs[-1] >= before
        spans_rows = (ends and starts) or (ends and after > 1) or (starts and before > 1)
        if len(record) != width or max(tabs) >= width - 1 or spans_rows:
            return True
    return False


def _columns(place, header, task, split):
    """Positions of the id, the sentences and, except in test files, the label."""
    names = [name.strip(" ").lower() for name in header]
    wanted = ["id", *task.sentences] + ([] if split == "test" else [task.label])
    missing = [name for name in wanted if names.count(name) != 1]
    if missing:
        expected = f"expected {', '.join(wanted)}, found {header}"
        if len(header) == 1 and set(",;") & set(header[0]):
            expected += " (the file looks separated by commas or semicolons; expected tabs)"
        raise UserError(f"{place}: column {', '.join(missing)} missing or repeated; {expected}")
    return [names.index(name) for name in wanted]


def _example(record, width, columns, task):
    """One record checked. Raises `BadRow` where it may be skipped, `ValueError` where not."""
    if len(record) != width:
        raise BadRow(f"{len(record)} fields; expected {width}")
    example_id, *values = (record[column] for column in columns)
    example_id = example_id.strip()
    if not (ID_PATTERN.fullmatch(example_id) and len(example_id) <= 80):
        expected = "1 to 80 letters, digits, '.', '_', '-' and single inner spaces"
        raise ValueError(f"id {example_id[:90]!r}; expected {expected}")
    label = parse_label(values.pop(), task) if len(values) > len(task.sentences) else None
    return Example(example_id, tuple(values), label)


def parse_label(text, task):
    """The label as a number. Raises `BadRow` where it is empty, `ValueError` where it is wrong."""
    text = text.strip()
    if not text:
        raise BadRow(f"no {task.label}")
    is_score = task.kind == "score"
    is_number = (DECIMAL if is_score else INTEGER).fullmatch(text)
    if is_number and task.low <= float(text) <= task.high:
        return float(text)
    expected = f"{'a' if is_score else 'a whole'} number from {task.low:g} to {task.high:g}"
    raise ValueError(f"{task.label} {text[:40]!r}; expected {expected}")


def _without_repeats(path, numbered, split):
    """The examples of (line, example) pairs, and a warning where an id occurs again.

    Identical rows of dev and test files are dropped; different rows of one id are an error there.
    """
    first, repeated = {}, {}  # id -> line and example of its first row; id -> where it is again
    for line, example in numbered:
        first_line, original = first.setdefault(example.id, (line, example))
        where = f"{path}:{line}: id {example.id}"
        if split != "train" and example != original:
            raise UserError(f"{where} on lines {first_line} and {line}; expected each id once")
        if line != first_line:
            repeated.setdefault(example.id, f"{where} again, first on line {first_line}")
    examples, warnings = [example for _, example in numbered], list(repeated.values())[:1]
    if split == "train":
        return examples, [f"{w} ({len(repeated)} ids repeated; rows kept)" for w in warnings]
    return list(dict.fromkeys(examples)), [f"{w} (identical rows, written once)" for w in warnings]


# ------------------------------------------------------------------------------ examples to batches


@dataclass(frozen=True)
class TaskBatch:
    """Examples of one task. Sentences are int32 arrays `[CLS] … [SEP]` of different lengths."""

    ids: list
    first: list
    second: list | None  # None for a task of single sentences
    labels: torch.Tensor | None  # (batch,) fp32; None for a test file

    def columns(self):
        """The sentences by role, "first" and, of a pair task, "second"."""
        return {"first": self.first} | ({"second": self.second} if self.second else {})


class TaskDataset:
    """Examples of a task, tokenised once."""

    def __init__(self, examples, task, tokenizer, max_length):
        self.task, self.examples = task, examples
        columns = zip(*(example.sentences for example in self.examples), strict=True)
        self.sentences = [tokenizer(texts, max_length) for texts in columns]
        labels = [example.label for example in self.examples]
        self.labels = None if None in labels else torch.tensor(labels, dtype=torch.float32)

    def __len__(self):
        return len(self.examples)

    def batch(self, rows):
        """The examples at `rows` (integers) as a `TaskBatch`."""
        first, *second = [[column[row] for row in rows] for column in self.sentences]
        labels = None if self.labels is None else self.labels[torch.as_tensor(rows)]
        ids = [self.examples[row].id for row in rows]
        return TaskBatch(ids, first, second[0] if second else None, labels)

    def longest(self):
        """Tokens of the longest single sequence."""
        return max(len(ids) for column in self.sentences for ids in column)

    def batches_of(self, batch_tokens, rows=None):
        """Yield (rows, `TaskBatch`) of at most `batch_tokens` tokens, or of one example.

        All examples, or those at `rows`, in a fixed order that mixes lengths: sentences of
        different lengths fill the rows of `bert.pack` better than sentences of one length.
        """
        lengths = np.sum([[len(ids) for ids in column] for column in self.sentences], axis=0)
        order = np.random.default_rng(0).permutation(len(self))
        if rows is not None:
            order = order[np.isin(order, rows)]
        while len(order):
            tokens = np.cumsum(lengths[order])
            count = max(1, int(np.searchsorted(tokens, batch_tokens, side="right")))
            yield order[:count], self.batch(order[:count])
            order = order[count:]


class MultitaskBatches:
    """`batches[index]`: one batch of each task, a pure function of (seed, index).

    Each task passes through its examples again and again, in a fresh order each time. A batch at
    the end of a pass is filled from the next one, so none is short. With `--accumulate N` an
    optimiser step takes N of them.
    `batch_sizes` is one number, or a list: for each epoch a dict from task to size, the last for
    all later epochs. An epoch has `epoch_length` batches. `shares` has, in the same form, the slice
    of each batch that this process takes, by default the whole.
    """

    def __init__(self, datasets, batch_sizes, seed, shares=None, epoch_length=1):
        if isinstance(batch_sizes, int):
            batch_sizes = [dict.fromkeys(datasets, batch_sizes)]
        self.datasets, self.batch_sizes, self.seed = datasets, batch_sizes, seed
        self.shares = shares or [dict.fromkeys(datasets, slice(None)) for _ in batch_sizes]
        self.epoch_length = epoch_length
        self._permutations = {}  # task -> (number, permutation) of its latest pass

    def __getitem__(self, index):
        return {n: dataset.batch(self.own_rows(n, index)) for n, dataset in self.datasets.items()}

    def epoch_of(self, index):
        """The index in `batch_sizes` and `shares` for batch number `index`."""
        return min(index // self.epoch_length, len(self.batch_sizes) - 1)

    def rows(self, name, index):
        """Rows of task `name` in batch number `index` (counted from 0), (its batch size,)."""
        epoch = self.epoch_of(index)
        *before, size = (sizes[name] for sizes in self.batch_sizes[: epoch + 1])
        start = sum(before) * self.epoch_length + size * (index - epoch * self.epoch_length)
        positions = np.arange(start, start + size)
        places = zip(*np.divmod(positions, len(self.datasets[name])), strict=True)
        return np.array([self.permutation(name, number)[place] for number, place in places])

    def own_rows(self, name, index):
        """Of these rows those that this process takes."""
        return self.rows(name, index)[self.shares[self.epoch_of(index)][name]]

    def rows_until(self, name, count):
        """The rows of task `name` that this process takes in the first `count` batches, sorted."""
        rows = [self.own_rows(name, index) for index in range(count)]
        return np.unique(np.concatenate(rows)) if rows else np.arange(0)

    def permutation(self, name, number):
        """The order of pass `number` (counted from 0) of task `name`, (examples,)."""
        if self._permutations.get(name, (None,))[0] != number:
            generator = np.random.default_rng([self.seed, list(TASKS).index(name), number])
            self._permutations[name] = number, generator.permutation(len(self.datasets[name]))
        return self._permutations[name][1]
