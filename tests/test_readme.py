"""The documents name only flags, commands and files that exist, and every module and recipe."""

import re
import shlex

import pytest
from conftest import REPOSITORY, load_script

import evaluation
from config import RECIPES, TASKS
from training.flags import make_parser, parse_command

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FOLDERS = (".", "runtime", "training", "reporting", "studies", "benchmarks", "data")
SCRIPTS = {path.name: path for f in FOLDERS for path in sorted((REPOSITORY / f).glob("[a-z]*.py"))}
OF_TORCHRUN = {"--nproc_per_node", "--nnodes", "--rdzv_endpoint"}
PARSERS = {
    "multitask_classifier.py": parse_command,
    "evaluation.py": evaluation.parse_flags,
    "data/prepare.py": load_script(REPOSITORY / "data/prepare.py").get_args,
}


def test_every_flag_in_the_readme_exists():
    known = OF_TORCHRUN | set(make_parser().all_flags())
    for path in SCRIPTS.values():
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    assert set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", README)) <= known


def test_the_map_of_the_code_names_every_module_and_no_other():
    """A module stands there by its path, or by its name in the line of its folder."""
    named = re.findall(r"(?<![\w/.])(?:[\w.]+/)*\w+\.py\b", README)
    assert [name for name in named if not (REPOSITORY / name).exists() | (name in SCRIPTS)] == []
    assert SCRIPTS.keys() - {name.split("/")[-1] for name in named} == set()


@pytest.mark.parametrize("name", [*RECIPES, *TASKS])
def test_every_recipe_and_task_stands_in_the_readme(name):
    assert f"`{name}`" in README


def commands(document):
    """The words of the indented command lines of a document, shell variables filled in."""
    text = (REPOSITORY / document).read_text(encoding="utf-8").replace("\\\n", " ")
    variables = dict(re.findall(r'^ {4,}([A-Z])="(.*)"$', text, flags=re.MULTILINE))
    for line in re.findall(r"^ {4,}(?:\$ )?((?:pip|python|torchrun|\$).*)$", text, re.MULTILINE):
        for _ in range(2):  # a variable may hold another
            line = re.sub(r"\$(\w+)", lambda match: variables[match[1]], line)
        yield from (shlex.split(part, comments=True) for part in line.split(" && "))


def test_the_scripts_take_the_commands_that_are_printed(tmp_path, monkeypatch):
    """All that is checked before anything loads."""
    monkeypatch.chdir(tmp_path)
    parsed = []
    for words in [*commands("README.md"), *commands("RESULTS.md")]:
        for script in PARSERS.keys() & set(words):
            PARSERS[script]([word for word in words[words.index(script) + 1 :] if word != "FLAGS"])
            parsed.append(script)
    assert parsed.count("multitask_classifier.py") >= 5 and parsed.count("evaluation.py") >= 3
