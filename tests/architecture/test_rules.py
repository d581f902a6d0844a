"""Rules of the house that a reader of one file cannot check."""

import ast
import re
from pathlib import Path

import pytest
from helpers.models import AXES

from nanogpt_surgery import FAMILIES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "nanogpt_surgery"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ANATOMY = sorted((PACKAGE / "model").glob("*.py"))

ROOMS = ("src", "tests", "benchmarks")
OURS = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
PAGE_TRAINING = PACKAGE / "serving" / "room" / "train.py"
FUNCTION = 50  # lines that a function has at most

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save"}

EVERY_FILE = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@EVERY_FILE
def test_nothing_is_pickled_and_no_foreign_code_is_run(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            assert not UNSAFE_MODULES & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in UNSAFE_MODULES
            assert not {f"{node.module}.{alias.name}" for alias in node.names} & UNSAFE_CALLS
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in UNSAFE_CALLS
            assert "allow_pickle" not in [keyword.arg for keyword in node.keywords]
            assert "trust_remote_code" not in [keyword.arg for keyword in node.keywords]


def functions(path):
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]


def test_no_forward_asks_which_family_it_is_in():
    asked = {*FAMILIES, *AXES, "qk_norm", "tie_head", "model_type", "family", "family_of"}
    asked |= {value for values in AXES.values() for value in values}
    seen = 0
    for path in ANATOMY:
        for function in functions(path):
            if function.name == "forward":
                seen += 1
                attributes = {
                    node.attr
                    for node in ast.walk(function)
                    if isinstance(node, ast.Attribute) and "config" in ast.unparse(node.value)
                }
                assert not asked & (attributes | words(function)), f"{path}: {function.name}"
    assert seen >= 8


def words(function):
    """The text constants of a function, its docstring apart."""
    docstring = ast.get_docstring(function, clean=False)
    constants = [node.value for node in ast.walk(function) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str) and value != docstring}


def test_the_anatomy_names_no_family_outside_its_table():
    for path in ANATOMY:
        if path.name != "config.py":
            constants = {
                node.value
                for node in ast.walk(tree_of(path))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            assert not constants & {*FAMILIES, "model_type"}, path


@EVERY_FILE
def test_the_library_does_not_print(path):
    if path.relative_to(PACKAGE).parts[0] == "cli":
        return
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert "print" not in [ast.unparse(call.func) for call in calls]


@EVERY_FILE
def test_the_library_names_no_command_and_no_flag(path):
    """A hint calls functions and sets settings; the command line turns them into what is typed.

    The page's trainings are the command, in a process of its own.
    """
    if path.relative_to(PACKAGE).parts[0] in ("cli", "__main__.py") or path == PAGE_TRAINING:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(n, False) for n in ast.walk(tree) if isinstance(n, documented)}
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    spoken = [t for t in texts if isinstance(t, str) and t not in docstrings]
    spoken = [t for t in spoken if not t.startswith("torchrun")]  # a program, not ours
    assert not [t for t in spoken if re.search(r"\bsurgery [a-z]|(^|\s)--[a-z]", t)]


@EVERY_FILE
def test_a_docstring_begins_with_a_verb_or_a_noun(path):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, documented)]
    assert not [node for node in nodes if (ast.get_docstring(node) or "").startswith("What ")]


@EVERY_FILE
def test_no_exception_is_swallowed(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "a bare except"
            assert not all(isinstance(line, ast.Pass) for line in node.body), "an empty except"


def test_functions_are_read_in_one_sitting():
    long = {
        node.name: count
        for path in OURS
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (count := node.end_lineno - node.lineno + 1) > FUNCTION
    }
    assert not long
