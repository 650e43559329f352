"""The bias probe: sentences differ in one word, tables are whole, figures are the model's own."""

import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SAMPLE, load_script

import evaluation
import multitask_classifier
from bert import BertModel
from config import UserError
from training.run_folder import RunFolder
from tokenizer import BertTokenizer

SCRIPT = REPOSITORY / "benchmarks" / "bias_probe.py"
CPU = torch.device("cpu")


bias_probe = load_script(SCRIPT)


@pytest.fixture(scope="module")
def train(tiny_config, toy_vocab_folder, tmp_path_factory):
    """Trains a tiny random encoder on the sample with more flags; gives the run's folder.

    The initial weights are wide, so that sentences differ and a wrong figure shows.
    """
    folder = tmp_path_factory.mktemp("probe")
    torch.manual_seed(5)
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    config = replace(tiny_config, initializer_range=0.4)
    BertModel(config).save_pretrained(folder / "encoder", tokenizer)
    places = {"pretrained": "encoder", "runs_dir": "runs", "predictions_dir": "predictions"}
    command = [word for flag, name in places.items() for word in (f"--{flag}", str(folder / name))]
    command += ["--data_dir", str(SAMPLE), "--batch_size", "4", "--steps_per_epoch", "3"]

    def run(suffix, *flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
            multitask_classifier.main(
                [*command, "--epochs", "1", "--model_file_suffix", suffix, *flags]
            )
        return folder / "runs" / f"full-model-{suffix}"

    return run


@pytest.fixture(scope="module")
def run(train):
    """A finished run of all three heads."""
    return train("all", "--lr", "1e-2", "--head_lr", "1e-2")


@pytest.fixture(scope="module")
def heads(run):
    """Its heads in fp32."""
    return bias_probe.Heads(RunFolder(run), CPU, "fp32")


@pytest.fixture
def report(run, capsys):
    """The report that the command prints."""
    bias_probe.main([str(run)])
    return capsys.readouterr().out


def table(text, number):
    """A table of the report: its caption, header and rows."""
    caption, block = re.search(
        rf"^\*\*Table {number}\.\*\* (.*)\n\n((?:\|.*\n)+)", text, re.MULTILINE
    ).groups()
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()
    ]
    return caption, header, rows


def said_of(capsys, run, *sentences):
    """Scores by task that `evaluation.py --sentence` prints, to three decimals."""
    flags = ["--checkpoint", str(run), "--precision", "fp32", "--sentence", sentences[0]]
    capsys.readouterr()
    evaluation.main([*flags, *(["--sentence2", sentences[1]] if sentences[1:] else [])])
    lines = re.findall(r"^(\w+) .*: .*\((.*)\)$", capsys.readouterr().out, re.MULTILINE)
    return {name: np.array([float(score) for score in scores.split()]) for name, scores in lines}


# ---------------------------------------------------------------------------------- the sentences


def differing_words(first, second):
    """The words at which two sentences differ, [(of the first, of the second)]."""
    first, second = first.split(), second.split()
    assert len(first) == len(second)
    return [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]


@pytest.mark.parametrize("category", bias_probe.WORDS)
@pytest.mark.parametrize("template", bias_probe.TEMPLATES)
def test_a_template_exchanges_exactly_one_word(template, category):
    """A second difference, an article say, and the figure would be that of something else."""
    words = bias_probe.WORDS[category]
    first = template.format(word=words[0])
    for word in words[1:]:
        assert differing_words(first, template.format(word=word)) == [(words[0], word)]


@pytest.mark.parametrize("category", bias_probe.PAIR_SETS)
def test_pairs_differ_in_exactly_one_word_of_their_category(category):
    templates, words = bias_probe.PAIR_SETS[category]
    pairs = bias_probe.pairs_of(templates, words)
    assert len(pairs) == len(set(pairs)) == len(templates) * len(words) * (len(words) - 1)
    for pair in pairs:
        ((first, second),) = differing_words(*pair)
        assert first in words and second in words
        assert pair[::-1] in pairs


def test_words_stand_in_one_category_and_every_category_has_several():
    words = [word for of_category in bias_probe.WORDS.values() for word in of_category]
    assert len(words) == len({word.lower() for word in words})  # the model reads lower case
    assert all(len(of_category) >= 3 for of_category in bias_probe.WORDS.values())
    assert set(bias_probe.GROUPS) == {
        "gender", "nationality", "religion", "age", "race or ethnicity", "disability",
        "sexual orientation",
    }  # fmt: skip
    assert len(set(bias_probe.NEUTRAL)) == 12


# ------------------------------------------------------------------------------------- the tables


def test_the_tables_hold_every_statement_group_and_category(report):
    _, header, rows = table(report, 1)
    assert header == ["statement", "predicted grade", "expected grade"]
    assert [row[0] for row in rows] == list(bias_probe.NEUTRAL)
    _, header, rows = table(report, 2)
    expected = [[c, word] for c, words in bias_probe.WORDS.items() for word in words]
    assert [row[:2] for row in rows] == expected and len(rows) > 30
    assert [row[0] for row in table(report, 3)[2]] == list(bias_probe.WORDS)
    assert [row[0] for row in table(report, 4)[2]] == list(bias_probe.PAIR_SETS)
    for number in range(1, 5):
        _, header, rows = table(report, number)
        assert all(len(row) == len(header) and all(row) for row in rows)


def test_the_report_says_of_what_it_is_how_to_read_it_and_what_it_cannot_show(report, run):
    assert f"python benchmarks/bias_probe.py {run}" in report
    assert "best model of step 3, computed in fp32" in report and "**generated sample**" in report
    assert "How to read it." in report
    assert "no claim of\ncompleteness" in report and "English" in report


def test_the_same_run_gives_the_same_report_and_the_file_has_it_too(run, tmp_path, capsys):
    flags = [str(run), "--out", str(tmp_path / "new" / "bias.md")]
    printed = []
    for _ in range(2):
        bias_probe.main(flags)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == (tmp_path / "new" / "bias.md").read_text("utf-8")


# ------------------------------------------------------------------------------------ the figures


def test_grades_are_those_of_the_models_own_prediction(run, report, capsys):
    """What `evaluation.py --sentence` says of a statement stands in its row."""
    _, _, rows = table(report, 1)
    for sentence, predicted, expected in (rows[0], rows[7]):
        scores = said_of(capsys, run, sentence)["sst"]
        assert int(predicted) == scores.argmax()
        assert float(expected) == pytest.approx(scores @ range(5), abs=0.02)
    assert len({row[2] for row in rows}) > 3  # else any other row would have done


def test_a_words_grade_is_the_mean_over_the_templates(run, report, capsys):
    _, _, rows = table(report, 2)
    for word in ("Buddhist", "visiting"):
        said = [said_of(capsys, run, t.format(word=word))["sst"] for t in bias_probe.TEMPLATES]
        (row,) = (row for row in rows if row[1] == word)
        assert float(row[2]) == pytest.approx(np.mean(said, axis=0) @ range(5), abs=0.02)


def test_differences_and_gaps_follow_from_the_grades(report):
    _, _, words = table(report, 2)
    caption, _, categories = table(report, 3)
    gaps = {}
    for category, mean, lowest, highest, gap in categories:
        of_category = [row for row in words if row[0] == category]
        grades = {row[1]: float(row[2]) for row in of_category}
        assert float(mean) == pytest.approx(np.mean(list(grades.values())), abs=0.011)
        for _, word, _, difference in of_category:
            assert float(difference) == pytest.approx(grades[word] - float(mean), abs=0.016)
        assert grades[lowest] == min(grades.values())
        assert grades[highest] == max(grades.values())
        assert float(gap) == pytest.approx(grades[highest] - grades[lowest], abs=0.016)
        gaps[category] = gap
    control = gaps.pop(bias_probe.CONTROL)
    widest = max(gaps, key=lambda category: float(gaps[category]))
    assert f"between group words is {gaps[widest]} ({widest})" in caption
    assert f"between control words it is {control}." in caption
    assert len({row[2] for row in words}) > 10


def test_the_largest_gap_is_one_of_groups_however_wide_the_controls():
    """A wide gap between control words is a finding about the measure, not about a group."""
    grades = {c: [2.0] * len(words) for c, words in bias_probe.WORDS.items()}
    grades |= {"age": [3.25, 2.0, 2.5, 1.0], bias_probe.CONTROL: [0.0, 1.0, 1.0, 1.0, 1.0, 4.0]}
    measured = [bias_probe.Sentiment(c, word, grade, 0)
                for c, words in bias_probe.WORDS.items()
                for word, grade in zip(words, grades[c], strict=True)]  # fmt: skip
    made = bias_probe.gaps_table(measured)
    assert "between group words is 2.25 (age)" in made.caption
    assert "between control words it is 4.00." in made.caption


def test_pairs_are_judged_as_the_model_does(run, heads, capsys):
    """The order of the pairs and their categories: each category's mean is of its own pairs."""
    means = {name: bias_probe.measure_pairs(heads, name) for name in ("para", "sts")}
    templates, words = bias_probe.PAIR_SETS["control: weekdays"]
    pairs = bias_probe.pairs_of(templates, words)
    said = [said_of(capsys, run, *pair) for pair in pairs]
    for name, of_category in means.items():
        expected = np.mean([scores[name][0] for scores in said])
        assert of_category["control: weekdays"] == pytest.approx(expected, abs=1e-3)
        assert set(of_category) == set(bias_probe.PAIR_SETS)
        assert len({round(float(mean), 3) for mean in of_category.values()}) > 3


def test_the_pairs_figures_stand_in_the_table(heads, report):
    _, header, rows = table(report, 4)
    assert header == ["category", "pairs", "paraphrase probability", "similarity"]
    para, sts = (bias_probe.measure_pairs(heads, name) for name in ("para", "sts"))
    for category, count, probability, similarity in rows:
        assert int(count) == len(bias_probe.pairs_of(*bias_probe.PAIR_SETS[category]))
        assert float(probability) == pytest.approx(para[category], abs=0.006)
        assert float(similarity) == pytest.approx(sts[category], abs=0.006)


def test_expected_grades_by_hand():
    scores = np.array([[0, 0, 1, 0, 0], [0.5, 0, 0, 0, 0.5], [0, 0.25, 0, 0.75, 0]])
    np.testing.assert_allclose(bias_probe.expected_grades(scores), [2, 2, 2.5])


def test_no_figure_is_a_negative_zero():
    assert [bias_probe.decimals(x) for x in (-0.001, 0.004, -0.006)] == ["0.00", "0.00", "-0.01"]


# ------------------------------------------------------------------ other runs, what is refused


def test_a_run_without_a_head_goes_without_its_tables(train, capsys):
    bias_probe.main([str(train("some", "--tasks", "sst", "sts"))])
    text = capsys.readouterr().out
    assert "no head for para: left out" in text
    assert table(text, 4)[1] == ["category", "pairs", "similarity"]
    bias_probe.main([str(train("pair", "--tasks", "para"))])
    text = capsys.readouterr().out
    assert table(text, 1)[1] == ["category", "pairs", "paraphrase probability"]
    assert "**Table 2.**" not in text


def test_a_run_of_another_task_alone_is_refused(train):
    run = train("reviews", "--tasks", "cfimdb", "--max_length", "40")
    with pytest.raises(UserError, match="a run of cfimdb; expected sst, para, sts"):
        bias_probe.main([str(run)])


def test_mistakes_are_one_line_and_exit_code_2(tmp_path):
    """As the program's other scripts, from any working directory."""
    for flags, said in (
        ([str(tmp_path)], "error: .*run.json: not the description of a run"),
        (["runs/x", "--ou", "y"], "error: unknown argument --ou; did you mean --out?"),
        ([], "error: the following arguments are required: RUN"),
    ):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *flags], cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert re.match(said.replace("?", r"\?"), done.stderr) and done.stderr.count("\n") == 1
