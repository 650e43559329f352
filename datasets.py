"""Task files to examples, examples to batches.

`read_task_file` checks every row of a file and says what is wrong with it and where; the order of
the batches is a pure function of (seed, step).
"""

import codecs
import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import TASKS, UserError

csv.field_size_limit(2**31 - 1)

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?: [A-Za-z0-9._-]+)*")
INTEGER = re.compile(r"[+-]?[0-9]+(?:\.0*)?")
LINE_END = re.compile(r"\r\n?|\n")
DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Example:
    """One row: its id, one or two sentences, and the label (None in a test file)."""

    id: str
    sentences: tuple
    label: float | None


@dataclass(frozen=True)
class TaskFile:
    """What was read: the examples and everything that the user should know of."""

    path: Path
    examples: list
    warnings: list
    rows: int  # data rows in the file, skipped ones included


# ---------------------------------------------------------------------------------------- reading


def read_task_file(path, task, split):
    """Read one file of `task` (a row of `TASKS`), `split` "train", "dev" or "test".

    Tab-separated with default csv quoting, UTF-8, columns found by name; labels are required in
    train and dev. Bad rows of train and dev are skipped and counted up to max(5, 1 %), beyond that
    and everywhere else a fault raises `UserError` with file and line.
    """
    path = Path(path)
    text, warnings = _decode(path)
    records = _records(path, text)
    columns = _columns(path, next(records)[1], task, split)
    examples, skipped, lines, rows = [], [], {}, 0
    for line, record in records:
        rows += 1
        try:
            example = _example(record, columns, task)
        except BadRow as problem:
            if split == "test":
                raise UserError(f"{path}:{line}: {problem}") from None
            skipped.append(f"{path}:{line}: {problem}")
            continue
        except ValueError as problem:
            raise UserError(f"{path}:{line}: {problem}") from None
        examples.append(example)
        lines.setdefault(example.id, []).append(line)
    if not rows:
        raise UserError(f"{path}: only a header; expected rows below it")
    if len(skipped) > max(5, rows // 100) or not examples:
        raise UserError(f"{skipped[0]}; {len(skipped)} of {rows} rows like this, too many to skip")
    if skipped:
        listed = "\n".join(f"  {problem}" for problem in skipped[:5])
        warnings.append(f"{path}: {len(skipped)} of {rows} rows skipped:\n{listed}")
    examples, repeated = _without_repeats(path, examples, lines, split)
    return TaskFile(path, examples, warnings + repeated, rows)


class BadRow(ValueError):
    """A row that train and dev files may do without."""


def _decode(path):
    """The file's text without byte-order mark and NULs, and warnings."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder; expected a tab-separated file")
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: a dangling link to {path.readlink()}")
        if not path.exists():
            raise UserError(f"{path}: no such file; fetch the data with: python data/prepare.py")
        if not path.is_file():
            raise UserError(f"{path}: a pipe or a device; expected a file, which is read twice")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not readable: {error.strerror}") from error
    if not content.strip(b"\0\r\n\t \xef\xbb\xbf"):
        raise UserError(f"{path}: an empty file; fetch the data with: python data/prepare.py")
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-LFS pointer, not the data; run: git lfs pull")
    body = content.removeprefix(codecs.BOM_UTF8)
    start = body.lstrip()[:15].lower()
    if start.startswith((b"<!doctype", b"<!--", b"<html", b"<head", b"<?xml")):
        raise UserError(f"{path}: an HTML page, not data; fetch it with: python data/prepare.py")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(content) - len(body)
        line = content.count(b"\n", 0, offset) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{content[offset]:02x} at offset {offset} "
            f"is not UTF-8; expected a UTF-8 file"
        ) from error
    nuls = text.count("\0")
    warnings = [f"{path}: {nuls} NUL characters removed"] if nuls else []
    return text.replace("\0", ""), warnings


def _records(path, text):
    """Yield (line, fields) for each record, the header first; blank lines are skipped.

    Raises `UserError` where a quote that was left open swallows the rows after it.
    """
    taken = []  # the lines of the record that is being read

    def lines():
        for line in io.StringIO(text, newline=None):  # "\r\n" inside a field is "\n" too
            taken.append(line)
            yield line

    reader, start, width = csv.reader(lines(), delimiter="\t"), 1, None
    for record in reader:
        if record:
            width = width or len(record)
            if _quote_left_open("".join(taken), record, width):
                raise UserError(
                    f"{path}:{start}: a quote that is not closed swallows the rows after it; "
                    f"expected its end on the same line"
                )
            yield start, record
        taken.clear()
        start = reader.line_num + 1


def _quote_left_open(raw, record, width):
    """Whether a record, `raw` in the file, is more than one: a quote that nobody closed.

    It either reaches the end of the file or ends at another row's quote. There it leaves a quote in
    the middle of a field, or a wrong number of fields, or a field that holds rows or parts of rows.
    """
    parts = [LINE_END.split(field) for field in record]
    if all(len(lines) == 1 for lines in parts) and LINE_END.search(raw):
        return False
    try:
        next(csv.reader([raw], delimiter="\t", strict=True))
    except csv.Error:
        return True
    of_several_lines = [(place, lines) for place, lines in enumerate(parts) if len(lines) > 1]
    return bool(of_several_lines) and (
        len(record) != width or any(_holds_rows(*field, width) for field in of_several_lines)
    )


def _holds_rows(place, lines, width):
    """Whether a field in column `place` holds a row of `width` fields, or parts of two.

    Parts: it begins with the end of one row and ends with the beginning of another. Judged by the
    tabs in its `lines`.
    """
    tabs = [line.count("\t") for line in lines]
    before, after = place, width - 1 - place
    begins, ends = tabs[-1] >= before, tabs[0] >= after
    return (
        max(tabs) >= width - 1
        or (begins and ends)
        or (begins and before > 1)
        or (ends and after > 1)
    )


def _columns(path, header, task, split):
    """Positions of the id, the sentences and the label (None in a test file without labels)."""
    names = [name.strip(" ").lower() for name in header]
    wanted = ["id", *task.sentences] + ([] if split == "test" else [task.label])
    missing = [name for name in wanted if names.count(name) != 1]
    if missing:
        raise UserError(
            f"{path}:1: column {', '.join(missing)} missing or repeated; "
            f"expected {', '.join(wanted)}, found {header}"
        )
    label = None if split == "test" else names.index(task.label)
    sentences = [names.index(name) for name in task.sentences]
    return {"width": len(names), "id": names.index("id"), "sentences": sentences, "label": label}


def _example(record, columns, task):
    """One record checked. Raises `BadRow` where it may be skipped, `ValueError` where not."""
    if len(record) != columns["width"]:
        raise BadRow(f"{len(record)} fields; expected {columns['width']}")
    example_id = record[columns["id"]].strip()
    if not (ID_PATTERN.fullmatch(example_id) and len(example_id) <= 80):
        raise ValueError(
            f"id {example_id[:90]!r}; expected 1 to 80 letters, digits, '.', '_', '-' "
            f"and single inner spaces"
        )
    label = None
    if columns["label"] is not None:
        label = parse_label(record[columns["label"]], task)
    return Example(example_id, tuple(record[i] for i in columns["sentences"]), label)


def parse_label(text, task):
    """The label as a number. Raises `BadRow` where it is empty, `ValueError` where it is wrong."""
    text = text.strip()
    if not text:
        raise BadRow(f"no {task.label}")
    whole = task.kind != "score"
    if (INTEGER if whole else DECIMAL).fullmatch(text):
        value = float(text)
        if task.low <= value <= task.high:
            return value
    expected = "a whole number" if whole else "a number"
    raise ValueError(
        f"{task.label} {text[:40]!r}; expected {expected} from {task.low:g} to {task.high:g}"
    )


def _without_repeats(path, examples, lines, split):
    """Examples with identical repeated rows of dev and test dropped, and warnings."""
    repeated = [name for name, places in lines.items() if len(places) > 1]
    if not repeated:
        return examples, []
    name, places = repeated[0], lines[repeated[0]]
    where = f"{path}:{places[1]}: id {name} again, first on line {places[0]}"
    if split == "train":
        return examples, [f"{where} ({len(repeated)} ids repeated; rows kept)"]
    unique = list(dict.fromkeys(examples))
    doubled = [name for name, count in Counter(e.id for e in unique).items() if count > 1]
    if doubled:
        name, places = doubled[0], lines[doubled[0]]
        on_lines = " and ".join(map(str, places))
        raise UserError(f"{path}:{places[1]}: id {name} on lines {on_lines}; expected ids once")
    return unique, [f"{where} (identical rows, written once)"]


# ------------------------------------------------------------------------------ examples to batches


@dataclass(frozen=True)
class TaskBatch:
    """Examples of one task. Sentences are int32 arrays `[CLS] … [SEP]` of unlike length."""

    ids: list
    first: list
    second: list | None  # None for a task of single sentences
    labels: torch.Tensor | None  # (batch,) fp32; None for a test file


class TaskDataset:
    """The examples of one file, tokenised once."""

    def __init__(self, task_file, task, tokenizer, max_length):
        self.task, self.path = task, task_file.path
        self.examples = task_file.examples
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

    def lengths(self):
        """Tokens of each example, both sentences together, (examples,)."""
        return np.sum([[len(ids) for ids in column] for column in self.sentences], axis=0)

    def longest(self):
        """Tokens of the longest single sequence."""
        return max(len(ids) for column in self.sentences for ids in column)

    def batches_of(self, batch_tokens, rows=None):
        """Yield (rows, `TaskBatch`) of at most `batch_tokens` tokens, or of one example.

        All examples, or those at `rows`, in a fixed order that mixes lengths: sentences of unlike
        length fill the rows of `bert.pack` better than those of one length.
        """
        lengths, order = self.lengths(), np.random.default_rng(0).permutation(len(self))
        if rows is not None:
            order = order[np.isin(order, rows)]
        while len(order):
            tokens = np.cumsum(lengths[order])
            count = max(1, int(np.searchsorted(tokens, batch_tokens, side="right")))
            yield order[:count], self.batch(order[:count])
            order = order[count:]


class MultitaskBatches:
    """`batches[step]`: one batch of each task, a pure function of (seed, step).

    `batch_sizes` is one number for all tasks or a dict by task.
    Each task goes through its examples in passes, with a fresh permutation for each; a batch that
    reaches the end of one pass is filled from the next, so that all batches are of one size.
    """

    def __init__(self, datasets, batch_sizes, seed, shares=None):
        if isinstance(batch_sizes, int):
            batch_sizes = dict.fromkeys(datasets, batch_sizes)
        self.datasets, self.batch_sizes, self.seed = datasets, batch_sizes, seed
        # The rows of each task's batch that this process takes: all of them by default.
        self.shares = shares or dict.fromkeys(datasets, slice(None))
        self._permutations = {}

    def __getitem__(self, step):
        return {
            name: dataset.batch(self.rows(name, step)[self.shares[name]])
            for name, dataset in self.datasets.items()
        }

    def rows(self, name, step):
        """Rows of task `name` in the batch of `step` (counted from 0), (its batch size,)."""
        size = self.batch_sizes[name]
        positions = np.arange(step * size, (step + 1) * size)
        passes, offsets = np.divmod(positions, len(self.datasets[name]))
        return np.array(
            [self.permutation(name, p)[i] for p, i in zip(passes, offsets, strict=True)]
        )

    def rows_until(self, name, steps):
        """The rows of task `name` that this process takes in the first `steps` batches, sorted."""
        rows = [self.rows(name, step)[self.shares[name]] for step in range(steps)]
        return np.unique(np.concatenate(rows)) if rows else np.arange(0)

    def permutation(self, name, number):
        """Order of pass `number` of a task; the last one is kept."""
        kept = self._permutations.get(name)
        if kept is None or kept[0] != number:
            task_number = list(TASKS).index(name)
            generator = np.random.default_rng([self.seed, task_number, number])
            kept = (number, generator.permutation(len(self.datasets[name])))
            self._permutations[name] = kept
        return kept[1]

    def largest(self):
        """Batches in one pass of the task that takes most of them."""
        return max(-(-len(d) // self.batch_sizes[name]) for name, d in self.datasets.items())
