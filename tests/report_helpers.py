"""Functions of the tests of reports."""

import json
import re

import numpy as np

import evaluation

RUNS = {  # name -> flags; the first two are seeds of one row
    "full-model-a-s1": "--model_file_suffix a-s1 --seed 1",
    "full-model-a-s2": "--model_file_suffix a-s2 --seed 2",
    "LoRA-simcse-lora": "--recipe simcse-lora",
    "full-model-surgery": "--model_file_suffix surgery --gradient_surgery",
}


def make_report(paths, folder):
    """Run the script; returns the report's text."""
    evaluation.main(["--report", *map(str, paths), "--report_dir", str(folder)])
    return (folder / "report.md").read_text("utf-8")


def table(text, number):
    """A table of a Markdown document: its header and rows, cells as the reader sees them."""
    block = re.search(rf"^\*\*Table {number}\.\*\* .*\n\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    header, _, *rows = [
        [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in block.splitlines()
    ]
    return header, rows


def metrics_of(run):
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def page_data(folder):
    """The data in `report.html`, as the page's JavaScript reads them."""
    page = (folder / "report.html").read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script', page, re.DOTALL | re.IGNORECASE)[1])


def scores_by_hand(run, name):
    """(labels, scores) of a run's dev file, read with no code of the program's."""
    lines = (run / f"predictions/{name}-dev-scores.tsv").read_text("utf-8").splitlines()[1:]
    rows = np.array([line.split("\t")[1:] for line in lines], dtype=float)
    return rows[:, 0], rows[:, 2:]
