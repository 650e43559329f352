"""Structure: imports run downward, packages are the agreed ones, functions stay small."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import REPOSITORY

FOLDERS = ("runtime", "training", "reporting", "studies", "benchmarks")
PATHS = [*REPOSITORY.glob("*.py"), *(p for f in FOLDERS for p in (REPOSITORY / f).glob("*.py"))]
MODULES = {".".join(p.relative_to(REPOSITORY).with_suffix("").parts): p for p in sorted(PATHS)}
PROGRAM = [name for name in MODULES if not name.startswith(("studies", "benchmarks"))]
# From the bottom up: a module or folder imports only from lower lines, or from its own folder.
LAYERS = (
    {"config", "simcse", "gradient_surgery", "mlm"},
    {"tokenizer", "datasets", "runtime"},
    {"base_bert"},
    {"bert", "lora"},
    {"heads", "pals"},
    {"multitask_bert"},
    {"training"},
    {"reporting"},
    {"evaluation"},
    {"multitask_classifier"},
    {"studies", "benchmarks"},
)
OURS = set().union(*LAYERS)
NARROW = {  # of the lower lines, these may import only so much
    "tokenizer": {"config"},
    "datasets": {"config"},
    "runtime": {"config", "runtime"},
    "base_bert": {"config", "tokenizer", "runtime"},
    "bert": {"base_bert"},
    "lora": {"config", "base_bert"},
    "heads": {"bert"},
    "pals": {"bert"},
}
PACKAGES = {"torch", "numpy", "tqdm", "sklearn", "scipy", "tokenizers", "safetensors"}
PACKAGES |= {"huggingface_hub", "filelock", "matplotlib"}


def text(name):
    """The source of a module."""
    return MODULES[name].read_text(encoding="utf-8")


def imported(name):
    """The dotted names that a module imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(text(name))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def top(names):
    """The first parts of dotted names: root modules, folders and packages."""
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward_only(name):
    """A new module of the root needs a place in LAYERS."""
    (own,) = top([name])
    assert own in OURS, f"{own} has no place in LAYERS"
    level = next(i for i, layer in enumerate(LAYERS) if own in layer)
    assert top(imported(name)) & OURS <= NARROW.get(own, {own}.union(*LAYERS[:level]))


def test_no_module_imports_itself_through_others():
    graph = {name: (imported(name) & set(MODULES)) - {name} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_encoder_knows_no_method_and_no_task():
    assert not re.search(r"lora|simcse|task|\bpals?\b", text("bert"), re.IGNORECASE)


@pytest.mark.parametrize("name", PROGRAM)
def test_only_the_agreed_packages_are_imported_and_nothing_reads_a_pickle(name):
    library = sys.stdlib_module_names - {"pickle", "shelve", "marshal"}
    assert top(imported(name)) <= PACKAGES | OURS | library
    assert not re.search(r"torch\.load\(|allow_pickle", text(name))


def test_what_takes_seconds_to_import_waits_until_it_is_needed():
    """Only metrics and reports need these. That flags need no torch is tested in test_flags.py."""
    absent = {"transformers", "peft", "sentence_transformers", "matplotlib", "sklearn", "scipy"}
    program = f"import sys, multitask_classifier, evaluation; print(*({absent} & set(sys.modules)))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# --------------------------------------------------------------------------------------- functions


def functions(name):
    """All functions of a module."""
    return [node for node in ast.walk(ast.parse(text(name))) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", PROGRAM)
def test_no_function_takes_more_than_six_parameters(name):
    """But the static `forward` of an autograd function, which takes the tensors of its formula."""
    for function in functions(name):
        named = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
        is_static_forward = function.name == "forward" and "self" not in named
        few = len(named - {"self", "cls", "ctx"}) <= 6
        assert few or is_static_forward, f"{name}:{function.lineno}: {function.name}"


@pytest.mark.parametrize(("name", "most"), [("train", 60), ("main", 50)])
def test_train_and_main_are_short_and_hold_no_function(name, most):
    (found,) = (f for f in functions("multitask_classifier") if f.name == name)
    assert found.end_lineno - found.lineno + 1 <= most
    inner = [node for node in ast.walk(found) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert inner == [found]
