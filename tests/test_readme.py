"""The README names what there is: every flag, every file, and nothing that is not there."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import load_script

import evaluation
from arguments import get_args, make_parser
from config import RECIPES, TASKS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGS = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", README))
OF_OTHERS = {"--nproc_per_node", "--nnodes", "--rdzv_endpoint"}  # torchrun's
BY_TASK = {f"--{task}_{what}" for task in TASKS for what in
           ("train", "dev", "test", "dev_out", "test_out")}  # fmt: skip


def known_flags():
    """All flags of both scripts and of the others that the README mentions."""
    own = {name for action in make_parser()._actions for name in action.option_strings}
    for script in ("evaluation.py", "data/prepare.py", "benchmarks/throughput.py"):
        own |= set(re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text(encoding="utf-8")))
    return own | OF_OTHERS


def test_every_flag_of_the_training_script_is_explained():
    flags = {name for action in make_parser()._actions for name in action.option_strings}
    assert flags - FLAGS - BY_TASK - {"-h", "--help"} == set()
    assert {"--sst_train", "--cfimdb_test", "--sst_dev_out", "--cfimdb_test_out"} < FLAGS


def test_every_flag_in_the_readme_exists():
    assert FLAGS - known_flags() - {"--"} == set()


@pytest.mark.parametrize("path", sorted(p.name for p in ROOT.glob("*.py")))
def test_every_module_stands_in_the_table_of_files(path):
    assert f"| `{path}` |" in README


def test_every_file_in_the_table_exists():
    names = re.findall(r"^\| `([\w/.]+)` \| [a-z]", README, flags=re.MULTILINE)
    files = [name for name in names if name.endswith((".py", "/"))]
    assert len(files) > 15
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_every_recipe_stands_in_the_readme():
    assert [name for name in RECIPES if f"| `{name}` |" not in README] == []


def commands(document):
    """The indented command lines of a document, its shell variables and placeholders filled in."""
    text = (ROOT / document).read_text(encoding="utf-8")
    variables = dict(re.findall(r'^    ([A-Z])="(.*)"$', text, flags=re.MULTILINE))
    for line in re.findall(r"^    (?:\$ )?((?:pip|python|\$).*)$", text, flags=re.MULTILINE):
        for _ in range(2):  # one of them holds another
            line = re.sub(r"\$(\w+)", lambda match: variables[match[1]], line)
        yield from re.sub(r"\bFLAGS\b", "", line).split(" && ")


PARSERS = {
    "multitask_classifier.py": get_args,
    "evaluation.py": evaluation.get_args,
    "data/prepare.py": load_script(ROOT / "data/prepare.py").get_args,
}


@pytest.mark.parametrize("document", ["README.md", "RESULTS.md"])
def test_the_scripts_take_the_commands_that_are_printed(document, tmp_path, monkeypatch):
    """Those of a line of their own, against all that is checked before anything loads."""
    monkeypatch.chdir(tmp_path)
    seen = dict.fromkeys(PARSERS, 0)
    for command in commands(document):
        words = shlex.split(command, comments=True)
        if words[0] == "python" and words[1] in PARSERS:
            PARSERS[words[1]](words[2:])
            seen[words[1]] += 1
    assert seen["multitask_classifier.py"] >= 5 and seen["evaluation.py"] >= 3, seen


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
