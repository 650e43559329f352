"""report.html in a browser: what a reader clicks, types and points at.

    python -m pytest -m browser

Needs Chromium (Debian: apt-get install chromium). Each test adds a script to a copy of the page,
which acts and leaves what it found in the page; the browser prints the page.
"""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from report_helpers import RUNS, make_report, metrics_of, page_data, scores_by_hand

from config import TASKS

pytestmark = pytest.mark.browser
pytest_plugins = ("report_fixtures",)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--enable-logging=stderr"]  # with what the page writes to its console
HOSTILE = (
    """</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>\u2028"it's" <!--"""
)
BEFORE = """<script>
const problems = [];
addEventListener("error", (event) => problems.push(event.message || event.target.outerHTML), true);
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
</script>"""
AFTER = """<script>
{ // a block, whose names are not those of the page
const all = (selector) => [...document.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);
const texts = (selector) => all(selector).map((node) => node.textContent);
const rows = (selector) => all(selector + " tbody tr").map((row) =>
  [...row.cells].map((cell) => cell.textContent));
function choose(selector, value) {
  one(selector).value = value;
  one(selector).dispatchEvent(new Event("input", { bubbles: true }));
}
const answer = (() => { %s })();
answer.problems = problems;
answer.loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
document.body.replaceChildren(Object.assign(document.createElement("pre"),
  { textContent: JSON.stringify(answer) }));
}
</script></body>"""


@pytest.fixture
def browse(tmp_path):
    """A function that opens a report from disk and returns what a script in its page returns."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.fail(f"no browser: none of {', '.join(BROWSERS)} is installed")

    def run(folder, script, *flags):
        page = (folder / "report.html").read_text("utf-8")
        page = page.replace("<head>", f"<head>{BEFORE}", 1)
        page = page.replace("</body>", AFTER.replace("%s", script))
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        url, profile = (tmp_path / "page.html").as_uri(), f"--user-data-dir={tmp_path / 'profile'}"
        command = [browser, *FLAGS, profile, *flags, "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert re.findall("CONSOLE.*", done.stderr) == []
        answer = json.loads(html.unescape(re.search("<pre>(.*)</pre>", done.stdout, re.DOTALL)[1]))
        assert answer.pop("problems") == [] and answer.pop("loaded") == []
        return answer

    return run


def test_everything_has_a_name_and_can_be_reached_by_keyboard(written, browse):
    script = """
        const nameless = all("input, select").filter((node) => !node.labels[0]?.textContent.trim());
        const buttons = all("button").filter((node) => !node.hidden && !node.textContent);
        return {
          language: document.documentElement.lang, nameless: nameless.length + buttons.length,
          headings: texts("h2"), tables: all("table").length, captions: texts("caption"),
          headers: all("thead th").length, sortable: all("thead th[scope=col] button").length,
          pictures: all("svg[role=img]").map((node) => node.querySelector("title").textContent),
          hidden: all("[hidden]:not(button)").length, live: all("[role=status]").length,
          scrolled: all(".scroll[tabindex='0']").length,
        };"""
    found = browse(written[0], script)
    assert found["language"] == "en" and found["nameless"] == 0 and found["live"] == 2
    assert found["hidden"] == 0
    assert found["tables"] == len(found["captions"]) == found["scrolled"] == 6
    assert found["captions"][0].startswith("Table 1. Dev scores") and all(found["captions"])
    assert found["headers"] == found["sortable"] > 30
    data = page_data(written[0])
    alts = [picture["alt"] for picture in data["pictures"]]
    assert found["pictures"][:6] == alts and found["pictures"][6].startswith("Confusion matrix")
    assert "Two runs side by side" in found["headings"]


def test_a_click_on_a_header_sorts(written, browse):
    """The overall column, down, then up; and a column of words."""
    script = """
        const [header] = all("#cost th").filter((node) => node.textContent === "tokens/s");
        const state = () => [header.ariaSort, rows("#cost").map((row) => row[5])];
        const found = [state()];
        header.querySelector("button").click();
        found.push(state());
        header.querySelector("button").click();
        found.push(state());
        one("#cost th button").click();
        return { found: [...found, state()], words: rows("#cost").map((row) => row[0]),
          sorted: all("#cost th[aria-sort]").length };"""
    answer = browse(written[0], script)
    (before, order), (down, falling), (up, rising), (other, _) = answer["found"]
    speeds = [float(cell.split()[0].replace(",", "")) for cell in order]
    assert before is None and down == "descending" and up == "ascending" and other is None
    assert falling == [order[i] for i in np.argsort(speeds)[::-1]] == rising[::-1]
    assert answer["words"] == ["full-model-a", "full-model-surgery", "simcse-lora"]
    assert answer["sorted"] == 1


def test_errors_are_found_by_text_task_and_run(written, browse):
    script = """
        const status = () => one("#errors [role=status]").textContent;
        const steps = [[rows("#errors").length, status()]];
        one("#errors .scroll + button").click();
        steps.push([rows("#errors").length, status()]);
        choose("#errors [name=task]", "sst");
        steps.push([rows("#errors").length, status()]);
        choose("#errors [name=run]", "LoRA-simcse-lora");
        choose("#errors [name=query]", "  tHe ");
        steps.push([rows("#errors").length, status()]);
        return { steps, rows: rows("#errors"), more: one("#errors .scroll + button").hidden };"""
    found, data = browse(written[0], script), page_data(written[0])
    counts = {
        (run["name"], name): len(task["errors"])
        for run in data["runs"]
        for name, task in run["tasks"].items()
    }
    every, of_sst = (
        sum(n for (_, name), n in counts.items() if name in names)
        for names in (("sst", "para", "sts"), ("sst",))
    )
    run, texts = data["runs"][2]["tasks"]["sst"], data["examples"][0]["texts"]
    wanted = [(row, by) for row, by in run["errors"] if "the" in texts[row][0].lower()]
    assert 0 < len(wanted) < 100 < of_sst < every
    assert found["steps"] == [
        [100, f"{every:,} of {every:,} errors"],
        [200, f"{every:,} of {every:,} errors"],
        [100, f"{of_sst:,} of {every:,} errors"],
        [len(wanted), f"{len(wanted)} of {every:,} errors"],
    ]
    assert found["more"] is True  # all are shown
    for cells, (row, by) in zip(found["rows"], wanted, strict=True):
        truth = f"{data['examples'][0]['truth'][row]:.0f}"
        predicted = f"{run['predicted'][row]:.0f}"
        end = [predicted, truth, f"{by:.2f}", "sst", "LoRA-simcse-lora"]
        assert cells == [texts[row][0], *end]


def test_two_runs_are_compared(written, runs, browse):
    script = """
        choose("#compare [name=a]", "LoRA-simcse-lora");
        choose("#compare [name=b]", "full-model-surgery");
        choose("#compare [name=task]", "sst");
        const found = { scores: rows("#compare > div:nth-of-type(1)"), lists: {} };
        for (const verdict of ["only A right", "only B right", "both wrong", "differ"]) {
          choose("#compare [name=verdict]", verdict);
          one("#compare > div:nth-of-type(2) > button").click();
          found.lists[verdict] = rows("#compare > div:nth-of-type(2)");
        }
        return { ...found, status: one("#compare [role=status]").textContent };"""
    found = browse(written[0], script)
    labels, first = scores_by_hand(runs / list(RUNS)[2], "sst")
    _, second = scores_by_hand(runs / list(RUNS)[3], "sst")
    a, b = first.argmax(1), second.argmax(1)
    accuracy = [(predicted == labels).mean() for predicted in (a, b)]
    gap = f"{accuracy[1] - accuracy[0]:+.3f}"
    assert found["scores"][0] == ["sst accuracy", *(f"{x:.3f}" for x in accuracy), gap]
    assert found["scores"][-1][0] == "overall"
    sides = {"only A right": (a == labels) & (b != labels), "differ": a != b}
    sides |= {"only B right": (a != labels) & (b == labels)}
    sides |= {"both wrong": (a != labels) & (b != labels)}
    for verdict, chosen in sides.items():
        expected = [[f"{v[i]:.0f}" for v in (labels, a, b)] for i in np.flatnonzero(chosen)]
        assert [row[1:4] for row in found["lists"][verdict]] == expected
    assert f"only A right: {sides['only A right'].sum()};" in found["status"]
    assert found["status"].startswith(f"{(a != b).sum()} of {len(labels)} examples")


def test_a_figure_tells_its_values_by_mouse_and_by_keyboard(written, runs, browse):
    """The slider is the browser's own, so its keys need no test."""
    script = """
        const figure = one("#figures figure"), slider = figure.querySelector("input");
        const state = () => [figure.querySelector("label").textContent,
          figure.querySelector(".legend li").textContent, slider.getAttribute("aria-valuetext")];
        slider.value = 0;
        slider.dispatchEvent(new Event("input"));
        const found = [state()], { left, top, width, height } =
          figure.querySelector("svg").getBoundingClientRect();
        figure.querySelector("svg").dispatchEvent(new PointerEvent("pointermove",
          { clientX: left + width - 12, clientY: top + height / 2 }));
        const scatter = all("#figures figure")[4];
        found.push(state());
        return { found, pair: scatter.querySelector(".legend").textContent };"""
    found = browse(written[0], script)
    lines = metrics_of(runs / "full-model-a-s1")
    train = [sum(line["losses"].values()) for line in lines if line["kind"] == "train"]
    dev = [
        sum(of["loss"] for of in line["dev"].values()) for line in lines if line["kind"] == "eval"
    ]
    (first, legend, spoken), (last, at_end, _) = found["found"]
    assert (first, last) == ("Step 1", "Step 6")
    assert legend.strip() == f"full-model-a-s1 (6 steps): training {train[0]:.4g}"
    assert at_end.endswith(f"training {train[-1]:.4g}, dev {dev[-1]:.4g}")
    assert spoken.startswith(f"Step 1: full-model-a-s1 (6 steps) training {train[0]:.4g}; full")
    best = page_data(written[0])["pictures"][4]["panels"][0]["title"]
    labels, scores = scores_by_hand(runs / best, "sts")
    assert f"true {labels[-1]:.3g}, predicted {scores[-1, 0]:.2f}: " in found["pair"]


def test_the_confusion_matrix_is_a_picture_of_the_table(written, browse):
    script = """
        return { picture: texts(".matrix g text"), table: rows("#confusion"),
          hints: texts(".matrix g title") };"""
    found = browse(written[0], script)
    counts = [count for row in found["table"] for count in row[1:-1]]
    assert found["picture"] == counts and len(counts) == 25
    assert found["hints"][1].startswith(f"truth 0, predicted 1: {counts[1]} (")


def test_a_hostile_sentence_is_only_text(runs, tmp_path, browse, monkeypatch):
    """It would end the script element, and would run if it were HTML."""

    def texts(run, name):
        return dict.fromkeys(run.dev[name].ids, (HOSTILE,) * len(TASKS[name].sentences))

    monkeypatch.setattr("reporting.html.dev_texts", texts)
    make_report([runs / "full-model-a-s1"], tmp_path / "report")
    script = """
        choose("#errors [name=task]", "sst");
        choose("#errors [name=query]", "ONERROR='hacked");
        return { rows: rows("#errors"), hacked: typeof hacked, images: all("img").length,
          scripts: all("script").length };"""
    found = browse(tmp_path / "report", script)
    texts = {row[0] for row in found["rows"]}
    assert texts == {HOSTILE} and found["hacked"] == "undefined" and found["images"] == 0
    assert found["scripts"] == 4  # its data, its own, and the two of this test


@pytest.mark.parametrize(("scheme", "is_dark"), [(0, True), (1, False)])
def test_light_and_dark_and_a_phone(written, browse, scheme, is_dark):
    """All text stands out from what is behind it (WCAG: 4.5), and only tables scroll sideways."""
    script = """
        const often = { willReadFrequently: true };
        const canvas = document.createElement("canvas").getContext("2d", often);
        const light = (colour) => {
          canvas.fillStyle = colour;
          canvas.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
            .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const page = getComputedStyle(document.body);
        const contrast = (back, front) => {
          canvas.fillStyle = page.backgroundColor;
          canvas.fillRect(0, 0, 1, 1);
          const [low, high] = [light(back), light(front)].sort((a, b) => a - b);
          return (high + 0.05) / (low + 0.05);
        };
        const cells = all(".matrix rect").map((rect) => {
          const { fill, fillOpacity } = getComputedStyle(rect);
          return contrast(fill.replace("rgb", "rgba").replace(")", `, ${fillOpacity})`),
            getComputedStyle(rect.nextSibling).fill);
        });
        document.documentElement.style.width = "400px"; // the narrowest window is 500
        dispatchEvent(new Event("resize"));
        const free = all("body *").filter((node) => !node.closest(".scroll table, pre, details"));
        return { cells, chart: one("#figures svg").getBoundingClientRect().width,
          right: Math.max(...free.map((node) => node.getBoundingClientRect().right)),
          page: contrast(page.backgroundColor, page.color),
          background: light(page.backgroundColor) };"""
    found = browse(written[0], script, f"--blink-settings=preferredColorScheme={scheme}")
    assert 300 < found["chart"] < found["right"] <= 400
    assert (found["background"] < 0.05) == is_dark
    assert min([found["page"], *found["cells"]]) >= 4.5 and len(found["cells"]) == 25
