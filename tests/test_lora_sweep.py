"""The sweep of rank and scale: real runs, trained once, and figures that are those of their files.

A tiny random encoder on a cut of the sample; the sweep and its runs are processes of their own.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, SAMPLE, load_script
from matplotlib.figure import Figure

from bert import BertModel
from config import TASKS, UserError
from evaluation import finished_run
from reporting.report import Run
from training.run_folder import RunFolder
from runtime.script import NotFinite
from tokenizer import BertTokenizer

SCRIPT = REPOSITORY / "benchmarks" / "lora_sweep.py"
NAMES = ["LoRA-r2-a2", "LoRA-r2-a1", "LoRA-r4-a2"]  # α = 2 and α/r = 0.5 coincide at r 4
STEPS = 4
SMALL = f"--pretrained encoder --data_dir data --batch_size 3 --epochs 2 --steps_per_epoch {STEPS}"
COMMAND = f"--ranks 4 2 --alpha 2 --scaling 0.5 --runs_dir sweep --out out -- {SMALL} --log_every 2"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


lora_sweep = load_script(SCRIPT)


@pytest.fixture(scope="module")
def workplace(tiny_config, toy_vocab_folder, tmp_path_factory):
    """A folder with a tiny encoder and the first rows of each file of the sample."""
    folder = tmp_path_factory.mktemp("sweep")
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    config = replace(tiny_config, initializer_range=0.2)
    BertModel(config).save_pretrained(folder / "encoder", tokenizer)
    (folder / "data").mkdir()
    for task in TASKS.values():
        for split in ("train", "dev", "test"):
            name = task.file_name(split)
            lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / "data" / name).write_text("".join(lines[:41]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def swept(workplace):
    """The workplace after a whole sweep, and what it printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *COMMAND.split()],
        cwd=workplace, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return workplace, done.stdout


@pytest.fixture
def again(swept, monkeypatch):
    """Calls the finished sweep's command once more, in this process, where training would fail."""
    monkeypatch.chdir(swept[0])
    monkeypatch.setattr(lora_sweep.subprocess, "Popen", lambda *_, **__: pytest.fail("trained"))
    return lambda command=COMMAND: lora_sweep.main(command.split())


def points_of(folder):
    """The finished sweep as the script has it."""
    wanted = lora_sweep.combinations([2, 4], 2.0, 0.5)
    runs = [finished_run(RunFolder(folder / "sweep" / f"LoRA-{c.suffix}")) for c in wanted]
    return [
        lora_sweep.Point(c, run, lora_sweep.standard_error(run))
        for c, run in zip(wanted, runs, strict=True)
    ]


def rows_of(text):
    """The table's rows as dicts by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def metrics_of(run):
    """Lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def scores_by_hand(run):
    """The three scores and the overall of a run, with no code of the program's."""
    found = {}
    for name in ("sst", "para", "sts"):
        lines = (run / f"predictions/{name}-dev-scores.tsv").read_text("utf-8").splitlines()[1:]
        rows = [line.split("\t") for line in lines]
        labels = np.array([float(row[1]) for row in rows])
        found[name] = labels, np.array([row[3:] for row in rows], dtype=float)
    sst = (found["sst"][1].argmax(1) == found["sst"][0]).mean()
    para = ((found["para"][1][:, 0] > 0.5) == found["para"][0]).mean()
    sts = np.corrcoef(found["sts"][0], found["sts"][1][:, 0])[0, 1]
    return [sst, para, sts, (sst + para + (1 + sts) / 2) / 3]


# -------------------------------------------------------------------------------------- the runs


def test_every_combination_is_trained_once_and_the_coinciding_one_too(swept):
    folder, printed = swept
    assert {path.name for path in (folder / "sweep").iterdir()} == set(NAMES)
    assert re.findall(r"^sweep/(\S+) \((\d) of 3\)$", printed, re.MULTILINE) == [
        (name, str(place)) for place, name in enumerate(NAMES, start=1)
    ]
    for name, (r, alpha) in zip(NAMES, [(2, 2), (2, 1), (4, 2)], strict=True):
        args = json.loads((folder / "sweep" / name / "run.json").read_text("utf-8"))["args"]
        assert (args["fine_tune_mode"], args["LoRA_r"], args["LoRA_alpha"]) == ("LoRA", r, alpha)
        assert (args["batch_size"], args["steps_per_epoch"]) == (3, STEPS)
        steps = [m["step"] for m in metrics_of(folder / "sweep" / name) if m["kind"] == "train"]
        assert steps == [2, 4, 6, 8]


def test_predictions_stay_in_the_runs_folders(swept):
    """A sweep must not replace the files that somebody is about to hand in."""
    folder, _ = swept
    assert {path.name for path in folder.iterdir()} == {"encoder", "data", "sweep", "out"}
    for name in NAMES:
        files = {path.name for path in (folder / "sweep" / name / "predictions").iterdir()}
        assert {"sst-test-output.csv", "sts-dev-scores.tsv"} < files


def test_a_second_call_trains_nothing_and_writes_the_same(swept, again, capsys):
    document = swept[0] / "out" / "lora-sweep.md"
    first = document.read_text("utf-8")
    document.unlink()
    again()
    assert capsys.readouterr().out.count("finished already") == 3
    assert document.read_text("utf-8") == first


def test_a_run_without_its_scores_is_continued_and_the_others_are_left(swept, monkeypatch):
    """The twin of the last test: the same call does train where something is missing."""
    folder, _ = swept
    monkeypatch.chdir(folder)
    scores = folder / "sweep" / NAMES[1] / "predictions" / "sst-dev-scores.tsv"
    kept, started = scores.read_text("utf-8"), []

    def write_again(command, **_):
        started.append(command)
        scores.write_text(kept, encoding="utf-8")
        return subprocess.Popen([sys.executable, "-c", ""])

    scores.unlink()
    monkeypatch.setattr(lora_sweep, "subprocess", type("Fake", (), {"Popen": write_again}))
    lora_sweep.main(COMMAND.split())
    (command,) = started
    assert command[-1] == "--resume"
    assert command[command.index("--model_file_suffix") + 1] == "r2-a1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--epochs 2", "--epochs 3"), "--epochs is 3, was 2"),
        ((" --log_every", " --unsupervised_simcse --log_every"), "--unsupervised_simcse is True"),
        (("--data_dir data", f"--data_dir {SAMPLE}"), "is not the sst train file of the run"),
    ],
)
def test_runs_of_other_flags_or_data_are_no_part_of_the_sweep(again, change, said):
    """Their scores would stand in the table as if they were what was asked for."""
    with pytest.raises(UserError, match=f"LoRA-r2-a2 holds another run: .*{said}"):
        again(COMMAND.replace(*change))


def test_flags_without_a_bearing_on_the_result_may_differ(again, tmp_path):
    command = COMMAND.replace("--out out", f"--out {tmp_path}")
    again(command.replace("--log_every 2", "--log_every 7"))
    assert (tmp_path / "lora-sweep.md").exists()


@pytest.mark.parametrize("flag", ["--LoRA_r", "--runs_dir=x", "--overwrite", "--sst_dev_out"])
def test_flags_that_the_sweep_sets_are_refused(flag):
    with pytest.raises(UserError, match=f"{flag} after --"):
        lora_sweep.get_args(["--ranks", "2", "--", "--epochs", "1", flag])


def test_a_mistake_is_one_line_and_nothing_is_trained(workplace, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--runs_dir", str(tmp_path / "x"), "--", "--epoch", "none"],
        cwd=workplace, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: argument --epochs/--epoch: 'none'; expected a whole")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_failing_run_ends_the_sweep_with_its_code_and_one_that_diverges_does_not(
    swept, monkeypatch
):
    monkeypatch.chdir(swept[0])
    wanted = lora_sweep.combinations([2, 4], 2.0, 0.5)
    planned = [(c, lora_sweep.plan(c, "sweep", SMALL.split())) for c in wanted]
    monkeypatch.setattr(lora_sweep, "is_finished", lambda run: run.path.name != NAMES[1])
    monkeypatch.setattr(lora_sweep, "train", lambda flags, run: NotFinite.exit_code)
    done = list(lora_sweep.train_all(planned))
    assert [run is None for _, run in done] == [False, True, False]
    for code, exit_code in ((1, 1), (2, 2), (143, 143), (-9, 137)):
        monkeypatch.setattr(lora_sweep, "train", lambda flags, run, code=code: code)
        with pytest.raises(lora_sweep.RunFailed, match=NAMES[1]) as failure:
            list(lora_sweep.train_all(planned))
        assert failure.value.exit_code == exit_code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_saves_its_run_and_goes_on_there(workplace, tmp_path, number):
    """The run is told to stop too, in order, and the same command continues it."""
    places = ["--runs_dir", str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]
    command = [sys.executable, str(SCRIPT), "--ranks", "4", "--alpha", "2", *places, "--"]
    command += [*SMALL.split(), "--steps_per_epoch", "150", "--log_every", "2"]
    metrics = tmp_path / "sweep" / NAMES[2] / "metrics.jsonl"
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=workplace, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
        )
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    assert "continue with --resume" in (tmp_path / "log").read_text("utf-8")
    stopped = metrics_of(metrics.parent)[-1]["step"]
    assert 0 < stopped < 300
    done = subprocess.run(command, cwd=workplace, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(1 of 1): continued" in done.stdout and "continuing at step" in done.stdout
    steps = [line["step"] for line in metrics_of(metrics.parent) if line["kind"] == "train"]
    assert steps == list(range(2, 301, 2))


# --------------------------------------------------------------------------- table and picture


def test_the_tables_figures_are_those_of_the_runs_files(swept):
    folder, _ = swept
    rows = rows_of((folder / "out" / "lora-sweep.md").read_text("utf-8"))
    assert [(row["r"], row["α"], row["α/r"]) for row in rows] == [
        ("2", "2", "1"), ("2", "1", "0.5"), ("4", "2", "0.5")
    ]  # fmt: skip
    for name, row in zip(NAMES, rows, strict=True):
        run = folder / "sweep" / name
        described, lines = json.loads((run / "run.json").read_text("utf-8")), metrics_of(run)
        scores = scores_by_hand(run)
        columns = ("sst accuracy", "para accuracy", "sts pearson", "overall")
        assert [row[column] for column in columns] == [f"{score:.3f}" for score in scores]
        assert row["trained parameters"] == f"{described['parameters']['trained']:,}"
        assert row["minutes"] == f"{lines[-1]['seconds'] / 60:.1f}"
        speeds = [line["sentences_per_s"] for line in lines if line["kind"] == "train"]
        assert row["sentences/s"] == f"{np.median(speeds):,.0f}"
    trained = [int(row["trained parameters"].replace(",", "")) for row in rows]
    assert trained[0] == trained[1] < trained[2]


def test_the_captions_say_on_what_and_how_sure(swept):
    text = (swept[0] / "out" / "lora-sweep.md").read_text("utf-8")
    captions = re.findall(r"^\*\*(?:Table|Figure) 1\.\*\* .*", text, re.MULTILINE)
    assert len(captions) == 2
    errors = [f"{point.error:.4f}" for point in points_of(swept[0])]
    for caption in captions:
        assert "encoder` (as asked for)" in caption
        assert "training examples: sst 40, para 40, sts 40" in caption
        assert "One seed (11711)" in caption
        assert "(sst 40, para 40, sts 40 examples)" in caption
        assert f"is {min(errors)} to {max(errors)} (bootstrap)" in caption
    for name in NAMES:
        suffix = name.removeprefix("LoRA-")
        script = REPOSITORY / "multitask_classifier.py"
        assert f"    python {script} --fine-tune-mode LoRA {SMALL}" in text
        assert f"--model_file_suffix {suffix} --runs_dir sweep" in text
    assert shlex.join(["python", "benchmarks/lora_sweep.py", *COMMAND.split()]) in text


def test_the_standard_error_shrinks_with_the_square_root_of_the_dev_sets(swept):
    """Four times the examples: half the error. The width of the interval alone would do so too,
    so its size is checked against the formula for accuracies."""
    random, errors = np.random.default_rng(1), []
    run = points_of(swept[0])[0].run
    for count in (400, 1600):
        right = random.random(count) < 0.7
        labels = random.integers(0, 2, count).astype(float)
        result = replace(run.dev["para"], predictions=np.where(right, labels, 1 - labels),
                         labels=labels)  # fmt: skip
        errors.append(lora_sweep.standard_error(replace(run, dev={"para": result})))
        assert errors[-1] == pytest.approx(np.sqrt(0.7 * 0.3 / count), rel=0.1)
    assert errors[1] / errors[0] == pytest.approx(0.5, rel=0.15)


def logged(lines):
    """A run of these (kind, step, seconds) lines."""
    lines = [dict(zip(("kind", "step", "seconds"), line, strict=True)) for line in lines]
    return Run("x", {}, lines, {}, 0.0)


def test_seconds_per_step_leave_set_up_and_evaluations_out():
    lines = [("train", 10, 90.0), ("train", 20, 95.0), ("eval", 20, 195.0), ("train", 30, 201.0),
             ("train", 40, 208.0), ("train", 50, 213.0)]  # fmt: skip
    assert lora_sweep.seconds_per_step(logged(lines)) == pytest.approx(0.5)  # of .5, .7, .5
    assert lora_sweep.seconds_per_step(logged(lines[2:4])) is None


def test_the_coinciding_combination_occurs_once_and_is_a_point_of_both_curves():
    found = lora_sweep.combinations([64, 32, 1, 32], 16.0, 0.5)
    assert [(c.r, c.alpha) for c in found] == [(1, 16), (1, 0.5), (32, 16), (64, 16), (64, 32)]
    assert [c.suffix for c in found] == ["r1-a16", "r1-a0.5", "r32-a16", "r64-a16", "r64-a32"]
    assert [len(c.schemes) for c in found] == [1, 1, 2, 1, 1]


def test_runs_on_other_data_share_no_table(swept):
    first, second, _ = (point.run for point in points_of(swept[0]))
    lora_sweep.check_comparable([first, second])
    for path, key in ((("data", "sts", "dev"), "sts dev file"), (("encoder",), "encoder")):
        description = json.loads(json.dumps(second.description))
        place = description
        for name in path:
            place = place[name]
        place["sha256"] = "0"
        with pytest.raises(UserError, match=f"not comparable with .*LoRA-r2-a2: other {key}"):
            lora_sweep.check_comparable([first, replace(second, description=description)])


def test_the_picture_shows_every_run_at_its_rank_score_and_time(swept):
    folder, points = swept[0] / "out", points_of(swept[0])
    assert (folder / "lora-sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "lora-sweep.pdf").read_bytes().startswith(b"%PDF")
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    lora_sweep.draw_sweep(figure, points)
    left, right = figure.axes
    scores = {point.combination.suffix: point.run.overall for point in points}
    curves = [container.lines[0] for container in left.containers]
    assert [list(curve.get_xdata()) for curve in curves] == [[2, 4], [2, 4]]
    assert [list(curve.get_ydata()) for curve in curves] == [
        [scores["r2-a2"], scores["r4-a2"]], [scores["r2-a1"], scores["r4-a2"]]
    ]  # fmt: skip
    assert curves[0].get_color() != curves[1].get_color()
    times = [lora_sweep.minutes(points[i].run) for i in (0, 2, 1, 2)]
    assert [line.get_xdata()[0] for line in right.lines] == times
    assert [text.get_text() for text in right.texts] == ["r 2", "r 4", "r 2", "r 4"]
    assert left.get_xscale() == "log" and "(0 to 1)" in left.get_ylabel()
    assert "minutes" in right.get_xlabel()
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["α = 2", "α/r = 0.5"]
    assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)


def test_a_run_that_diverged_is_named(swept, tmp_path):
    points = points_of(swept[0])
    gone = lora_sweep.Combination(64, 16.0, "r64-a16", [])
    path = lora_sweep.write_sweep(points, [gone], tmp_path, "command")
    text = Path(path).read_text("utf-8")
    assert "Not finite, without figures: r 64 with α 16." in text
    assert len(rows_of(text)) == 3
