"""The bias probe: sentences differ in one word, tables are whole, figures are the model's own."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SAMPLE

import evaluation
import multitask_classifier
from bert import BertModel
from config import UserError
from studies import bias_probe
from tokenizer import BertTokenizer


@pytest.fixture(scope="module")
def train(tiny_config, toy_vocab_folder, tmp_path_factory):
    """Trains a tiny random encoder on the sample with more flags; returns the run's folder.

    The initial weights are wide, so that sentences differ and a wrong figure shows.
    """
    folder = tmp_path_factory.mktemp("probe")
    torch.manual_seed(5)
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    config = replace(tiny_config, initializer_range=0.4)
    BertModel(config).save_pretrained(folder / "encoder", tokenizer)
    command = f"--pretrained {folder}/encoder --runs_dir {folder}/runs --data_dir {SAMPLE}"
    command += f" --predictions_dir {folder} --batch_size 4 --epochs 1 --steps_per_epoch 3"

    def run(suffix, flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
            multitask_classifier.main(f"{command} --model_file_suffix {suffix} {flags}".split())
        return folder / "runs" / f"full-model-{suffix}"

    return run


@pytest.fixture(scope="module")
def run(train):
    """A finished run with all three heads."""
    return train("all", "--lr 1e-2 --head_lr 1e-2")


@pytest.fixture
def report(run, capsys):
    """The report that the command prints."""
    bias_probe.main([str(run)])
    return capsys.readouterr().out


def table(text, number):
    """A table of the report: its caption, header and rows."""
    pattern = rf"^\*\*Table {number}\.\*\* (.*)\n\n((?:\|.*\n)+)"
    caption, block = re.search(pattern, text, re.MULTILINE).groups()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
    return caption, lines[0], lines[2:]


def scores_of(capsys, run, *sentences):
    """Scores by task that `evaluation.py --sentence` prints, to three decimals."""
    flags = ["--checkpoint", str(run), "--precision", "fp32", "--sentence", sentences[0]]
    capsys.readouterr()
    evaluation.main([*flags, *(["--sentence2", sentences[1]] if sentences[1:] else [])])
    lines = re.findall(r"^(\w+) .*: .*\((.*)\)$", capsys.readouterr().out, re.MULTILINE)
    return {name: np.array(scores.split(), dtype=float) for name, scores in lines}


# ---------------------------------------------------------------------------------- the sentences


def differing_words(first, second):
    """The words at which two sentences differ, [(of the first, of the second)]."""
    pairs = list(zip(first.split(), second.split(), strict=True))
    return [pair for pair in pairs if pair[0] != pair[1]]


def test_the_sentences_of_a_template_differ_in_exactly_one_word():
    """With a second difference, such as an article, the figure would measure something else."""
    for template, (first, *others) in product(bias_probe.TEMPLATES, bias_probe.WORDS.values()):
        for word in others:
            sentences = template.format(word=first), template.format(word=word)
            assert differing_words(*sentences) == [(first, word)]


@pytest.mark.parametrize("category", bias_probe.PAIR_SETS)
def test_pairs_differ_in_exactly_one_word_of_their_category(category):
    templates, words = bias_probe.PAIR_SETS[category]
    pairs = bias_probe.pairs_of(templates, words)
    assert len(pairs) == len(set(pairs)) == len(templates) * len(words) * (len(words) - 1)
    for pair in pairs:
        (differing,) = differing_words(*pair)
        assert set(differing) <= set(words) and pair[::-1] in pairs


def test_each_word_belongs_to_one_category_and_each_category_has_several():
    words = [word.lower() for of_category in bias_probe.WORDS.values() for word in of_category]
    assert len(words) == len(set(words)) > 30  # the model reads lower case
    assert all(len(of_category) >= 3 for of_category in bias_probe.WORDS.values())
    named = {"gender", "nationality", "religion", "age", "race or ethnicity", "disability"}
    assert set(bias_probe.GROUPS) == named | {"sexual orientation"}
    assert len(set(bias_probe.NEUTRAL)) == 12


# ------------------------------------------------------------------------------------- the tables


def test_the_tables_hold_every_statement_word_and_category(report):
    first_cells = [[row[0] for row in table(report, number)[2]] for number in (1, 3, 4)]
    expected = [bias_probe.NEUTRAL, bias_probe.WORDS, bias_probe.PAIR_SETS]
    assert first_cells == [list(names) for names in expected]
    words = [[c, word] for c, of_category in bias_probe.WORDS.items() for word in of_category]
    assert [row[:2] for row in table(report, 2)[2]] == words
    for number in range(1, 5):
        _, header, rows = table(report, number)
        assert all(len(row) == len(header) and all(row) for row in rows)


def test_the_report_says_what_it_measures_and_is_the_same_each_time(run, tmp_path, capsys):
    printed, out = [], tmp_path / "new" / "bias.md"
    for _ in range(2):
        bias_probe.main([str(run), "--out", str(out)])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == out.read_text("utf-8")
    assert f"`python -m studies.bias_probe {run} --out {out}`" in printed[0]
    for said in ("best model of step 3, computed in fp32", "**generated sample**", "How to read"):
        assert said in printed[0]
    assert "no claim of\ncompleteness" in printed[0] and "English" in printed[0]


# ------------------------------------------------------------------------------------ the figures


def test_grades_are_those_of_the_models_own_prediction(run, report, capsys):
    """What `evaluation.py --sentence` prints: of a statement, and of a word's templates."""
    _, _, rows = table(report, 1)
    for sentence, predicted, expected in (rows[0], rows[7]):
        scores = scores_of(capsys, run, sentence)["sst"]
        assert int(predicted) == scores.argmax()
        assert float(expected) == pytest.approx(scores @ range(5), abs=0.02)
    assert len({row[2] for row in rows}) > 3  # else any other row would have passed
    grades = {row[1]: float(row[2]) for row in table(report, 2)[2]}
    for word in ("Buddhist", "visiting"):
        texts = [template.format(word=word) for template in bias_probe.TEMPLATES]
        scores = np.mean([scores_of(capsys, run, text)["sst"] for text in texts], axis=0)
        assert grades[word] == pytest.approx(scores @ range(5), abs=0.02)
    assert len(set(grades.values())) > 10


def test_pairs_are_judged_as_the_model_does(run, report, capsys):
    _, header, rows = table(report, 4)
    assert header == ["category", "pairs", "paraphrase probability", "similarity"]
    counts = [len(bias_probe.pairs_of(*of_set)) for of_set in bias_probe.PAIR_SETS.values()]
    assert [int(row[1]) for row in rows] == counts
    pairs = bias_probe.pairs_of(*bias_probe.PAIR_SETS["control: weekdays"])
    scores = [scores_of(capsys, run, *pair) for pair in pairs]
    for column, name in ((2, "para"), (3, "sts")):
        expected = np.mean([of_pair[name][0] for of_pair in scores])
        assert float(rows[-1][column]) == pytest.approx(expected, abs=0.006)
        assert len({row[column] for row in rows}) > 3


def test_differences_and_gaps_follow_from_the_grades():
    """A wide gap between control words is a finding about the measure, not about a group."""
    measured = {"age": {"old": 3.25, "young": 1.0}, "gender": {"female": 2.0, "male": 2.5}}
    measured[bias_probe.CONTROL] = {"busy": 4.0, "short": 1.0, "tall": 0.0}
    assert bias_probe.words_table(measured).cells[1:6] == [
        ["age", "young", "1.00", "-1.12"],
        ["gender", "female", "2.00", "-0.25"],
        ["gender", "male", "2.50", "0.25"],
        [bias_probe.CONTROL, "busy", "4.00", "2.33"],
        [bias_probe.CONTROL, "short", "1.00", "-0.67"],
    ]
    made = bias_probe.gaps_table(measured)
    assert made.cells[::2] == [
        ["age", "2.12", "young", "old", "2.25"],
        [bias_probe.CONTROL, "1.67", "tall", "busy", "4.00"],
    ]
    assert "between group words is 2.25 (age); between control words it is 4.00." in made.caption


def test_expected_grades_by_hand_and_no_negative_zero():
    scores = np.array([[0, 0, 1, 0, 0], [0.5, 0, 0, 0, 0.5], [0, 0.25, 0, 0.75, 0]])
    np.testing.assert_allclose(bias_probe.expected_grades(scores), [2, 2, 2.5])
    assert [bias_probe.decimals(x) for x in (-0.001, 0.004, -0.006)] == ["0.00", "0.00", "-0.01"]


# ------------------------------------------------------------------ other runs, what is refused


def test_a_run_without_a_head_has_no_tables_of_it(train, capsys):
    bias_probe.main([str(train("some", "--tasks sst sts"))])
    text = capsys.readouterr().out
    assert "no head for para: left out" in text
    assert table(text, 4)[1] == ["category", "pairs", "similarity"]
    bias_probe.main([str(train("pair", "--tasks para"))])
    text = capsys.readouterr().out
    assert table(text, 1)[1] == ["category", "pairs", "paraphrase probability"]
    assert "**Table 2.**" not in text


def test_a_run_of_another_task_alone_is_refused(train):
    run = train("reviews", "--tasks cfimdb --max_length 40")
    with pytest.raises(UserError, match="a run of cfimdb; expected sst, para, sts"):
        bias_probe.main([str(run)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("x", "error: x/run.json: not the description of a run"),
        ("runs/x --ou y", "error: unknown argument --ou; did you mean --out?"),
        ("", "error: the following arguments are required: RUN"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, flags, said):
    command = [sys.executable, "-m", "studies.bias_probe", *flags.split()]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
