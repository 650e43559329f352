"""`evaluation.py --checkpoint A B C`: the average of several finished runs, and its errors."""

import json

import numpy as np
import pytest

import evaluation
from config import TASKS, UserError
from reporting.results import result_of_scores, score_files
from runtime.files import write_files
from training.flags import default_flags

TASK_NAMES = ("sst", "para", "sts")
EXAMPLES = 40


def make_result(name, seed, split):
    """Random probabilities or scores around random labels; labels do not depend on the seed."""
    task, random = TASKS[name], np.random.default_rng(seed)
    labels = np.random.default_rng(len(name)).integers(0, int(task.high) + 1, EXAMPLES)
    if task.kind == "classes":
        scores = random.random((EXAMPLES, task.num_classes)) + np.eye(task.num_classes)[labels] / 2
        scores /= scores.sum(1, keepdims=True)
    else:
        scores = labels[:, None] + 0.75 * task.high * random.normal(size=(EXAMPLES, 1))
        scores = scores.clip(task.low, task.high)
    ids = [f"{split}{row}" for row in range(EXAMPLES)]
    labels = labels.astype(np.float32) if split == "dev" else None
    return result_of_scores(task, ids, scores.astype(np.float32), labels)


def make_run(folder, seed, tasks=TASK_NAMES, splits=("dev", "test")):
    """The files that an ensemble reads of a finished run; no model."""
    folder.mkdir()
    data = {name: {"dev": {"path": f"data/sample/{name}.csv"}} for name in tasks}
    description = {"args": default_flags() | {"tasks": list(tasks)}, "data": data}
    description |= {"precision": "fp32", "encoder": {"substituted": False}}
    description |= {"command": "python multitask_classifier.py"}
    (folder / "run.json").write_text(json.dumps(description), encoding="utf-8")
    for split in splits:
        results = {name: make_result(name, seed, split) for name in tasks}
        write_files(score_files(folder / "predictions", results, split))
    return folder


def scores_in(folder, name, split):
    """Scores of a run's file, (examples, columns), read with no code of the program's."""
    lines = (folder / f"predictions/{name}-{split}-scores.tsv").read_text("utf-8").splitlines()[1:]
    return np.array([line.split("\t")[3:] for line in lines], dtype=float)


def predicted(folder, name, split):
    """The predictions (examples,) in a file of the course's format."""
    lines = (folder / f"{name}-{split}-output.csv").read_text("utf-8").splitlines()[1:]
    return np.array([float(line.split(" , ")[1]) for line in lines])


@pytest.fixture
def runs(tmp_path):
    """Three finished runs."""
    return [make_run(tmp_path / f"run{seed}", seed) for seed in (1, 2, 3)]


def ensemble(runs, out):
    """Run the script on them."""
    evaluation.main(["--checkpoint", *map(str, runs), "--predictions_dir", str(out)])


# --------------------------------------------------------------------------------------- averaging


def test_each_task_is_averaged_over_the_runs_that_have_it(tmp_path, capsys):
    """The predictions are those of mean probabilities and scores, which are no votes."""
    tasks = [TASK_NAMES, TASK_NAMES, TASK_NAMES, ("sts",)]
    runs = [make_run(tmp_path / f"run{seed}", seed, of) for seed, of in enumerate(tasks)]
    out = tmp_path / "out"
    ensemble(runs, out)
    assert "ensemble of 4 runs (sst of 3, para of 3, sts of 4)" in capsys.readouterr().out
    assert len(list(out.iterdir())) == 6
    for split in ("dev", "test"):
        sst, para, sts = (
            np.mean([scores_in(run, name, split) for run in having], axis=0)
            for name, having in (("sst", runs[:3]), ("para", runs[:3]), ("sts", runs))
        )
        assert (predicted(out, "sst", split) == sst.argmax(1)).all()
        assert (predicted(out, "para", split) == (para[:, 0] > 0.5)).all()
        np.testing.assert_allclose(predicted(out, "sts", split), sts[:, 0], rtol=1e-6)


def test_dev_tables_of_each_run_and_of_the_ensemble_are_printed(runs, tmp_path, capsys):
    """And averaging independent errors beats every member."""
    ensemble(runs, tmp_path / "out")
    said = capsys.readouterr().out
    assert all(str(run) in said for run in runs) and "ensemble of 3 runs" in said
    assert said.count("its data is the small generated sample") == 3
    *members, together = (float(x.split()[1]) for x in said.splitlines() if x.startswith("overall"))
    assert len(members) == 3 and together > max(members)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("dev", lambda x: [x[0], x[2], x[1], *x[3:]], "ids differ"),  # another order
        ("dev", lambda x: x[:-1], "ids differ"),  # a row fewer
        ("test", lambda x: [x[0], x[2], x[1], *x[3:]], "ids differ"),
        ("dev", lambda x: [x[0], x[1].replace("\t", "\t9", 1), *x[2:]], "labels"),
    ],
)
def test_other_ids_or_labels_are_refused(runs, tmp_path, split, change, message):
    """Averaging row by row would give wrong predictions without a word."""
    path = runs[1] / f"predictions/sts-{split}-scores.tsv"
    path.write_text("\n".join(change(path.read_text("utf-8").splitlines())) + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"run2.*sts.*{message}"):
        ensemble(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("dev",), "last: no test predictions for para, sst, sts"),
        ((), "not finished.*`python multitask_classifier.py --resume`"),
    ],
)
def test_a_run_without_all_scores_is_refused(runs, tmp_path, splits, message):
    """Its test split would be averaged over fewer runs than the dev split, which is shown."""
    runs.append(make_run(tmp_path / "last", 4, splits=splits))
    with pytest.raises(UserError, match=message):
        ensemble(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_without_test_files_write_dev_files_alone_and_say_so(tmp_path, capsys):
    runs = [make_run(tmp_path / f"run{seed}", seed, splits=("dev",)) for seed in (1, 2)]
    ensemble(runs, tmp_path / "out")
    said = capsys.readouterr().out
    assert all(f"no run has test predictions for {name}" in said for name in TASK_NAMES)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_run_named_twice_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="twice"):
        ensemble([runs[0], runs[1], f"{runs[0]}/"], tmp_path / "out")
