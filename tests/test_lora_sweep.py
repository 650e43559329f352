"""The sweep of rank and scale: real runs, trained once, and figures that are those of their files.

A tiny random encoder on a part of the sample. Runs are trained in this process; only in the slow
test they are processes of the sweep's.
"""

import io
import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import product
from operator import itemgetter
from subprocess import PIPE, Popen

import numpy as np
import pytest
from conftest import REPOSITORY, SAMPLE
from matplotlib.figure import Figure
from report_helpers import metrics_of, table

from config import UserError
from multitask_classifier import main as train_a_run
from reporting.ensemble import FinishedRun, finished_run
from runtime.script import NotFinite, run_script
from studies import lora_sweep
from training.flags import parse_command
from training.run_folder import RunFolder

SCRIPT = REPOSITORY / "multitask_classifier.py"
NAMES = ["LoRA-r2-a2", "LoRA-r2-a1", "LoRA-r4-a2"]  # α = 2 and α/r = 0.5 are equal at r 4
SMALL = "--pretrained encoder --data_dir data --batch_size 3 --epochs 2 --steps_per_epoch 4"
COMMAND = f"--ranks 4 2 --alpha 2 --scaling 0.5 --runs_dir sweep --out out -- {SMALL} --log_every 2"


def start(folder, flags):
    """Start the sweep as a process in `folder`."""
    command = [sys.executable, "-m", "studies.lora_sweep", *flags.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return Popen(command, cwd=folder, env=env, text=True, stdout=PIPE, stderr=PIPE)


@pytest.fixture(scope="module")
def folder(write_encoder, cut_sample, tmp_path_factory):
    """A folder with a tiny encoder and the first rows of each file of the sample."""
    folder = tmp_path_factory.mktemp("sweep")
    write_encoder(folder / "encoder", initializer_range=0.2)
    shutil.copytree(cut_sample, folder / "data")
    return folder


@pytest.fixture(scope="module")
def swept(folder):
    """The folder after a whole sweep in this process, and what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
        patch.setattr(sys, "argv", [str(SCRIPT)])  # which the runs' commands name
        patch.setattr(lora_sweep, "train", lambda words, _: run_script(train_a_run, words))
        lora_sweep.main(COMMAND.split())
    return folder, printed.getvalue()


@pytest.fixture
def again(swept, monkeypatch):
    """Calls the finished sweep's command once more, in this process, where training would fail."""
    monkeypatch.chdir(swept[0])
    monkeypatch.setattr(lora_sweep.subprocess, "Popen", lambda *_, **__: pytest.fail("trained"))
    return lambda command=COMMAND: lora_sweep.main(command.split())


@pytest.fixture(scope="module")
def points(swept):
    """The points of the finished sweep."""
    runs = [finished_run(RunFolder(swept[0] / "sweep" / name)) for name in NAMES]
    wanted = lora_sweep.combinations([2, 4], 2.0, 0.5)
    return [
        point._replace(run=run, error=lora_sweep.standard_error(run))
        for point, run in zip(wanted, runs, strict=True)
    ]


# -------------------------------------------------------------------------------------- the runs


def test_equal_combinations_occur_once_and_are_points_of_both_curves():
    found = lora_sweep.combinations([64, 32, 1, 32], 16.0, 0.5)
    suffixes = ["r1-a16", "r1-a0.5", "r32-a16", "r64-a16", "r64-a32"]
    assert [point.suffix for point in found] == suffixes
    assert [point.x for point in found] == [1, 1, 32, 64, 64]
    assert [len(point.schemes) for point in found] == [1, 1, 2, 1, 1]


VARIED = [["LoRA_variant", "plain", "dora"], ["LoRA_targets", "query", "query output"]]


def test_any_flag_varies_and_its_values_are_the_words_of_the_command(tmp_path):
    """Of two flags every combination; "on" and "off" for one that takes no value."""
    found = lora_sweep.grid(VARIED)
    values = product(("plain", "dora"), ("query", "query_output"))
    suffixes = [f"LoRA_variant_{v}-LoRA_targets_{t}" for v, t in values]
    assert [point.suffix for point in found] == suffixes
    assert found[3].words == ["--LoRA_variant", "dora", "--LoRA_targets", "query", "output"]
    assert found[3].cells == {"LoRA_variant": "dora", "LoRA_targets": "query output"}
    assert [point.x for point in found] == ["plain", "plain", "dora", "dora"]
    assert [point.schemes for point in found[:2]] == [[f"LoRA_targets {t}"] for t in VARIED[1][1:]]
    words, run = lora_sweep.plan_run(found[3], tmp_path, ["--LoRA_r", "4"])
    assert run.path == tmp_path / f"LoRA-{suffixes[3]}"
    assert parse_command(words).flags.LoRA_targets == ["query", "output"]
    switch = lora_sweep.grid([["unsupervised_simcse", "off", "on", "on"]])
    assert [point.words for point in switch] == [[], ["--unsupervised_simcse"]]
    assert [point.schemes for point in switch] == [["all runs"]] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--vary LoRA_r 4 8 -- --LoRA_r 2", "--LoRA_r after --"),
        ("--vary seed 1 2 -- --runs_dir x", "--runs_dir after --"),
        ("--vary resume on", "--vary resume: a sweep cannot vary this flag"),
        ("--vary seed", "--vary seed: expected each flag once, and its values"),
        ("--vary seed 1 2 --vary seed 3 4", "--vary seed: expected each flag once"),
        ("--vary precision fp32 bf16", "--vary precision: a sweep cannot vary this flag"),
        ("--ranks 2 -- --epochs 1 --LoRA_r 4", "--LoRA_r after --"),
        ("--ranks 2 -- --runs_dir=x", "--runs_dir=x after --"),
        ("--ranks 2 -- --sst_dev_out x", "--sst_dev_out after --"),
    ],
)
def test_flags_that_the_sweep_sets_are_refused(words, message):
    lora_sweep.parse_flags(["--vary", "seed", "1", "2", "--", "--LoRA_r", "4"])
    with pytest.raises(UserError, match=message):
        lora_sweep.parse_flags(words.split())


def test_every_combination_is_trained_once(swept):
    folder, printed = swept
    assert {path.name for path in (folder / "sweep").iterdir()} == set(NAMES)
    assert re.findall(r"^sweep/(\S+) \((\d) of 3\)$", printed, re.MULTILINE) == [
        (name, str(place)) for place, name in enumerate(NAMES, start=1)
    ]
    for name, (r, alpha) in zip(NAMES, [(2, 2), (2, 1), (4, 2)], strict=True):
        args = json.loads((folder / "sweep" / name / "run.json").read_text("utf-8"))["args"]
        assert (args["fine_tune_mode"], args["LoRA_r"], args["LoRA_alpha"]) == ("LoRA", r, alpha)
        assert (args["batch_size"], args["steps_per_epoch"]) == (3, 4)
        steps = [m["step"] for m in metrics_of(folder / "sweep" / name) if m["kind"] == "train"]
        assert steps == [2, 4, 6, 8]
        files = {path.name for path in (folder / "sweep" / name / "predictions").iterdir()}
        assert {"sst-test-output.csv", "sts-dev-scores.tsv"} < files
    # Predictions stay in the runs' folders: somebody may be about to hand in the others.
    assert {path.name for path in folder.iterdir()} == {"encoder", "data", "sweep", "out"}


def test_a_second_call_trains_nothing_and_writes_the_same(swept, again, capsys):
    """Nor with other flags that have no effect on the result."""
    document, changed = swept[0] / "out/lora-sweep.md", COMMAND.replace("_every 2", "_every 7")
    first = document.read_text("utf-8")
    for command in (changed, COMMAND):
        document.unlink()
        again(command)
        assert capsys.readouterr().out.count("already finished") == 3
        assert document.read_text("utf-8") == first.replace(COMMAND, command)


def test_a_run_without_its_scores_is_resumed_and_the_others_are_kept(swept, again, monkeypatch):
    """The twin of the last test: the same call does train if something is missing."""
    scores = swept[0] / "sweep" / NAMES[1] / "predictions" / "sst-dev-scores.tsv"
    text, started = scores.read_text("utf-8"), []

    def write_again(command, **_):
        started.append(command)
        scores.write_text(text, encoding="utf-8")
        return Popen([sys.executable, "-c", ""])

    scores.unlink()
    monkeypatch.setattr(lora_sweep.subprocess, "Popen", write_again)
    again()
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


def test_a_mistake_is_one_line_and_nothing_is_trained(folder, tmp_path):
    process = start(folder, f"--runs_dir {tmp_path}/x -- --epoch none")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith("error: argument --epochs/--epoch: 'none'; expected a whole")
    assert errors.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_failed_run_ends_the_sweep_with_its_code_and_one_that_diverged_does_not(
    swept, monkeypatch
):
    monkeypatch.chdir(swept[0])
    wanted = lora_sweep.combinations([2, 4], 2.0, 0.5)
    planned = [(point, *lora_sweep.plan_run(point, "sweep", SMALL.split())) for point in wanted]
    monkeypatch.setattr(lora_sweep, "is_finished", lambda run: run.path.name != NAMES[1])
    monkeypatch.setattr(lora_sweep, "train", lambda words, run: NotFinite.exit_code)
    done = list(lora_sweep.train_all(planned))
    assert [point.run is None for point in done] == [False, True, False]
    for code, exit_code in ((1, 1), (2, 2), (143, 143), (-9, 137)):
        monkeypatch.setattr(lora_sweep, "train", lambda words, run, code=code: code)
        with pytest.raises(lora_sweep.RunFailed, match=NAMES[1]) as failure:
            list(lora_sweep.train_all(planned))
        assert failure.value.exit_code == exit_code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_saves_its_run_and_the_same_command_resumes_it(folder, tmp_path, number):
    flags = f"--ranks 4 --alpha 2 --runs_dir {tmp_path}/sweep --out {tmp_path}/out -- {SMALL}"
    flags += " --steps_per_epoch 150 --log_every 2"
    run, process = tmp_path / "sweep" / NAMES[2], start(folder, flags)
    while not (run / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    said = "".join(process.communicate(timeout=60))
    assert "continue with --resume" in said and "the sweep's own command resumes it" in said
    assert process.returncode == 128 + number
    assert 0 < metrics_of(run)[-1]["step"] < 300
    process = start(folder, flags)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "(1 of 1): resumed" in output and "resuming at step" in output
    steps = [line["step"] for line in metrics_of(run) if line["kind"] == "train"]
    assert steps == list(range(2, 301, 2))


# --------------------------------------------------------------------------- table and picture


def test_the_figures_of_the_table_are_those_of_the_files(swept):
    folder, _ = swept
    header, rows = table((folder / "out" / "lora-sweep.md").read_text("utf-8"), 1)
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    expected = [("2", "2", "1"), ("2", "1", "0.5"), ("4", "2", "0.5")]
    assert [(row["r"], row["α"], row["α/r"]) for row in rows] == expected
    for name, row in zip(NAMES, rows, strict=True):
        run = folder / "sweep" / name
        described, lines = json.loads((run / "run.json").read_text("utf-8")), metrics_of(run)
        columns = ("sst accuracy", "para accuracy", "sts pearson", "overall")
        best = max((line for line in lines if line["kind"] == "eval"), key=itemgetter("overall"))
        sst, para, sts = (best["dev"][task] for task in ("sst", "para", "sts"))
        scores = sst["accuracy"], para["accuracy"], sts["pearson"], best["overall"]
        assert [row[column] for column in columns] == [f"{score:.3f}" for score in scores]
        assert row["trained parameters"] == f"{described['parameters']['trained']:,}"
        assert row["minutes"] == f"{lines[-1]['seconds'] / 60:.1f}"
        speeds = [line["sentences_per_s"] for line in lines if line["kind"] == "train"]
        assert row["sentences/s"] == f"{np.median(speeds):,.0f}"
    trained = [int(row["trained parameters"].replace(",", "")) for row in rows]
    assert trained[0] == trained[1] < trained[2]


def test_the_captions_name_data_encoder_and_uncertainty(swept, points):
    text = (swept[0] / "out" / "lora-sweep.md").read_text("utf-8")
    captions = re.findall(r"^\*\*(?:Table|Figure) 1\.\*\* .*", text, re.MULTILINE)
    assert len(captions) == 2
    errors = [f"{point.error:.4f}" for point in points]
    for caption in captions:
        assert "encoder` (as asked for)" in caption and "Seed 11711: another one" in caption
        assert "(sst 12, para 12, sts 12 examples)" in caption
        assert f"error of {min(errors)} to {max(errors)} (bootstrap)" in caption
    for suffix in ("r2-a2", "r2-a1", "r4-a2"):
        assert f"    python {SCRIPT} --fine-tune-mode LoRA {SMALL}" in text
        assert f"--runs_dir sweep --model_file_suffix {suffix}" in text
    assert f"`python -m studies.lora_sweep {COMMAND}`" in text


def test_the_standard_error_shrinks_with_the_square_root_of_the_dev_sets(points):
    """Four times the examples: half the error. Its size is that of the formula for accuracies."""
    random, errors, run = np.random.default_rng(1), [], points[0].run
    for count in (400, 1600):
        is_right = random.random(count) < 0.7
        labels = random.integers(0, 2, count).astype(float)
        predictions = np.where(is_right, labels, 1 - labels)
        result = replace(run.dev["para"], predictions=predictions, labels=labels)
        errors.append(lora_sweep.standard_error(replace(run, dev={"para": result})))
        assert errors[-1] == pytest.approx(np.sqrt(0.7 * 0.3 / count), rel=0.1)
    assert errors[1] / errors[0] == pytest.approx(0.5, rel=0.15)


def test_seconds_per_step_leave_set_up_and_evaluations_out():
    logged = [("train", 10, 90.0), ("train", 20, 95.0), ("eval", 20, 195.0), ("train", 30, 201.0)]
    logged += [("train", 40, 208.0), ("train", 50, 213.0)]
    lines = [{"kind": kind, "step": step, "seconds": seconds} for kind, step, seconds in logged]
    assert lora_sweep.seconds_per_step(FinishedRun("x", {}, lines, {}, 0.0)) == 0.5  # of .5, .7, .5
    assert lora_sweep.seconds_per_step(FinishedRun("x", {}, lines[2:4], {}, 0.0)) is None


def test_runs_on_other_data_share_no_table(points):
    first, second, _ = (point.run for point in points)
    lora_sweep.check_comparable([first, second])
    for path, key in ((("data", "sts", "dev"), "sts dev file"), (("encoder",), "encoder")):
        place = description = json.loads(json.dumps(second.description))
        for name in path:
            place = place[name]
        place["sha256"] = "0"
        with pytest.raises(UserError, match=f"not comparable with .*LoRA-r2-a2: other {key}"):
            lora_sweep.check_comparable([first, replace(second, description=description)])


def test_the_picture_shows_every_run_at_its_rank_score_and_time(swept, points):
    folder = swept[0] / "out"
    assert (folder / "lora-sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "lora-sweep.pdf").read_bytes().startswith(b"%PDF")
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    lora_sweep.draw_sweep(figure, points)
    left, right = figure.axes
    by_rank = [container.lines[0] for container in left.containers]
    shown = [[points[0].run, points[2].run], [points[1].run, points[2].run]]
    times = [[max(m["seconds"] for m in run.lines) / 60 for run in of_curve] for of_curve in shown]
    assert [list(curve.get_xdata()) for curve in by_rank] == [[2, 4], [2, 4]]
    assert [list(curve.get_xdata()) for curve in right.lines] == times
    for curves in (by_rank, right.lines):
        scores = [list(curve.get_ydata()) for curve in curves]
        assert scores == [[run.overall for run in of_curve] for of_curve in shown]
    assert [text.get_text() for text in right.texts] == ["r 2", "r 4", "r 2", "r 4"]
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["α = 2", "α/r = 0.5"]
    assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)


def test_a_sweep_of_flags_has_a_column_for_each_and_a_curve_for_each_of_the_others(
    points, tmp_path
):
    runs = [*(point.run for point in points), points[0].run]
    shown = [
        point._replace(run=run, error=0.01)
        for point, run in zip(lora_sweep.grid(VARIED), runs, strict=True)
    ]
    text = lora_sweep.write_sweep(shown, [], tmp_path, "command").read_text("utf-8")
    assert text.startswith("# LoRA_variant, LoRA_targets\n")
    assert r"| LoRA\_variant | LoRA\_targets | trained parameters |" in text
    assert len(re.findall(r"^\| (?:plain|dora) \| query(?: output)? \|", text, re.MULTILINE)) == 4
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    lora_sweep.draw_sweep(figure, shown)
    left, right = figure.axes
    for container, of_curve in zip(left.containers, (runs[::2], runs[1::2]), strict=True):
        assert list(container.lines[0].get_ydata()) == [run.overall for run in of_curve]
    figure.canvas.draw()
    assert [text.get_text() for text in left.get_xticklabels()] == ["plain", "dora"]
    assert [text.get_text() for text in right.texts] == ["plain", "dora"] * 2
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["LoRA_targets query", "LoRA_targets query output"]


def test_a_run_that_diverged_is_named(points, tmp_path):
    (gone,) = lora_sweep.combinations([64], 16.0, 0.25)
    text = lora_sweep.write_sweep(points, [gone], tmp_path, "command").read_text("utf-8")
    assert "Not finite, without figures: r 64, α 16, α/r 0.25." in text
    assert len(re.findall(r"^\| [24] \|", text, re.MULTILINE)) == 3
