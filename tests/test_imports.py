"""Imports run one way, and the program imports the packages of `requirements.txt` alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in sorted(REPOSITORY.glob("*.py"))}
PACKAGES = {
    "torch", "numpy", "tqdm", "sklearn", "tokenizers", "safetensors", "huggingface_hub",
    "matplotlib",
}  # fmt: skip

# From the bottom up: a module may import those of the lines above its own, never one below.
LAYERS = (
    {"config"},
    {"tokenizer", "simcse", "gradient_surgery", "device", "distributed"},
    {"base_bert", "script"},
    {"bert", "lora", "run_folder", "monitor"},
    {"multitask_bert", "datasets", "arguments"},
    {"figures", "saved_models"},
    {"report"},
    {"evaluation"},
    {"preparation"},
    {"multitask_classifier"},
)
# What is to know little: exactly these modules of the project at most.
NARROW = {
    "config": set(),
    "tokenizer": {"config"},
    "base_bert": {"config", "tokenizer"},
    "bert": {"base_bert"},
    "lora": {"config", "base_bert"},
    "simcse": set(),
    "gradient_surgery": set(),
}


def imported(path):
    """Top-level names that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_downwards_only(name):
    """A module that no line of LAYERS has is a new one: it needs its place there."""
    level = next((i for i, layer in enumerate(LAYERS) if name in layer), None)
    assert level is not None, f"{name}.py has no place in LAYERS"
    below = set().union(*LAYERS[:level])
    assert imported(MODULES[name]) & set(MODULES) <= below


@pytest.mark.parametrize("name", NARROW)
def test_the_encoder_and_its_parts_know_nothing_of_the_tasks(name):
    assert imported(MODULES[name]) & set(MODULES) <= NARROW[name]


@pytest.mark.parametrize("name", MODULES)
def test_only_the_agreed_packages_are_imported(name):
    allowed = PACKAGES | set(MODULES) | set(sys.stdlib_module_names)
    assert imported(MODULES[name]) <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_nothing_reads_a_pickle(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert not imported(MODULES[name]) & {"pickle", "shelve", "joblib", "dill", "marshal"}
    assert "torch.load(" not in text
    assert "allow_pickle" not in text


def test_importing_the_script_loads_no_reference_library_and_no_data():
    """They cost seconds at every start; `report` and `matplotlib` are for reports alone."""
    heavy = ["transformers", "peft", "sentence_transformers", "matplotlib", "sklearn", "scipy"]
    program = (
        "import sys, multitask_classifier; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
