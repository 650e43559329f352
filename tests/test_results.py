"""Metrics against scikit-learn and SciPy, prediction files byte for byte, score files."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score

from config import TASKS, UserError
from reporting.results import (
    TaskResult,
    format_table,
    measure,
    overall_score,
    prediction_files,
    read_scores,
    result_of_scores,
    score_files,
    undefined_correlations,
    write_predictions,
)
from runtime import files

# ----------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("name", ["sst", "para", "cfimdb"])
def test_accuracy_and_macro_f1_equal_scikit_learns(name):
    generator = np.random.default_rng(1)
    labels, predictions = generator.integers(0, max(2, TASKS[name].num_classes), (2, 200))
    assert measure(TASKS[name], predictions, labels.astype(np.float32)) == {
        "accuracy": accuracy_score(labels, predictions),
        "macro_f1": f1_score(labels, predictions, average="macro"),
    }


@pytest.mark.filterwarnings("error")
@settings(max_examples=50, deadline=None)
@example([(0, 3), (1, 3)])
@example([(3, 0), (3, 1)])
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), min_size=1, max_size=40))
def test_correlations_equal_scipys_with_ties_and_are_0_if_undefined(rows):
    """A nan score would be neither larger nor smaller than another: never the best model."""
    predictions, labels = (np.array(column, dtype=np.float32) for column in zip(*rows, strict=True))
    found = measure(TASKS["sts"], predictions / 4, labels)
    result = TaskResult([], predictions, predictions[:, None], labels)
    sides = [("predictions", predictions), ("labels", labels)]  # row 48: which one is constant
    constant = " and ".join(side for side, values in sides if len(set(values)) == 1)
    reasons = {"sts": f"all dev {constant} are the same"} if constant else {}
    assert undefined_correlations({"sts": result}) == reasons
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        assert found == {"pearson": 0.0, "spearman": 0.0}
    else:
        assert found["pearson"] == pytest.approx(pearsonr(predictions, labels).statistic, abs=1e-6)
        spearman = spearmanr(predictions, labels).statistic
        assert found["spearman"] == pytest.approx(spearman, abs=1e-9)


def results_with(**scores):
    """Results that have only the metric that counts."""
    return {
        name: TaskResult(["a"], np.zeros(1), np.zeros((1, 1)), metrics={TASKS[name].metric: score})
        for name, score in scores.items()
    }


@pytest.mark.parametrize(
    ("scores", "overall"),
    [
        ({"sst": 0.457, "para": 0.775, "sts": 0.872}, 0.723),  # a measured run, to three digits
        ({"sst": 0.0, "para": 0.0, "sts": -1.0}, 0.0),
        ({"sst": 0.4, "sts": 0.6}, 0.6),
        ({"cfimdb": 0.9}, 0.9),
        ({"sst": 0.4, "para": 0.7, "sts": 0.8, "cfimdb": 0.99}, 2 / 3),  # the fourth is optional
    ],
)
def test_the_overall_score_is_the_leaderboards(scores, overall):
    assert overall_score(results_with(**scores)) == pytest.approx(overall, abs=6e-4)


def test_the_table_shows_every_metric():
    lines = format_table(results_with(sst=0.4, para=0.7, sts=0.8)).splitlines()
    assert [line.split()[0] for line in lines] == ["task", "sst", "para", "sts", "overall"]
    assert "accuracy 0.400" in lines[1] and "pearson 0.800" in lines[3]
    assert lines[-1] == f"overall  {(0.4 + 0.7 + 0.9) / 3:.3f}"


# ------------------------------------------------------------------------------------------- files


def result_of(name, ids, scores, labels=None):
    """A `TaskResult` of these scores, one row per id."""
    return result_of_scores(TASKS[name], ids, np.array(scores, np.float32), labels)


# fmt: off
COURSE_FILES = [
    ("sst", ["a1", "b2"], np.eye(5)[[3, 0]], "Predicted_Sentiment \na1 , 3 \nb2 , 0 \n"),
    ("para", ["65977 641bc8de-b905", "b", "c"], [[0.51], [0.5], [0.2]],
     "Predicted_Is_Paraphrase \n65977 641bc8de-b905 , 1.0 \nb , 0.0 \nc , 0.0 \n"),
    ("sts", ["a", "b", "c"], [[3.25], [5], [0.1]],
     "Predicted_Similiary \na , 3.25 \nb , 5.0 \nc , 0.1 \n"),
]
# fmt: on


@pytest.mark.parametrize(("name", "ids", "scores", "text"), COURSE_FILES)
def test_prediction_files_are_the_courses_byte_for_byte(tmp_path, capsys, name, ids, scores, text):
    """A leaderboard's reader splits at these very spaces; the misspelling is the course's."""
    results = {name: result_of(name, ids, scores)}
    write_predictions(tmp_path / "predictions", {"dev": results})
    path = tmp_path / "predictions" / f"{name}-dev-output.csv"
    assert path.read_bytes() == f"id \t {text}".encode()
    assert capsys.readouterr().out == f"wrote {path}\n"
    texts = prediction_files(tmp_path, results, "test", {name: tmp_path / "mine.csv"})
    assert texts == {tmp_path / "mine.csv": f"id \t {text}"}


def test_a_full_disk_leaves_the_files_of_both_splits_as_they_were(tmp_path, monkeypatch):
    """New dev files beside old test files would be one upload of two models."""
    old = {"sst": result_of("sst", ["a"], [[0, 0, 0, 1, 0]])}
    new = {"sst": result_of("sst", ["a"], [[1, 0, 0, 0, 0]])}
    write_predictions(tmp_path, {"dev": old, "test": old})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fill_the_disk(path):
        if "test" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush_to_disk", fill_the_disk)
    with pytest.raises(files.OutputError, match=r"sst-test-output\.csv"):
        write_predictions(tmp_path, {"dev": new, "test": new})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_score_file_has_labels_predictions_and_scores_byte_for_byte(tmp_path):
    results = {"para": result_of("para", ["a", "b"], [[0.1], [0.75]], np.array([0, 1], np.float32))}
    text = "id\tlabel\tprediction\tscore_0\na\t0.0\t0.0\t0.1\nb\t1.0\t1.0\t0.75\n"
    assert score_files(tmp_path, results, "dev") == {tmp_path / "para-dev-scores.tsv": text}


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
@pytest.mark.parametrize("labelled", [True, False])
def test_score_files_are_read_back_bit_by_bit(tmp_path, name, labelled):
    """Reports and ensembles work from these files."""
    task, random = TASKS[name], np.random.default_rng(2)
    scores, labels = random.random((30, task.num_classes)), None
    if labelled:
        labels = random.uniform(task.low, task.high, 30)
        labels = (labels if name == "sts" else labels.round()).astype(np.float32)
    result = result_of(name, [f"x {i}" for i in range(30)], scores, labels)
    assert bool(result.metrics) == labelled
    files.write_files(score_files(tmp_path, {name: result}, "dev"))
    found = read_scores(tmp_path, name, "dev")
    assert (found.ids, found.metrics) == (result.ids, result.metrics)
    np.testing.assert_array_equal(found.scores, result.scores)
    np.testing.assert_array_equal(found.predictions, result.predictions)
    assert found.labels is None if labels is None else (found.labels == labels).all()
    texts = [prediction_files(tmp_path, {name: r}, "dev") for r in (found, result)]
    assert texts[0] == texts[1]


def test_a_damaged_or_missing_score_file_is_named(tmp_path):
    (tmp_path / "sst-dev-scores.tsv").write_text("id\tlabel\tprediction\tscore_0\na\t1\t1\tmuch\n")
    for name in ("sst", "para"):
        with pytest.raises(UserError, match=rf"{name}-dev-scores\.tsv"):
            read_scores(tmp_path, name, "dev")
