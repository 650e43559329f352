"""The report: every file is written, every number is that of the runs' files, tables are whole."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPOSITORY, SAMPLE

import evaluation
import figures
import multitask_classifier
import report
from bert import BertModel
from config import RECIPES, TASKS, UserError
from evaluation import TaskResult, measure
from run_folder import RunFolder
from tokenizer import BertTokenizer

PICTURES = ("loss-overall", "loss-para", "loss-sts", "loss-sst", "sts-scatter", "gradient-cosines")
RUNS = {  # name -> flags; the first two are seeds of one row
    "full-model-a-s1": ["--model_file_suffix", "a-s1", "--seed", "1"],
    "full-model-a-s2": ["--model_file_suffix", "a-s2", "--seed", "2"],
    "LoRA-simcse-lora": ["--recipe", "simcse-lora"],
    "full-model-surgery": ["--model_file_suffix", "surgery", "--gradient_surgery"],
}


@pytest.fixture(scope="module")
def runs(tiny_config, toy_vocab_folder, tmp_path_factory):
    """Folder of four finished runs of a tiny random encoder on the sample."""
    folder = tmp_path_factory.mktemp("report")
    tokenizer = BertTokenizer.from_pretrained(toy_vocab_folder)
    BertModel(tiny_config).save_pretrained(folder / "encoder", tokenizer)
    common = {"pretrained": "encoder", "runs_dir": "runs", "predictions_dir": "predictions"}
    command = [w for name, path in common.items() for w in (f"--{name}", str(folder / path))]
    command += ["--data_dir", str(SAMPLE), "--batch_size", "4", "--log_every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
        for flags in RUNS.values():
            steps = ["--epochs", "2", "--steps_per_epoch", "3"]
            multitask_classifier.main([*command, *steps, *flags])
    assert {path.name for path in (folder / "runs").iterdir()} == set(RUNS)
    return folder / "runs"


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The folder of the report of all four, and its text."""
    folder = tmp_path_factory.mktemp("written") / "report"
    make_report([runs / name for name in RUNS], folder)
    return folder, (folder / "report.md").read_text(encoding="utf-8")


def make_report(paths, folder):
    """Run the script."""
    evaluation.main(["--report", *map(str, paths), "--report_dir", str(folder)])


def table(text, number):
    """A table of the document: its caption, header and rows, cells as the reader sees them."""
    caption, block = re.search(
        rf"^\*\*Table {number}\.\*\* (.*)\n\n((?:\|.*\n)+)", text, re.MULTILINE
    ).groups()
    header, _, *rows = [
        [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in block.splitlines()
    ]
    return caption, header, rows


def scores_by_hand(run, name):
    """(labels, scores) of a run's dev file, read with no code of the program's."""
    lines = (run / f"predictions/{name}-dev-scores.tsv").read_text("utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return np.array([float(r[1]) for r in rows]), np.array([r[3:] for r in rows], dtype=float)


def overall_by_hand(run):
    """The three scores and the overall of a run, from its files."""
    sst, para, sts = (scores_by_hand(run, name) for name in ("sst", "para", "sts"))
    accuracy = (sst[1].argmax(1) == sst[0]).mean(), ((para[1][:, 0] > 0.5) == para[0]).mean()
    pearson = np.corrcoef(sts[0], sts[1][:, 0])[0, 1]
    return np.array([*accuracy, pearson, (sum(accuracy) + (1 + pearson) / 2) / 3])


# ---------------------------------------------------------------------------------- what is written


def test_every_picture_is_there_as_png_and_pdf_and_shown_by_a_relative_link(written):
    folder, text = written
    for name in PICTURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    links = re.findall(r"\[!\[([^\]]{20,})\]\(([^)]+)\)\]\(([^)]+)\)", text)
    assert [link[1:] for link in links] == [(f"{name}.png", f"{name}.pdf") for name in PICTURES]
    assert {path.stem for path in folder.iterdir()} == {*PICTURES, "report"}


def test_every_caption_names_the_encoder_and_the_data(written):
    captions = re.findall(r"^\*\*(?:Table|Figure) \d+\.\*\* .*", written[1], re.MULTILINE)
    assert len(captions) == 6 + len(PICTURES)
    for caption in captions:
        assert "encoder` (as asked for)" in caption and "**generated sample**" in caption
        assert "sst 520, para 440, sts 440" in caption


def test_a_substituted_encoder_and_real_data_are_named_so(runs, tmp_path):
    """The twin of the last test: its words must not be there whatever was used."""
    run = shutil.copytree(runs / "full-model-a-s1", tmp_path / "run", symlinks=True)
    values = json.loads((run / "run.json").read_text("utf-8"))
    values["encoder"] |= {"substituted": True, "name": "sentence-transformers/all-MiniLM-L6-v2"}
    text = json.dumps(values).replace("data/sample/", "data/course/")
    (run / "run.json").write_text(text, encoding="utf-8")
    make_report([run], tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text("utf-8")
    assert "generated sample" not in text and "as asked for" not in text
    assert text.count("**substituted**") == 6 + len(PICTURES) - 1  # no gradient cosines here
    assert text.count("trained contrastively on Quora") == 2  # beside both paraphrase tables
    assert text.count("ids stand for the texts") == 3  # the files are not where run.json says


def test_columns_fit_and_texts_cannot_break_a_table(written, runs, monkeypatch, tmp_path):
    """A pipe, a star or a tag in a sentence would end the cell, or vanish."""
    nasty = "a | b * c `d` <br> [x](y) $1 \\ " + "long " * 60
    monkeypatch.setattr(report, "dev_texts", lambda run, name: AllTexts(nasty, name))
    make_report([runs / "full-model-a-s1"], tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text("utf-8")
    for document in (written[1], text):
        for number in range(1, 7):
            _, header, rows = table(document, number)
            assert rows and all(len(row) == len(header) for row in rows)
    _, _, rows = table(text, 5)
    assert rows[0][0] == rows[0][1] and rows[0][0].startswith("a | b * c `d` <br> [x](y) $1 \\ lo")
    assert len(rows[0][0]) <= report.LONGEST_TEXT and rows[0][0].endswith("…")


class AllTexts(dict):
    """Gives every id the same sentences."""

    def __init__(self, text, name):
        super().__init__({"": text})
        self.sentences = (text,) * len(TASKS[name].sentences)

    def __getitem__(self, _):
        return self.sentences


# ------------------------------------------------------------------------------------- the numbers


def test_a_single_runs_scores_are_those_of_its_prediction_files(written, runs):
    _, header, rows = table(written[1], 1)
    assert header[2:6] == ["sst accuracy", "para accuracy", "sts pearson", "overall"]
    row = next(row for row in rows if row[0] == "full-model-surgery")
    values = overall_by_hand(runs / "full-model-surgery")
    assert row[1:6] == ["1", *(f"{value:.3f}" for value in values)]
    low, high = map(float, row[6].split(" to "))
    assert low < values[3] < high < low + 0.2


def test_seeds_are_one_row_of_mean_and_standard_deviation(written, runs):
    _, _, rows = table(written[1], 1)
    assert [row[:2] for row in rows] == [
        ["full-model-a", "2"], ["simcse-lora", "1"], ["full-model-surgery", "1"]
    ]  # fmt: skip
    values = [overall_by_hand(runs / name) for name in list(RUNS)[:2]]
    mean, deviation = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
    expected = [f"{m:.3f} ± {d:.3f}" for m, d in zip(mean, deviation, strict=True)]
    assert rows[0][2:7] == [*expected, "–"]


@pytest.mark.parametrize("change", ["lr", "data", "encoder", "precision"])
def test_runs_that_differ_in_more_than_the_seed_are_rows_apart(runs, change):
    """Their mean would be of nothing."""
    first, second = (load(runs / name) for name in list(RUNS)[:2])
    assert len(report.group_runs([first, second])) == 1
    description = json.loads(json.dumps(second.description))
    if change == "lr":
        description["args"]["lr"] = 1e-4
    elif change == "data":
        description["data"]["sts"]["train"]["sha256"] = "0"
    elif change == "encoder":
        description["encoder"]["sha256"] = "0"
    else:
        description["precision"] = "another"
    other = dataclasses.replace(second, description=description)
    assert len(report.group_runs([first, other])) == 2


def test_how_a_run_was_started_and_by_which_version_sets_no_row_apart(runs):
    """A seed run again with --overwrite, or before there was a flag that is at its default."""
    first, second = (load(runs / name) for name in list(RUNS)[:2])
    second.args.update(overwrite=True, debug=True, runs_dir="elsewhere", log_every=1)
    del second.args["layer_decay"]
    assert len(report.group_runs([first, second])) == 1


def load(path):
    """A run as a report takes it."""
    return evaluation.finished_run(RunFolder(path))


def test_the_papers_score_stands_beside_its_recipe_only(written, runs):
    _, header, rows = table(written[1], 1)
    paper = {row[0]: row[header.index("paper's overall")] for row in rows}
    assert paper == {"full-model-a": "–", "simcse-lora": "0.727", "full-model-surgery": "–"}
    assert RECIPES["simcse-lora"].reading in written[1]
    run = load(runs / "LoRA-simcse-lora")
    run.args["LoRA_r"] = 4  # given beside the recipe: no longer the paper's row
    assert [*report.group_runs([run])] == ["LoRA-simcse-lora"]


@pytest.mark.parametrize(
    ("change", "same"),
    [({"lr": 1e-3, "epochs": 99, "batch_size": 64}, True), ({"tasks": ["sst"]}, False),
     ({"gradient_surgery": "sum"}, False), ({"pooling": "cls"}, False)],
)  # fmt: skip
def test_a_recipe_is_the_papers_row_for_any_budget_and_no_other_strategy(runs, change, same):
    run = load(runs / "LoRA-simcse-lora")
    assert run.recipe == "simcse-lora"
    run.args.update(change)
    assert run.recipe == ("simcse-lora" if same else None)


def test_each_tasks_errors_are_those_of_a_run_with_most_tasks(runs):
    """A similarity of .9 alone is no better overall than three tasks at .8."""
    run = load(runs / "LoRA-simcse-lora")
    alone = {
        name: dataclasses.replace(run, path=name, dev={name: run.dev[name]}, overall=0.9)
        for name in run.dev
    }
    assert report.best_run([*alone.values(), run], "sts") is run
    assert report.best_run([alone["sst"], alone["sts"]], "sts") is alone["sts"]
    notes = report.scores_table(report.group_runs([run, alone["sts"]])).notes
    assert any("are not comparable" in note for note in notes)
    assert not any("compare" in n for n in report.scores_table(report.group_runs([run])).notes)


def test_every_run_of_few_pairs_is_named_beside_one_of_many(runs):
    """A paraphrase score of 16,000 pairs beside one of 283,003 needs its note all the same."""
    few, many = load(runs / "LoRA-simcse-lora"), load(runs / "full-model-surgery")
    few.description["data"]["para"]["train"]["examples"] = 16_000
    many.description["data"]["para"]["train"]["examples"] = 283_003
    notes = report.paraphrase_notes([few, many])
    assert "Paraphrase: training saw 16,000 pairs, the paper's some 283,000." in notes
    assert not any("Paraphrase: training" in n for n in report.paraphrase_notes([many]))


def test_costs_are_those_of_the_log(written, runs):
    _, header, rows = table(written[1], 2)
    row = dict(zip(header, next(r for r in rows if r[0] == "simcse-lora"), strict=True))
    lines = (runs / "LoRA-simcse-lora/metrics.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    trained = [line for line in lines if line["kind"] == "train"]
    described = json.loads((runs / "LoRA-simcse-lora/run.json").read_text("utf-8"))
    assert row["steps"] == "6" and row["batch"] == "4"
    assert row["minutes"] == f"{lines[-1]['seconds'] / 60:.1f}"
    speeds = sorted(line["tokens_per_s"] for line in trained)
    assert row["tokens/s"] == f"{(speeds[2] + speeds[3]) / 2:,.0f}"
    peak = max(line["peak_memory_mib"] for line in trained)
    assert row["peak memory (MiB)"] == f"{peak:,}"
    assert row["trained parameters"] == f"{described['parameters']['trained']:,}"


def test_a_run_without_its_log_is_refused(runs, tmp_path):
    run = shutil.copytree(runs / "full-model-surgery", tmp_path / "run", symlinks=True)
    for text in (None, "", "3\n", '{"kind": "eval", "step": 1, "dev": {"sst": {}}}\n'):
        (run / "metrics.jsonl").unlink(missing_ok=True)
        if text is not None:
            (run / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            evaluation.main(["--report", str(run), "--report_dir", str(tmp_path / "report")])


def test_a_run_without_times_and_counts_shows_dashes(runs):
    """A run of an older version still gets a report, without made-up zeros."""
    run = load(runs / "full-model-surgery")
    run.lines = [{k: v for k, v in line.items() if k != "seconds"} for line in run.lines]
    del run.description["parameters"], run.args["batch_sizes"]
    made = report.cost_table({"x": [run]})
    row = dict(zip(made.header, made.cells[0], strict=True))
    assert (row["minutes"], row["trained parameters"], row["of all"]) == ("–", "–", "–")


def test_errors_are_the_most_confident_ones_with_their_texts(written, runs):
    best = max(RUNS, key=lambda name: overall_by_hand(runs / name)[3])
    caption, header, rows = table(written[1], 3)
    assert f"`{best}`" in caption and header[-1] == "probability"
    labels, scores = scores_by_hand(runs / best, "sst")
    sure = np.where(scores.argmax(1) == labels, 0, scores.max(1))
    assert [row[-1] for row in rows] == [f"{p:.2f}" for p in np.sort(sure)[::-1][: len(rows)]]
    first = int(np.argsort(-sure, kind="stable")[0])
    lines = (SAMPLE / "ids-sst-dev.csv").read_text("utf-8").splitlines()
    assert rows[0][0] in " ".join(lines[first + 1].split())
    assert rows[0][1:3] == [str(scores[first].argmax()), f"{labels[first]:.0f}"]
    _, header, rows = table(written[1], 5)
    labels, scores = scores_by_hand(runs / best, "sts")
    far = np.sort(np.abs(scores[:, 0] - labels))[::-1]
    assert [row[-1] for row in rows] == [f"{x:.2f}" for x in far[: len(rows)]]


def test_confident_errors_of_a_yes_or_no_lie_on_both_sides():
    scores = np.array([[0.9], [0.05], [0.6], [0.99]], np.float32)
    result = TaskResult(list("abcd"), scores[:, 0].round(), scores, np.array([0, 1, 0, 1.0]))
    rows = report.worst_errors(TASKS["para"], result)
    assert [row for row, _ in rows] == [1, 0, 2]  # the right answer, row 3, is none
    np.testing.assert_allclose([p for _, p in rows], [0.95, 0.9, 0.6], rtol=1e-6)


def test_the_confusion_matrix_counts_truth_by_row(runs):
    run = load(runs / "full-model-a-s1")
    labels, predictions = np.array([0, 0, 1, 4, 4, 4.0]), np.array([0, 3, 1, 0, 4, 4])
    run.dev["sst"] = TaskResult([], predictions, np.eye(5)[predictions], labels)
    cells = report.confusion_table(run, "sst").cells
    assert cells[0] == ["truth 0", "1", "0", "0", "1", "0", "0.50"]
    assert cells[2] == ["truth 2", "0", "0", "0", "0", "0", "0.00"]
    assert cells[4] == ["truth 4", "1", "0", "0", "0", "2", "0.67"]


def made_up_results(count):
    """Results of a middling model on `count` examples of each task."""
    random, results = np.random.default_rng(5), {}
    for name in ("sst", "para", "sts"):
        labels = random.integers(0, int(TASKS[name].high) + 1, count).astype(float)
        noise = random.normal(size=count)
        predictions = labels + noise if name == "sts" else np.where(noise > 0, labels, 0)
        metrics = measure(TASKS[name], predictions, labels)
        results[name] = TaskResult([], predictions, None, labels, metrics=metrics)
    return results


def test_the_bootstrap_interval_is_repeatable_and_narrows_with_the_data():
    """Four times the examples: about half the width; another seed: another draw, a like width."""
    low, high = report.bootstrap_interval(made_up_results(400))
    assert (low, high) == tuple(report.bootstrap_interval(made_up_results(400)))
    other = report.bootstrap_interval(made_up_results(400), seed=1)
    assert low != other[0] and abs(low - other[0]) < 0.01
    narrow = np.diff(report.bootstrap_interval(made_up_results(1600)))[0]
    assert 0.35 < narrow / (high - low) < 0.7


def test_the_bootstraps_scores_are_the_plain_ones():
    """Every example drawn once gives the run's own overall score."""
    results = made_up_results(50)

    class Once:
        def integers(self, low, high, size):
            return np.tile(np.arange(high), (size[0], 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.np.random, "default_rng", lambda _: Once())
        interval = report.bootstrap_interval(results, draws=3)
    np.testing.assert_allclose(interval, evaluation.overall_score(results), rtol=1e-12)


# ------------------------------------------------------------------------------------- the figures


def test_the_curves_are_the_logged_losses(runs):
    run = load(runs / "LoRA-simcse-lora")
    (steps, losses), (dev_steps, dev_losses) = figures.loss_curves(run, ("sst", "sts"))
    trained = [line for line in run.lines if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6] and dev_steps == [3, 6]
    assert losses == [line["losses"]["sst"] + line["losses"]["sts"] for line in trained]
    dev = [line["dev"] for line in run.lines if line["kind"] == "eval"]
    assert dev_losses == [scores["sst"]["loss"] + scores["sts"]["loss"] for scores in dev]


def test_the_summed_loss_is_that_of_the_tasks_which_all_runs_have(runs):
    """Runs of single tasks have none in common; each of their own pictures is there."""
    run = load(runs / "LoRA-simcse-lora")
    assert len(run.dev) == 3
    some = [
        dataclasses.replace(run, path=path, dev={name: run.dev[name] for name in names})
        for path, names in (("a", ["sst", "sts"]), ("b", ["sst"]), ("c", ["para"]))
    ]
    names = [picture.name for picture in figures.loss_pictures(some)]
    assert names == ["loss-para", "loss-sts", "loss-sst"]
    overall = figures.loss_pictures(some[:2])[0]
    assert overall.name == "loss-overall" and "(sst; without" in overall.caption


def test_smoothing_keeps_a_straight_line_straight_up_to_its_ends():
    """A window that is cut on one side only would bend every curve at its ends."""
    np.testing.assert_allclose(figures.smooth([1, 2, 3, 4, 5, 6, 7], 3), [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_allclose(figures.smooth([0, 3, 0, 3, 0], 1), [0, 1, 2, 1, 0])
    assert figures.smooth([], 1) == []


def test_runs_have_colours_of_their_own_until_there_are_too_many(runs):
    run = load(runs / "full-model-a-s1")
    few = [dataclasses.replace(run, path=f"run{i}") for i in range(len(figures.COLOURS))]
    assert len({colour for colour, _, _ in figures.looks_of(few)}) == len(figures.COLOURS)
    many = [dataclasses.replace(run, path=f"run{i}", row=f"row{i // 3}") for i in range(30)]
    looks = figures.looks_of(many)
    assert looks[0] == looks[1] == looks[2] and len(set(looks)) == 10


def test_no_gradient_cosines_no_picture_of_them(runs, tmp_path):
    make_report([runs / "full-model-a-s1"], tmp_path / "report")
    assert not list((tmp_path / "report").glob("gradient*"))
    assert "gradient-cosines" not in (tmp_path / "report/report.md").read_text("utf-8")


# --------------------------------------------------------------------------------- what is refused


def test_a_run_without_predictions_is_refused_with_the_remedy(runs, tmp_path):
    run = shutil.copytree(runs / "full-model-a-s1", tmp_path / "run", symlinks=True)
    (run / "predictions/para-dev-scores.tsv").unlink()
    with pytest.raises(UserError, match=r"para-dev-scores.tsv: no such file.*--resume"):
        make_report([runs / "full-model-a-s2", run], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not the description of a run"):
        make_report([tmp_path], tmp_path / "report")


def test_the_command_needs_no_model_and_no_reference_library_and_is_quick(runs, tmp_path):
    """From a finished run to the report in one command and under 30 seconds, weights gone."""
    run = shutil.copytree(
        runs / "full-model-a-s1", tmp_path / "run", ignore=shutil.ignore_patterns("best*", "state")
    )
    script = (
        "import sys, evaluation; evaluation.main(sys.argv[1:]); "
        "assert not {'transformers', 'peft', 'sentence_transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, "--report", str(run)]
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 30
    assert (tmp_path / "report/report.md").exists()
