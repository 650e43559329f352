"""Bias: a run's predictions for sentences that differ in one word for a group of people.

    python -m studies.bias_probe runs/LoRA

It measures what the paper's ethics section discusses: sentiment of neutral statements, sentiment
when only a word such as a nationality or a religion changes, and paraphrase and similarity of pairs
that differ in such a word, beside words that name no group. Prints Markdown. The same run gives the
same report.
"""

import shlex
import sys
import tomllib
from itertools import permutations
from pathlib import Path

import numpy as np

from config import PRECISIONS, UserError
from evaluation import predict_sentences
from reporting.ensemble import FinishedRun
from reporting.report import Table, format_table, provenance
from runtime.device import Compute, select_device
from runtime.files import write_file
from runtime.script import run_script
from training.flags import FlagParser, add_device_flags
from training.run_folder import RunFolder
from training.saved_models import load_run

# The statements, templates, words and explanations; PAIR_SETS: category -> templates and words.
TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
NEUTRAL, TEMPLATES, WORDS = TEXTS["neutral"], TEXTS["templates"], TEXTS["words"]
CONTROL = "control: no group"
PAIR_SETS = {category: (TEXTS["pairs"], words) for category, words in WORDS.items()}
PAIR_SETS["control: weekdays"] = (TEXTS["day_templates"], TEXTS["days"])
decimals = "{:z.2f}".format  # never "-0.00"


# ------------------------------------------------------------------------------------ the measures


def expected_grades(scores):
    """Mean grade under the probabilities, (n, 5) -> (n,), from 0 to 4."""
    return scores @ np.arange(scores.shape[1])


def measure_groups(model, compute):
    """Mean grade over the templates of each word: `{category: {word: grade}}`."""

    def grade(word):
        texts = [(template.format(word=word),) for template in TEMPLATES]
        return expected_grades(predict_sentences(model, "sst", texts, compute).scores).mean()

    return {category: {word: grade(word) for word in words} for category, words in WORDS.items()}


def pairs_of(templates, words):
    """Pairs of sentences that differ in one of `words`, in both orders."""
    return [
        (template.format(word=first), template.format(word=second))
        for template in templates
        for first, second in permutations(words, 2)
    ]


# ------------------------------------------------------------------------------------- the tables


def neutral_table(model, compute):
    """Sentiment of the neutral statements."""
    result = predict_sentences(model, "sst", [(text,) for text in NEUTRAL], compute)
    grades = expected_grades(result.scores)
    cells = [*zip(NEUTRAL, map(str, result.predictions), map(decimals, grades), strict=True)]
    mean, lowest, highest = map(decimals, (grades.mean(), grades.min(), grades.max()))
    caption = f"Sentiment of {len(NEUTRAL)} neutral statements; 2 is neutral. Mean expected grade "
    caption += f"{mean}, from {lowest} to {highest}."
    return Table(caption, ["statement", "predicted grade", "expected grade"], cells)


def words_table(measured):
    """Expected grade of each group word; `measured` comes from `measure_groups`."""
    cells = []
    for category, grades in measured.items():
        mean = np.mean([*grades.values()])
        cells += [[category, w, decimals(g), decimals(g - mean)] for w, g in grades.items()]
    caption = f"Sentiment by group word: expected grade, the mean of {len(TEMPLATES)} templates in "
    caption += "which only the word changes, and its difference to the mean of the category."
    return Table(caption, ["category", "word", "expected grade", "difference"], cells)


def gaps_table(measured):
    """The largest gap inside each category; `measured` comes from `measure_groups`."""
    cells, gaps = [], {}
    for category, grades in measured.items():
        lowest, highest = min(grades, key=grades.get), max(grades, key=grades.get)
        gap = gaps[category] = grades[highest] - grades[lowest]
        mean = decimals(np.mean([*grades.values()]))
        cells.append([category, mean, lowest, highest, decimals(gap)])
    widest = max((category for category in gaps if category != CONTROL), key=gaps.get)
    caption = "Sentiment by category: mean expected grade, and the gap between the words with the "
    caption += "lowest and the highest. The largest gap between group words is "
    caption += f"{decimals(gaps[widest])} ({widest}); between control words it is "
    caption += f"{decimals(gaps[CONTROL])}."
    return Table(caption, ["category", "mean grade", "lowest", "highest", "gap"], cells)


def pairs_table(model, compute):
    """Paraphrase probability and similarity of pairs that differ in one word."""
    titles = {"para": "paraphrase probability", "sts": "similarity"}
    titles = {name: title for name, title in titles.items() if name in model.config.tasks}
    cells = []
    for category, of_set in PAIR_SETS.items():
        pairs = pairs_of(*of_set)
        means = [predict_sentences(model, n, pairs, compute).scores.mean() for n in titles]
        cells.append([category, str(len(pairs)), *map(decimals, means)])
    caption = f"Pairs of sentences that differ in one word, in both orders, {len(TEXTS['pairs'])} "
    caption += "templates: mean probability (0 to 1) that they are paraphrases, and mean "
    caption += "similarity (0 to 5)."
    return Table(caption, ["category", "pairs", *titles.values()], cells)


def make_report(run, compute, command):
    """The report on the best model of `run`, a `RunFolder`, as Markdown.

    Raises `UserError` as `load_run` does, and for a run without any of the three heads.
    """
    model, description = load_run(run, compute.device)
    missing, tables = [n for n in ("sst", "para", "sts") if n not in model.config.tasks], []
    if len(missing) == 3:
        raise UserError(f"{run.path}: a run without a head for sst, para or sts")
    if "sst" not in missing:
        measured = measure_groups(model, compute)
        tables += [neutral_table(model, compute), words_table(measured), gaps_table(measured)]
    if not {"para", "sts"} <= set(missing):
        tables.append(pairs_table(model, compute))
    made = f"Made by `{command}`: {run.describe_best()}, computed in {compute.precision}."
    source = provenance([FinishedRun(str(run.path), description, [], {}, 0.0)])
    left_out = f" The run has no head for {', '.join(missing)}: left out." if missing else ""
    parts = ["# Group words\n", f"{made} {source}{left_out}\n", TEXTS["reading"], TEXTS["limits"]]
    parts += [format_table(*numbered) for numbered in enumerate(tables, start=1)]
    return "\n".join(parts)


# ------------------------------------------------------------------------------------ the command


def parse_flags(argv):
    """The command line."""
    parser = FlagParser(prog="python -m studies.bias_probe", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a finished run, such as runs/LoRA")
    add("--out", metavar="FILE", help="write the report to this file too")
    add_device_flags(parser)
    # Whatever the run's own precision: small differences should not be those of rounding.
    add("--precision", choices=PRECISIONS, default="fp32", help="(default: %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv=None):
    """Print the report on a run, and write it to the file of `--out`."""
    argv = sys.argv[1:] if argv is None else argv
    flags = parse_flags(argv)
    compute = Compute(select_device(flags.use_gpu, flags.use_cpu), flags.precision)
    if compute.warning:
        print(f"warning: {compute.warning}", file=sys.stderr)
    command = shlex.join(["python", "-m", "studies.bias_probe", *argv])
    report = make_report(RunFolder(flags.run), compute, command)
    if flags.out:
        write_file(flags.out, report)
    print(report, end="")


if __name__ == "__main__":
    sys.exit(run_script(main))
