"""The user's own texts: a file of them, and the table of what a run predicts for each."""

import codecs
import contextlib
import csv
import itertools
import sys
from typing import NamedTuple

import numpy as np

from config import PAIR, SENTENCE, TASKS, UserError
from datasets import csv_reader, foreign_kind, parse_label

CHUNK_ROWS = 4096  # rows that are in memory at a time


class Text(NamedTuple):
    """A row of the user's file."""

    sentences: tuple  # one or two
    labels: dict  # each label column of the file -> field, "" where the row ends before it


def read_chunks(path):
    """Yield the rows of a file in lists of up to `CHUNK_ROWS`, each row a `Text`.

    `path` "-" is standard input. If the first line, separated by tabs or commas, names `sentence`
    or `sentence1` and `sentence2`, these columns are read, and the tasks' label columns. In any
    other file each line is a sentence, or two with a tab between. Raises `UserError` with file and
    line.
    """
    name = "standard input" if path == "-" else path
    texts = _read_texts(name, _lines(path, name))
    while chunk := list(itertools.islice(texts, CHUNK_ROWS)):
        yield chunk


def _lines(path, name):
    """Yield the lines of a file as text, one after the other."""
    try:
        source = contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")  # noqa: SIM115
        with source as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if number == 1 and (kind := foreign_kind(line)):
                    raise UserError(f"{name}: {kind}")
                yield line.decode("utf-8").replace("\0", "")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise UserError(f"{name}:{number}: {byte} is not UTF-8; expected UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{name}: not readable: {error.strerror}") from error


def _read_texts(name, lines):
    """Yield each row of `lines` as a `Text`; `name` is the file's, for errors."""
    first = next(lines, None)
    if first is None:
        raise UserError(f"{name}: an empty file; expected a sentence on each line")
    if "\r" in first.rstrip("\r\n"):
        raise UserError(f"{name}:1: a carriage return inside the line; expected \\n at line ends")
    for delimiter in "\t,":
        header = [field.strip().lower() for field in next(csv_reader([first], delimiter), [])]
        for columns in (PAIR, SENTENCE):
            if set(columns) <= set(header):
                labels = {task.label for task in TASKS.values()} & set(header)
                labels = {label: header.index(label) for label in labels}
                places = [header.index(column) for column in columns]
                yield from _columns(name, lines, delimiter, places, labels)
                return
    width = min(2, 1 + first.count("\t"))
    for number, line in enumerate(itertools.chain([first], lines), start=1):
        texts = tuple(line.rstrip("\r\n").split("\t"))
        if len(texts) != width:
            expected = "one sentence, or two with a tab between, as in line 1"
            raise UserError(f"{name}:{number}: {len(texts)} fields; expected {expected}")
        yield Text(texts, {})


def _columns(name, lines, delimiter, places, labels):
    """Yield a `Text` of each record below the header: where its sentences and labels stand."""
    reader, line = csv_reader(lines, delimiter, strict=True), 2
    try:
        for record in reader:
            if record:
                if len(record) <= max(places):
                    fault = f"{len(record)} fields; expected at least {max(places) + 1}"
                    raise UserError(f"{name}:{line}: {fault}")
                known = {label: "".join(record[i : i + 1]) for label, i in labels.items()}
                yield Text(tuple(record[place] for place in places), known)
            line = reader.line_num + 2
    except csv.Error as error:
        fault = (
            'a quote (") without its end, or text after its end; in a quoted text " is written ""'
        )
        if "new-line" in str(error):
            fault = "a carriage return inside the line; expected \\n at line ends"
        raise UserError(f"{name}:{line}: {fault}") from error


def labelled_rows(chunk, task, result):
    """Predictions and labels, (2, n), of those `Text`s that have a valid label for the task."""
    pairs = []
    for text, prediction in zip(chunk, result.predictions, strict=True):
        with contextlib.suppress(ValueError):
            pairs.append((prediction, parse_label(text.labels[task.label], task)))
    return np.array(pairs, dtype=np.float64).reshape(-1, 2).T


def table_header(sentences, tasks):
    """The names of the columns for rows of one or two sentences; `tasks` are rows of `TASKS`."""
    scores = [[f"{task.name}_score_{i}" for i in range(task.num_classes)] for task in tasks]
    named = zip(tasks, scores, strict=True)
    columns = [column for task, of_task in named for column in (task.name, *of_task)]
    return [*(SENTENCE if sentences == 1 else PAIR), *columns]


def table_rows(texts, results):
    """Yield the rows of a chunk: sentences, then prediction and scores of each task.

    `results` maps tasks, rows of `TASKS`, to their `TaskResult`s.
    """
    for row, sentences in enumerate(texts):
        cells = list(sentences)
        for task, result in results.items():
            cells += [task.format(result.predictions[row]), *result.scores[row]]
        yield cells
