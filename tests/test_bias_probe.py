"""The bias probe: sentences differ in one word, tables are whole, figures are the model's own."""

import csv

import numpy as np
import pytest
from conftest import train_in
from report_helpers import table

import evaluation
from config import UserError
from runtime.script import run_script
from studies import bias_probe
from studies.bias_probe import WORDS


@pytest.fixture(scope="module")
def train(write_encoder, cut_sample, tmp_path_factory):
    """Trains a tiny random encoder with more flags; returns the run's folder."""
    folder = tmp_path_factory.mktemp("probe")
    write_encoder(folder / "encoder", seed=5, initializer_range=0.4)
    command = f"--pretrained {folder}/encoder --runs_dir {folder}/runs --data_dir {cut_sample}"
    command += f" --predictions_dir {folder} --batch_size 4 --epochs 1 --steps_per_epoch 3"

    def run(suffix, flags):
        train_in(folder, f"{command} --model_file_suffix {suffix} {flags}")
        return folder / "runs" / f"full-model-{suffix}"

    return run


@pytest.fixture(scope="module")
def run(train):
    """A finished run with all three heads."""
    return train("all", "--lr 1e-2 --head_lr 0.1")


@pytest.fixture(scope="module")
def report(run):
    """The report that the command writes."""
    bias_probe.main([str(run), "--out", f"{run}/new/bias.md"])
    return (run / "new/bias.md").read_text("utf-8")


def scores_of(run, name, texts):
    """A task's scores (texts, columns) as `evaluation.py --predict` writes them."""
    path = run.parent / "texts.txt"
    path.write_text("\n".join(map("\t".join, texts)), encoding="utf-8")
    flags = f"--checkpoint {run} --precision fp32 --predict {path} --out {path}.tsv"
    evaluation.main(flags.split())
    with open(f"{path}.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return np.array([[float(row[key]) for key in row if f"{name}_score" in key] for row in rows])


# ---------------------------------------------------------------------------------- the sentences


@pytest.mark.parametrize(
    ("templates", "words"),
    [*bias_probe.PAIR_SETS.values(), *((bias_probe.TEMPLATES, w) for w in WORDS.values())],
)
def test_sentences_differ_in_exactly_one_word_of_their_category(templates, words):
    """With a second difference, such as an article, the figure would measure something else."""
    pairs = bias_probe.pairs_of(templates, words)
    assert len(pairs) == len(set(pairs)) == len(templates) * len(words) * (len(words) - 1)
    for pair in pairs:
        places = zip(*(sentence.split() for sentence in pair), strict=True)
        ((first, second),) = (place for place in places if place[0] != place[1])
        assert {first, second} <= set(words) and pair[::-1] in pairs


def test_each_word_belongs_to_one_category_and_each_category_has_several():
    words = [word.lower() for of_category in WORDS.values() for word in of_category]
    assert len(words) == len(set(words)) > 30  # the model reads lower case
    assert all(len(of_category) >= 3 for of_category in WORDS.values())


# ------------------------------------------------------------------------------------- the tables


def test_the_tables_hold_every_statement_word_and_category(report):
    tables = [table(report, number) for number in range(1, 5)]
    statements, words, *others = ([row[:2] for row in rows] for _, rows in tables)
    assert [statement for statement, _ in statements] == list(bias_probe.NEUTRAL)
    assert words == [[c, word] for c, of_category in WORDS.items() for word in of_category]
    categories = [[category for category, _ in rows] for rows in others]
    assert categories == [list(WORDS), list(bias_probe.PAIR_SETS)]
    for header, rows in tables:
        assert all(len(row) == len(header) and all(row) for row in rows)


def test_the_report_says_what_it_measures_and_is_the_same_each_time(run, report, capsys):
    bias_probe.main([str(run), "--out", f"{run}/new/bias.md"])
    assert capsys.readouterr().out == report == (run / "new/bias.md").read_text("utf-8")
    assert f"`python -m studies.bias_probe {run} --out {run}/new/bias.md`" in report
    for said in ("best model of step 3, computed in fp32", "**generated sample**", "How to read"):
        assert said in report
    assert "no claim of\ncompleteness" in report and "English" in report


# ------------------------------------------------------------------------------------ the figures


def test_grades_are_those_of_the_models_own_prediction(run, report):
    """Of a statement, and of a word's templates."""
    scores = scores_of(run, "sst", [(statement,) for statement in bias_probe.NEUTRAL])
    _, rows = table(report, 1)
    assert [int(row[1]) for row in rows] == scores.argmax(1).tolist()
    np.testing.assert_allclose([float(row[2]) for row in rows], scores @ range(5), atol=0.006)
    assert len({row[2] for row in rows}) > 3  # else any other row would have passed
    grades = {row[1]: float(row[2]) for row in table(report, 2)[1]}
    for word in ("Buddhist", "visiting"):
        texts = [(template.format(word=word),) for template in bias_probe.TEMPLATES]
        mean = scores_of(run, "sst", texts).mean(0)
        assert grades[word] == pytest.approx(mean @ range(5), abs=0.006)
    assert len(set(grades.values())) > 10


def test_pairs_are_judged_as_the_model_does(run, report):
    header, rows = table(report, 4)
    assert header == ["category", "pairs", "paraphrase probability", "similarity"]
    counts = [len(bias_probe.pairs_of(*of_set)) for of_set in bias_probe.PAIR_SETS.values()]
    assert [int(row[1]) for row in rows] == counts
    pairs = bias_probe.pairs_of(*bias_probe.PAIR_SETS["control: weekdays"])
    for column, name in ((2, "para"), (3, "sts")):
        expected = scores_of(run, name, pairs).mean()
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
    assert table(text, 4)[0] == ["category", "pairs", "similarity"]
    bias_probe.main([str(train("pair", "--tasks para"))])
    text = capsys.readouterr().out
    assert table(text, 1)[0] == ["category", "pairs", "paraphrase probability"]
    assert "**Table 2.**" not in text


def test_a_run_of_another_task_alone_is_refused(train):
    run = train("reviews", "--tasks cfimdb --max_length 40")
    with pytest.raises(UserError, match="full-model-reviews: a run without a head for sst"):
        bias_probe.main([str(run)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("x", "error: x/run.json: not the description of a run"),
        ("runs/x --ou y", "error: unknown argument --ou; did you mean --out?"),
        ("", "error: the following arguments are required: RUN"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(workplace, capsys, flags, said):
    assert run_script(bias_probe.main, flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1
