"""`evaluation.py --checkpoint A B C`: the average of several finished runs, and what it refuses."""

import json

import numpy as np
import pytest

import evaluation
from config import TASKS, UserError
from evaluation import TaskResult, read_scores, score_files, scores_to_predictions
from run_folder import write_files

TASK_NAMES = ("sst", "para", "sts")
EXAMPLES = 40


def make_result(name, seed, noise, split="dev"):
    """Random probabilities or scores around random labels; labels do not depend on the seed."""
    task, shared = TASKS[name], np.random.default_rng(len(name))
    random = np.random.default_rng(seed)
    labels = shared.integers(0, int(task.high) + 1, EXAMPLES).astype(np.float32)
    if task.kind == "classes":
        logits = 2 * np.eye(task.num_classes)[labels.astype(int)]
        logits = np.exp(logits + noise * random.normal(size=logits.shape))
        scores = logits / logits.sum(1, keepdims=True)
    else:
        scores = labels + noise * random.normal(size=EXAMPLES) * task.high / 2
        scores = scores.clip(task.low, task.high)[:, None]
    scores = scores.astype(np.float32)
    ids = [f"{split}{row}" for row in range(EXAMPLES)]
    labels = labels if split == "dev" else None
    return TaskResult(ids, scores_to_predictions(task, scores), scores, labels)


def make_run(folder, seed, tasks=TASK_NAMES, splits=("dev", "test"), noise=1.5):
    """A finished run's folder with what an ensemble reads of it; no model."""
    folder.mkdir()
    data = {name: {"dev": {"path": f"data/sample/{name}.csv"}} for name in tasks}
    description = {"args": {"tasks": list(tasks)}, "command": "python multitask_classifier.py"}
    description |= {"precision": "fp32", "encoder": {"substituted": False}, "data": data}
    (folder / "run.json").write_text(json.dumps(description), encoding="utf-8")
    for split in splits:
        results = {name: make_result(name, seed, noise, split) for name in tasks}
        write_files(score_files(folder / "predictions", results, split))
    return folder


def scores_in(folder, name, split="dev"):
    """Scores of a run's file read with no code of the program's, (examples, columns)."""
    lines = (folder / f"predictions/{name}-{split}-scores.tsv").read_text("utf-8").splitlines()[1:]
    return np.array([line.split("\t")[3:] for line in lines], dtype=float)


def predicted(folder, name, split="dev"):
    """The predictions in a file of the course's format, (examples,)."""
    lines = (folder / f"{name}-{split}-output.csv").read_text("utf-8").splitlines()[1:]
    return np.array([float(line.split(" , ")[1]) for line in lines])


@pytest.fixture
def runs(tmp_path):
    """Three finished runs."""
    return [make_run(tmp_path / f"run{seed}", seed) for seed in (1, 2, 3)]


def ensemble(runs, out):
    """Run the script on them."""
    evaluation.main(["--checkpoint", *map(str, runs), "--predictions_dir", str(out)])


def test_predictions_are_those_of_the_averages_by_hand(runs, tmp_path):
    ensemble(runs, tmp_path / "out")
    for split in ("dev", "test"):
        mean = {n: np.mean([scores_in(r, n, split) for r in runs], axis=0) for n in TASK_NAMES}
        assert (predicted(tmp_path / "out", "sst", split) == mean["sst"].argmax(1)).all()
        assert (predicted(tmp_path / "out", "para", split) == (mean["para"][:, 0] > 0.5)).all()
        similarity = predicted(tmp_path / "out", "sts", split)
        np.testing.assert_allclose(similarity, mean["sts"][:, 0], rtol=1e-6)


def test_probabilities_are_averaged_and_not_votes(tmp_path):
    """Two weak votes against a sure one: the average follows the sure one."""
    runs = [make_run(tmp_path / name, 1, ("para",), ("dev",)) for name in "abc"]
    for run, probability in zip(runs, (0.45, 0.45, 0.99), strict=True):
        result = read_scores(run / "predictions", "para", "dev")
        result.scores[:] = probability
        result.predictions = result.scores[:, 0].round()
        write_files(score_files(run / "predictions", {"para": result}, "dev"))
    ensemble(runs, tmp_path / "out")
    assert (predicted(tmp_path / "out", "para") == 1).all()


def test_the_files_are_the_courses_format(runs, tmp_path):
    ensemble(runs, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 6
    lines = (tmp_path / "out/para-test-output.csv").read_text("utf-8").split("\n")
    assert lines[0] == "id \t Predicted_Is_Paraphrase " and len(lines) == EXAMPLES + 2
    assert lines[1] in ("test0 , 0.0 ", "test0 , 1.0 ")
    assert (tmp_path / "out/sst-dev-output.csv").read_text("utf-8").split("\n")[1][:7] == "dev0 , "


def test_dev_tables_of_each_run_and_of_the_ensemble_are_printed(runs, tmp_path, capsys):
    """And averaging independent errors beats every member, or it is no average."""
    ensemble(runs, tmp_path / "out")
    said = capsys.readouterr().out
    assert all(str(run) in said for run in runs) and "ensemble of 3 runs" in said
    assert said.count("its data is the small generated sample") == 3
    *members, together = (float(x.split()[1]) for x in said.splitlines() if x.startswith("overall"))
    assert len(members) == 3 and together > max(members)


def test_a_run_alone_among_copies_of_itself_is_unchanged(tmp_path):
    """The average of equal scores is the run: nothing is scaled, re-ordered or rounded."""
    runs = [make_run(tmp_path / name, 7) for name in "ab"]
    ensemble(runs, tmp_path / "out")
    for name in TASK_NAMES:
        own = read_scores(runs[0] / "predictions", name, "dev").predictions
        np.testing.assert_array_equal(predicted(tmp_path / "out", name).astype(np.float32), own)


def edit(run, name, change, split="dev"):
    """Rewrite a run's scores file by `change(lines)`."""
    path = run / f"predictions/{name}-{split}-scores.tsv"
    path.write_text("\n".join(change(path.read_text("utf-8").splitlines())) + "\n", "utf-8")


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],  # another order
        lambda lines: lines[:-1],  # a row fewer
        lambda lines: [*lines[:-1], "x" + lines[-1]],  # another id
    ],
    ids=["order", "fewer", "other"],
)
def test_other_ids_are_refused_before_anything_is_averaged(runs, tmp_path, change, split):
    """Averaging row by row would give wrong predictions without a word."""
    edit(runs[1], "sts", change, split)
    with pytest.raises(UserError, match=r"run2.*sts.*ids differ"):
        ensemble(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_labels_are_refused(runs, tmp_path):
    """Equal ids with other labels are another version of the data."""
    edit(runs[2], "sst", lambda lines: [lines[0], lines[1].replace("\t", "\t9", 1), *lines[2:]])
    with pytest.raises(UserError, match=r"run3.*sst labels"):
        ensemble(runs, tmp_path / "out")


def test_each_task_is_averaged_over_the_runs_that_have_it(tmp_path, capsys):
    """Runs of single tasks make one set of files, and the name says how many each task has."""
    tasks = [("sst", "sts"), ("sts",), ("para", "sts")]
    runs = [make_run(tmp_path / f"of{'-'.join(of)}", seed, of) for seed, of in enumerate(tasks)]
    ensemble(runs, tmp_path / "out")
    assert "ensemble of 3 runs (sst of 1, para of 1, sts of 3)" in capsys.readouterr().out
    for split in ("dev", "test"):
        own = scores_in(runs[0], "sst", split).argmax(1)
        assert (predicted(tmp_path / "out", "sst", split) == own).all()
        own = scores_in(runs[2], "para", split)[:, 0] > 0.5
        assert (predicted(tmp_path / "out", "para", split) == own).all()
        mean = np.mean([scores_in(run, "sts", split)[:, 0] for run in runs], axis=0)
        np.testing.assert_allclose(predicted(tmp_path / "out", "sts", split), mean, rtol=1e-6)


def test_a_test_split_that_only_some_have_is_refused(runs, tmp_path):
    """It would be averaged over fewer runs than the dev split, whose scores are shown."""
    runs.append(make_run(tmp_path / "untested", 4, splits=("dev",)))
    with pytest.raises(UserError, match=r"untested: no test predictions for para, sst, sts"):
        ensemble(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_refused_with_the_command_that_finishes_it(runs, tmp_path):
    runs.append(make_run(tmp_path / "unfinished", 4, splits=()))
    with pytest.raises(UserError, match=r"not finished.*python multitask_classifier.py --resume"):
        ensemble(runs, tmp_path / "out")


def test_a_run_named_twice_is_refused(runs, tmp_path):
    """It would count twice, which is no ensemble of that many runs."""
    with pytest.raises(UserError, match="twice"):
        ensemble([runs[0], runs[1], f"{runs[0]}/"], tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--checkpoint", "a", "b", "--sentence", "x"], "--sentence takes one run"),
        (["--report", "a", "--sentence", "x"], "--sentence takes one run"),
        (["--report", "a", "--checkpoint", "b"], "exclude each other"),
        (["--sentence2", "x"], "goes with --sentence"),
        (["--sentence", "caf\udce9"], "not UTF-8"),
        (["--sentence", "x", "--sentence2", "caf\udce9"], "--sentence2 .*not UTF-8"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        evaluation.get_args(given)


def test_one_run_is_still_evaluated_by_its_model(tmp_path):
    """A single --checkpoint loads the model, so one without a model must fail."""
    run = make_run(tmp_path / "single", 1)
    with pytest.raises(UserError, match="no best model yet"):
        ensemble([run], tmp_path / "out")
