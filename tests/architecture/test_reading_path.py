"""docs/reading.md: each file on the path can be understood from those before it."""

import ast
import re
from pathlib import Path

import pytest

import nanogpt_surgery

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "nanogpt_surgery"
PAGE = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
GROUND = {"errors", "report", "values", "arguments"}
MOST_FILES, MOST_DOORS = 16, 6


def file_of(name):
    """The file that the page names, below the package or from the root."""
    return ROOT / name if name.startswith("src/") else PACKAGE / name


PATH = [file_of(name) for name in re.findall(r"^\d+\. `([^`]+\.py)`", PAGE, re.MULTILINE)]
DOORS = re.findall(r"^- .*", PAGE.partition("## Doors")[2].partition("## ")[0], re.MULTILINE)
BEHIND = {file_of(name) for door in DOORS for name in re.findall(r"`([\w/]+\.py)`", door)}


def imported_files(path):
    """Our files that a file imports, in functions too, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {inner for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped or not isinstance(node, ast.ImportFrom):
            continue
        if node.module == "nanogpt_surgery":
            homes = [nanogpt_surgery._HOME[alias.name] for alias in node.names]
        elif node.module.startswith("nanogpt_surgery."):
            module = node.module.removeprefix("nanogpt_surgery.")
            is_file = (PACKAGE / f"{module.replace('.', '/')}.py").is_file()
            homes = [module] if is_file else [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (PACKAGE / f"{home.replace('.', '/')}.py" for home in homes)


def is_ground(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py") in GROUND


def test_the_page_names_files_that_are_there():
    assert len(PATH) == len(set(PATH)) <= MOST_FILES
    assert len(DOORS) <= MOST_DOORS
    assert all(path.is_file() for path in [*PATH, *BEHIND])
    assert not BEHIND & set(PATH)
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PATH}
    print(f"{sum(lines.values()):,} lines in {len(lines)} files")


@pytest.mark.parametrize("number", range(len(PATH)), ids=[path.name for path in PATH])
def test_a_file_imports_the_ground_what_came_before_it_and_doors(number):
    known = {*PATH[:number], *BEHIND}
    unknown = [path for path in imported_files(PATH[number]) if path not in known]
    assert not [path.name for path in unknown if not is_ground(path)]


def test_every_door_is_opened_from_the_path():
    opened = {path for file in PATH for path in imported_files(file)}
    assert opened >= BEHIND
