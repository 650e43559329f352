"""The report as one HTML file: tables, figures with their values, and every dev error.

The page, `report.html` beside this module, holds the JavaScript that draws it from JSON.
"""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path

from config import TASKS, overall_tasks
from reporting.ensemble import dev_texts
from reporting.results import worst_errors

PAGE = Path(__file__).with_name("report.html")


def format_page(about, tables, pictures, runs):
    """The page with its data in it.

    `about` are texts: `command`, `commands`, `provenance`; `tables` maps a section to its tables.
    """
    examples = {}
    data = {
        **about,
        "tables": {
            section: [table._asdict() | {"numeric": table.numeric} for table in of_section]
            for section, of_section in tables.items()
        },
        "pictures": [picture._asdict() | {"draw": None} for picture in pictures],
        "runs": [run_data(run, examples) for run in runs],
        "examples": list(examples.values()),
    }
    text = json.dumps(data, default=as_plain)
    # Without "<", no sentence can end the script element or begin a comment.
    return PAGE.read_text(encoding="utf-8").replace("{{data}}", text.replace("<", r"\u003c"))


def as_plain(value):
    """A dataclass or an array as what JSON knows."""
    return asdict(value) if is_dataclass(value) else value.tolist()


def run_data(run, examples):
    """A run's dev scores, predictions and errors.

    Adds its dev examples to `examples`, which runs with the same dev file share.
    """
    tasks, scores = {}, {}
    for name, result in run.dev.items():
        key = (name, run.description["data"][name]["dev"]["sha256"], *result.ids)
        if not examples.get(key, {}).get("has_texts"):
            examples[key] = describe_examples(run, name)
        tasks[name] = {
            "examples": list(examples).index(key),
            "predicted": rounded(result.predictions),
            "errors": [(row, round(by, 6)) for row, by in worst_errors(TASKS[name], result)],
        }
        scores |= {f"{name} {metric}": value for metric, value in result.metrics.items()}
    scores["overall"], counted = run.overall, overall_tasks(run.dev)
    return {"name": run.name, "scores": scores, "tasks": tasks, "counted": counted}


def describe_examples(run, name):
    """Texts and labels of a task's dev examples; ids if the dev file is missing or has changed."""
    result, texts = run.dev[name], dev_texts(run, name)
    return {
        "kind": TASKS[name].kind,
        "has_texts": bool(texts),
        "texts": [texts.get(example, (example,)) for example in result.ids],
        "truth": rounded(result.labels),
    }


def rounded(values):
    """Numbers of an array (n,), as exact as fp32."""
    return [round(float(value), 6) for value in values]
