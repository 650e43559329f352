"""The documents name only flags, commands and files that exist, and every module and recipe."""

import re
import shlex

from conftest import REPOSITORY, load_script

import evaluation
from config import RECIPES, TASKS
from studies import bias_probe, lora_sweep
from training.flags import make_parser, parse_command

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROGRAM = [".", "runtime", "training", "reporting"]
FILES = [
    path.relative_to(REPOSITORY)
    for folder in [*PROGRAM, "studies", "benchmarks", "data", "tests"]
    for path in (REPOSITORY / folder).glob("*.py")
]
OF_TORCHRUN = {"--standalone", "--nproc_per_node", "--nnodes", "--rdzv_endpoint"}
PARSERS = {  # of `python a/b.py` and of `python -m a.b`
    "multitask_classifier": parse_command,
    "evaluation": evaluation.parse_flags,
    "data.prepare": load_script(REPOSITORY / "data/prepare.py").get_args,
    "benchmarks.throughput": load_script(REPOSITORY / "benchmarks/throughput.py").parse_flags,
    "studies.lora_sweep": lora_sweep.parse_flags,
    "studies.bias_probe": bias_probe.parse_flags,
}


def test_every_flag_in_the_readme_exists():
    known = OF_TORCHRUN | set(re.findall(r"--[\w-]+", make_parser().format_help()))
    for path in FILES:
        known |= set(re.findall(r'"(--[\w-]+)"', (REPOSITORY / path).read_text(encoding="utf-8")))
    assert set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", README)) <= known


def test_the_map_of_the_code_names_every_module_and_no_file_that_is_not_there():
    """By its path, or by its name in the line of its folder."""
    named = set(re.findall(r"(?<![\w/.])(?:[\w.]+/)*\w+\.py\b", README))
    assert named <= {text for path in FILES for text in (str(path), path.name)}
    modules = {path.name for path in FILES if str(path.parent) in PROGRAM} - {"__init__.py"}
    assert modules <= {name.split("/")[-1] for name in named}


def test_every_recipe_and_task_stands_in_the_readme():
    assert [name for name in [*RECIPES, *TASKS] if f"`{name}`" not in README] == []


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
    documents = ("README.md", "RESULTS.md", "results/experiments.md")
    for words in (words for document in documents for words in commands(document)):
        for place, word in enumerate(words):
            assert not word.endswith(".py") or (REPOSITORY / word).exists(), words
            script = word.removesuffix(".py").replace("/", ".")
            if script in PARSERS:
                PARSERS[script]([word for word in words[place + 1 :] if word != "FLAGS"])
                parsed.append(script)
    assert parsed.count("multitask_classifier") >= 5 and parsed.count("evaluation") >= 3
