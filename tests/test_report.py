"""The report: every file is written, every number is that of the runs' files, tables are whole."""

import copy
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from conftest import SAMPLE
from matplotlib.figure import Figure
from report_helpers import RUNS, make_report, metrics_of, page_data, scores_by_hand, table

from config import RECIPES, TASKS, UserError
from reporting import figures, report
from reporting.ensemble import finished_run
from reporting.html import format_page
from reporting.results import TaskResult
from training.run_folder import RunFolder

pytest_plugins = ("report_fixtures",)

PICTURES = ("loss-overall", "loss-para", "loss-sts", "loss-sst", "sts-scatter", "gradient-cosines")


@pytest.fixture
def recipe_run(runs):
    """The run with a recipe, as a report takes it."""
    return finished_run(RunFolder(runs / "LoRA-simcse-lora"))


def overall_by_hand(run):
    """The three scores and the overall score of a run, from its files."""
    sst, para, sts = (scores_by_hand(run, name) for name in ("sst", "para", "sts"))
    accuracy = (sst[1].argmax(1) == sst[0]).mean(), ((para[1][:, 0] > 0.5) == para[0]).mean()
    pearson = np.corrcoef(sts[0], sts[1][:, 0])[0, 1]
    return np.array([*accuracy, pearson, (sum(accuracy) + (1 + pearson) / 2) / 3])


# ---------------------------------------------------------------------------------- what is written


def test_every_picture_is_written_as_png_and_pdf_and_linked(written):
    folder, text = written
    for name in PICTURES:
        for ending, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
            assert (folder / f"{name}.{ending}").read_bytes().startswith(start)
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
    """The twin of the last test, of a run without gradient surgery, its weights and its data."""
    ignored = shutil.ignore_patterns("best*", "state")
    run = shutil.copytree(runs / "full-model-a-s1", tmp_path / "run", ignore=ignored)
    values = json.loads((run / "run.json").read_text("utf-8"))
    values["encoder"] |= {"substituted": True, "name": "sentence-transformers/all-MiniLM-L6-v2"}
    text = json.dumps(values).replace("data/sample/", "data/course/")
    (run / "run.json").write_text(text, encoding="utf-8")
    text = make_report([run], tmp_path / "report")
    assert "generated sample" not in text and "as asked for" not in text
    assert text.count("**substituted**") == 6 + len(PICTURES) - 1
    assert not list((tmp_path / "report").glob("gradient*")) and "gradient-cosines" not in text
    assert text.count("trained contrastively on Quora") == 2  # beside both paraphrase tables
    assert text.count("ids are shown instead of texts") == 3


def test_surgery_on_one_task_has_no_cosines_to_draw(runs):
    """It has no pair of gradients, and logs that no pair conflicts."""
    run = finished_run(RunFolder(runs / "full-model-surgery"))
    run.lines = [{n: v for n, v in line.items() if "cosine" not in n} for line in run.lines]
    assert run.logged("conflicts") and figures.cosine_pictures([run]) == []


def test_texts_cannot_break_a_table(written, runs, monkeypatch, tmp_path):
    """A pipe, a star or a tag in a sentence would end the cell, or vanish."""
    nasty = "a | b * c `d` <br> [x](y) $1 \\ " + "long " * 60

    def texts(run, name):
        return dict.fromkeys(run.dev[name].ids, (nasty,) * len(TASKS[name].sentences))

    monkeypatch.setattr(report, "dev_texts", texts)
    text = make_report([runs / "full-model-a-s1"], tmp_path / "report")
    for document in (written[1], text):
        for number in range(1, 7):
            header, rows = table(document, number)
            assert rows and all(len(row) == len(header) for row in rows)
    _, rows = table(text, 5)
    assert rows[0][0] == rows[0][1] and rows[0][0].startswith("a | b * c `d` <br> [x](y) $1 \\ lo")
    assert len(rows[0][0]) <= report.LONGEST_TEXT and rows[0][0].endswith("…")


# ------------------------------------------------------------------------------- tables 1 and 2


def test_scores_are_those_of_the_prediction_files_and_seeds_are_one_row(written, runs):
    header, rows = table(written[1], 1)
    assert header[2:6] == ["sst accuracy", "para accuracy", "sts pearson", "overall"]
    assert [row[0] for row in rows] == ["full-model-a", "simcse-lora", "full-model-surgery"]
    assert [row[1] for row in rows] == ["2", "1", "1"]
    values = [overall_by_hand(runs / name) for name in list(RUNS)[:2]]
    mean, deviation = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
    expected = [f"{m:.3f} ± {d:.3f}" for m, d in zip(mean, deviation, strict=True)]
    assert rows[0][2:7] == [*expected, "–"]
    values = overall_by_hand(runs / "full-model-surgery")
    assert rows[2][2:6] == [f"{value:.3f}" for value in values]
    low, high = map(float, rows[2][6].split(" to "))
    assert low < values[3] < high < low + 0.2


@pytest.mark.parametrize(
    "place", ["args lr", "data sts train sha256", "encoder sha256", "precision"]
)
def test_runs_that_differ_in_more_than_seed_and_name_are_rows_apart(runs, place):
    """Their mean would be of nothing."""
    first, second = (finished_run(RunFolder(runs / name)) for name in list(RUNS)[:2])
    second.args.update(overwrite=True, debug=True, runs_dir="elsewhere", log_every=7)
    assert len(report.group_runs([first, second])) == 1
    values, (*above, last) = second.description, place.split()
    for key in above:
        values = values[key]
    values[last] = "another"
    assert len(report.group_runs([first, second])) == 2


def test_the_papers_score_stands_beside_its_recipe_only(written, recipe_run):
    """The training budget may differ, other flags of the recipe or beside it may not."""
    header, rows = table(written[1], 1)
    paper = {row[0]: row[header.index("paper's overall")] for row in rows}
    assert paper == {"full-model-a": "–", "simcse-lora": "0.727", "full-model-surgery": "–"}
    assert RECIPES["simcse-lora"].description in written[1]
    recipe_run.args.update(lr=1e-3, epochs=99, batch_size=64)
    assert [*report.group_runs([recipe_run])] == ["simcse-lora"]
    for other in ({"LoRA_r": 4}, {"gradient_surgery": "sum"}):
        run = copy.deepcopy(recipe_run)
        run.args.update(other)
        assert [*report.group_runs([run])] == ["LoRA-simcse-lora"]


def test_each_tasks_errors_are_those_of_a_run_with_most_tasks(recipe_run):
    """A similarity of .9 alone is no better overall than three tasks at .8."""
    sst, sts = (
        dataclasses.replace(recipe_run, path=n, dev={n: recipe_run.dev[n]}, overall=0.9)
        for n in ("sst", "sts")
    )
    assert report.best_run([sst, sts, recipe_run], "sts") is recipe_run
    assert report.best_run([sst, sts], "sts") is sts
    for runs, is_mixed in (([recipe_run, sts], True), ([recipe_run], False)):
        notes = report.scores_table(report.group_runs(runs)).notes
        assert any("are not comparable" in note for note in notes) == is_mixed


def test_few_paraphrase_pairs_are_named_even_beside_a_run_of_many(recipe_run):
    many = copy.deepcopy(recipe_run)
    recipe_run.description["data"]["para"]["train"]["examples"] = 16_000
    many.description["data"]["para"]["train"]["examples"] = 283_003
    note = "Paraphrase: trained on 16,000 pairs; the paper had about 283,000."
    assert note in report.paraphrase_notes([recipe_run, many])
    assert not report.paraphrase_notes([many])


def test_costs_are_those_of_the_log(written, runs):
    header, rows = table(written[1], 2)
    row = dict(zip(header, rows[1], strict=True))
    lines = metrics_of(runs / "LoRA-simcse-lora")
    trained = [line for line in lines if line["kind"] == "train"]
    described = json.loads((runs / "LoRA-simcse-lora/run.json").read_text("utf-8"))
    assert (row["strategy"], row["steps"], row["batch"]) == ("simcse-lora", "6", "4")
    assert row["minutes"] == f"{lines[-1]['seconds'] / 60:.1f}"
    for column, key in (("tokens/s", "tokens_per_s"), ("sentences/s", "sentences_per_s")):
        speeds = sorted(line[key] for line in trained)
        assert row[column] == f"{(speeds[2] + speeds[3]) / 2:,.0f}"
    assert row["peak memory (MiB)"] == f"{max(x['peak_memory_mib'] for x in trained):,}"
    assert row["trained parameters"] == f"{described['parameters']['trained']:,}"


def test_unknown_costs_are_dashes_and_other_batch_sizes_are_listed(recipe_run):
    """As of a run without a step, or of a frozen encoder whose sentences were encoded before."""
    recipe_run.args.update(task_batch_sizes=["para=6"], accumulate=2)
    for line in recipe_run.lines:
        line |= {"sentences_per_s": 0.0}
    recipe_run.lines = [line for line in recipe_run.lines if "tokens_per_s" not in line]
    made = report.cost_table({"x": [recipe_run]})
    row = dict(zip(made.header, made.cells[0], strict=True))
    assert row["batch"] == "8 sst, 12 para, 8 sts"
    assert row["sentences/s"] == row["tokens/s"] == row["peak memory (MiB)"] == "–"


def test_the_batch_of_a_sampled_run_is_that_of_its_first_and_last_epoch(recipe_run):
    """24 and 12 by 8544 : 16002 : 6040, and at the end by their fifth roots (two epochs)."""
    counts = {"sst": 8544, "para": 16002, "sts": 6040}
    data = {name: {"train": {"examples": count}} for name, count in counts.items()}
    recipe_run.description = recipe_run.description | {"data": data}
    recipe_run.args.update(sampling="annealed", accumulate=2, batch_size=8)
    assert report.batch_of(recipe_run) == "14 sst, 24 para, 10 sts to 16 sst, 18 para, 14 sts"
    recipe_run.args.update(sampling="proportional", accumulate=1)
    assert report.batch_of(recipe_run) == "7 sst, 12 para, 5 sts"
    recipe_run.description["processes"] = 4
    assert report.batch_of(recipe_run) == "8 sst, 12 para, 4 sts"


@pytest.mark.filterwarnings("error")
def test_the_bootstrap_interval_is_repeatable(recipe_run):
    first, same, other = (report.bootstrap_interval(recipe_run.dev, seed=n) for n in (1, 1, 2))
    assert (first == same).all() and 0 < abs(first - other).max() < 0.02  # another draw
    for name, of in recipe_run.dev.items():  # of one example, whose correlation is undefined
        recipe_run.dev[name] = TaskResult([], of.predictions[:1], None, of.labels[:1])
    assert np.ptp(report.bootstrap_interval(recipe_run.dev, draws=9)) == 0


def test_the_bootstrap_draws_scores_like_the_runs_own(recipe_run):
    """Every example drawn once gives the run's overall score."""
    once = [np.random.default_rng(0).permutation(len(r.labels)) for r in recipe_run.dev.values()]
    found = report.overall_of_rows(recipe_run.dev, *once)
    assert found == pytest.approx(recipe_run.overall, 1e-12)


# -------------------------------------------------------------------------------- tables 3 to 6


def test_errors_are_the_most_confident_ones_with_their_texts(written, runs):
    best = max(RUNS, key=lambda name: overall_by_hand(runs / name)[3])
    header, rows = table(written[1], 3)
    assert f"most confident dev errors of `{best}`" in written[1] and header[-1] == "confidence"
    labels, scores = scores_by_hand(runs / best, "sst")
    sure = np.where(scores.argmax(1) == labels, 0, scores.max(1))
    assert [row[-1] for row in rows] == [f"{p:.2f}" for p in np.sort(sure)[::-1][: len(rows)]]
    first = int(np.argsort(-sure, kind="stable")[0])
    lines = (SAMPLE / "ids-sst-dev.csv").read_text("utf-8").splitlines()
    assert rows[0][0] in " ".join(lines[first + 1].split())
    assert rows[0][1:3] == [str(scores[first].argmax()), f"{labels[first]:.0f}"]
    labels, scores = scores_by_hand(runs / best, "sts")
    far = np.sort(np.abs(scores[:, 0] - labels))[::-1]
    assert [row[-1] for row in table(written[1], 5)[1]] == [f"{x:.2f}" for x in far[:8]]


def test_confident_errors_of_a_yes_or_no_lie_on_both_sides():
    scores = np.array([[0.9], [0.05], [0.6], [0.99]], np.float32)
    result = TaskResult(list("abcd"), scores[:, 0].round(), scores, np.array([0, 1, 0, 1.0]))
    rows = report.worst_errors(TASKS["para"], result)
    assert [row for row, _ in rows] == [1, 0, 2]  # row 3 is right
    np.testing.assert_allclose([p for _, p in rows], [0.95, 0.9, 0.6], rtol=1e-6)


def test_the_confusion_matrix_counts_truth_by_row(recipe_run):
    labels, predictions = np.array([0, 0, 1, 4, 4, 4.0]), np.array([0, 3, 1, 0, 4, 4])
    recipe_run.dev["sst"] = TaskResult([], predictions, np.eye(5)[predictions], labels)
    cells = report.confusion_table(recipe_run, "sst").cells
    assert cells[0] == ["truth 0", "1", "0", "0", "1", "0", "0.50"]
    assert cells[2] == ["truth 2", "0", "0", "0", "0", "0", "0.00"]
    assert cells[4] == ["truth 4", "1", "0", "0", "0", "2", "0.67"]


# ------------------------------------------------------------------------------------- report.html


def test_the_page_has_every_dev_error_of_every_run(written, runs):
    data = page_data(written[0])
    assert [run["name"] for run in data["runs"]] == list(RUNS)
    for run in data["runs"]:
        assert run["scores"]["overall"] == pytest.approx(overall_by_hand(runs / run["name"])[3])
        for name, found in run["tasks"].items():
            labels, scores = scores_by_hand(runs / run["name"], name)
            predicted = {"sst": scores.argmax(1), "para": scores[:, 0].round(), "sts": scores[:, 0]}
            wrong = np.flatnonzero(predicted[name].astype(np.float32) != labels.astype(np.float32))
            assert sorted(row for row, _ in found["errors"]) == wrong.tolist()
            order = [by for _, by in found["errors"]]
            assert order == sorted(order, reverse=True)
            np.testing.assert_allclose(found["predicted"], predicted[name], atol=1e-6)
            np.testing.assert_allclose(data["examples"][found["examples"]]["truth"], labels)
    assert len(data["examples"]) == 3  # shared by the four runs
    lines = (SAMPLE / "ids-sst-dev.csv").read_text("utf-8").splitlines()[1:]
    for (text,), line in zip(data["examples"][0]["texts"], lines, strict=True):
        assert text in line


def test_the_page_loads_nothing(written):
    page = (written[0] / "report.html").read_text("utf-8")
    code = page.replace(json.dumps(page_data(written[0])), "")
    assert set(re.findall(r"https?://[^\"'\s]+", code)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bsrc=|href=\"(?!#)|url\(|@import|\bfetch\b|innerHTML|\bimport\b", code)
    assert "default-src 'none'" in code


def test_no_text_ends_the_script_element_of_the_page():
    text = "</script><script>alert(1)</script><!-- <script> \u2028 \" ' {{data}} \\"
    page, plain = (format_page({"command": words}, {}, [], []) for words in (text, "plain"))
    for sign in ("<", "\u2028"):
        assert page.count(sign) == plain.count(sign)
    found = re.search(r'id="data">(.*?)</script', page, re.DOTALL)[1]
    assert json.loads(found)["command"] == text


def test_runs_of_one_name_are_told_apart(recipe_run, tmp_path):
    """Both are called LoRA, say, in two folders."""
    other = dataclasses.replace(recipe_run, path=f"elsewhere/{recipe_run.name}")
    report.write_report([recipe_run, other], tmp_path)
    data = page_data(tmp_path)
    assert [run["name"] for run in data["runs"]] == [recipe_run.path, other.path]
    assert len({curve["name"] for curve in data["pictures"][0]["panels"][0]["curves"]}) == 2


# ----------------------------------------------------------------------------------------- figures


def test_the_curves_are_the_logged_losses(recipe_run):
    (steps, losses), (dev_steps, dev_losses) = figures.loss_curves(recipe_run, ("sst", "sts"))
    trained = [line for line in recipe_run.lines if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6] and dev_steps == [3, 6]
    assert losses == [line["losses"]["sst"] + line["losses"]["sts"] for line in trained]
    dev = [line["dev"] for line in recipe_run.lines if line["kind"] == "eval"]
    assert dev_losses == [scores["sst"]["loss"] + scores["sts"]["loss"] for scores in dev]


def test_the_summed_loss_is_that_of_the_tasks_which_all_runs_have(recipe_run):
    """Runs of single tasks have none in common; each of their own pictures is there."""
    some = [
        dataclasses.replace(recipe_run, path=path, dev={n: recipe_run.dev[n] for n in names})
        for path, names in (("a", ["sst", "sts"]), ("b", ["sst"]), ("c", ["para"]))
    ]
    names = [picture.name for picture in figures.loss_pictures(some)]
    assert names == ["loss-para", "loss-sts", "loss-sst"]
    overall = figures.loss_pictures(some[:2])[0]
    assert overall.name == "loss-overall" and "(sst; without" in overall.caption


def with_losses(run, name, losses):
    """The run under another name with these losses in `sst`, logged every 10 steps, and on dev."""
    logged = zip(range(10, 10 * len(losses) + 1, 10), losses, strict=True)
    lines = [{"kind": "train", "step": step, "losses": {"sst": loss}} for step, loss in logged]
    lines += [{"kind": "eval", "step": 10 * len(losses), "dev": {"sst": {"loss": losses[-1]}}}]
    return dataclasses.replace(run, path=name, dev={"sst": run.dev["sst"]}, lines=lines)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_one_run_of_large_losses_does_not_squeeze_the_others(recipe_run, count):
    """Nor do the first steps; what lies beyond the axis is drawn at its edge, and named."""
    falling = [30, *np.linspace(2, 1, 39)]
    good = [with_losses(recipe_run, f"good{i}", falling) for i in range(count)]
    bad = with_losses(recipe_run, "bad", [500] * 20)
    panel = figures.loss_panel([bad, *good], ["sst"], "nats")
    assert panel.limits[0] == 1 and 2 < panel.limits[1] < 5
    assert "bad (up to 500)" in panel.note and "good0 (up to 30)" in panel.note
    figure = Figure()
    figures.draw_losses(figure, panel)
    drawn = [y for line in figure.axes[0].lines for y in line.get_ydata()]
    assert max(drawn) == panel.limits[1]
    low, high = figure.axes[0].get_ylim()
    assert low < min(drawn) and max(drawn) < high  # the edge is in sight
    assert figure.axes[0].get_title(loc="left").startswith("Drawn at the edge")


def test_losses_of_one_kind_are_all_within_the_axis(recipe_run):
    runs = [with_losses(recipe_run, "a", [3, 2, 1]), with_losses(recipe_run, "b", [2.5, 2, 1.8])]
    panel = figures.loss_panel(runs, ["sst"], "nats")
    assert panel.limits == (1, 3) and panel.note == "" and not panel.is_log


def test_the_legend_tells_runs_of_unlike_length_apart(recipe_run):
    """And the longer its names, the fewer stand side by side, so that none is cut off."""
    runs = [with_losses(recipe_run, "a", [3, 2] * 90), with_losses(recipe_run, "b" * 60, [3, 2])]
    for shown in (runs[:1], runs):
        figure = Figure(figsize=(8, 5), layout="constrained")
        figures.draw_losses(figure, figures.loss_panel(shown, ["sst"], "nats"))
        figure.draw_without_rendering()
        legend = figure.legends[0]
        assert legend.get_window_extent().width < figure.bbox.width
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:2] == ["a (1,800 steps)", "b" * 60 + " (20 steps)"]
    ends = [line for line in figure.axes[0].lines if line.get_markevery() == [-1]]
    assert [max(line.get_xdata()) for line in ends] == [1800, 20]


def test_smoothing_keeps_a_straight_line_straight_up_to_its_ends():
    """A window that is cut on one side only would bend every curve at its ends."""
    np.testing.assert_allclose(figures.smooth([1, 2, 3, 4, 5, 6, 7], 3), [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_allclose(figures.smooth([0, 3, 0, 3, 0], 1), [0, 1, 2, 1, 0])
    assert figures.smooth([], 1) == []


def test_runs_have_different_colours_until_there_are_too_many(recipe_run):
    count = len(figures.COLOURS)
    made = [dataclasses.replace(recipe_run, path=f"{i}", row=f"{i // 3}") for i in range(30)]
    assert len({colour for colour, _, _ in figures.looks_of(made[:count])}) == count
    looks = figures.looks_of(made)
    assert looks[0] == looks[1] == looks[2] and len(set(looks)) == 10


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", None, r"metrics\.jsonl"),
        ("metrics.jsonl", "", r"metrics\.jsonl"),
        ("metrics.jsonl", "3\n", r"metrics\.jsonl"),
        ("metrics.jsonl", '{"kind": "eval", "step": 1, "dev": {"sst": {}}}\n', r"metrics\.jsonl"),
        ("predictions/para-dev-scores.tsv", None, r"scores\.tsv: no such file.*--resume"),
        ("run.json", None, "not the description of a run"),
    ],
)
def test_a_run_with_a_missing_or_damaged_file_is_refused(runs, tmp_path, name, text, message):
    run = shutil.copytree(runs / "full-model-surgery", tmp_path / "run", symlinks=True)
    (run / name).unlink()
    if text is not None:
        (run / name).write_text(text)
    with pytest.raises(UserError, match=message):
        make_report([runs / "full-model-a-s2", run], tmp_path / "report")
    assert not (tmp_path / "report").exists()
