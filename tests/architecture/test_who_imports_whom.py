"""The table of DESIGN.md, "Who may import whom", held against the code."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "nanogpt_surgery"

GROUND = {"errors", "values", "arguments", "memory", "files", "report", "drawing"}
MAY_IMPORT = {
    "errors": set(),
    "values": {"errors"},
    "arguments": {"errors"},
    "memory": {"errors"},
    "report": {"errors"},
    "drawing": {"errors"},
    "files": {"errors"},
    "model": GROUND,
    "data": GROUND,
    "history": GROUND,
    "lora": GROUND | {"history"},
    "interpret": GROUND | {"model", "data", "lora"},
    "surgery": GROUND | {"model", "data", "history", "lora", "interpret"},
    "formats": GROUND | {"model", "data", "history", "lora", "surgery"},
    "generation": GROUND | {"model", "data"},
    "training": GROUND | {"model", "data", "lora"},
    "runs": GROUND | {"training", "generation", "formats", "model", "data", "lora", "history"},
}
MAY_IMPORT["serving"] = {*MAY_IMPORT}
LOSSES = "nanogpt_surgery.model.loss"  # cross-entropy and KL, for every room with logits
EVERYTHING = MAY_IMPORT.keys()
MAY_IMPORT |= {"cli": EVERYTHING, "__init__": EVERYTHING, "__main__": {"cli"}}
# Files on their way to another room; each leaves this list when it has arrived.
ON_THE_WAY: set[str] = set()
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The dotted names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module == "nanogpt_surgery":
                yield from (f"nanogpt_surgery.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_it_may(path):
    names = [name.split(".") for name in imported(path) if name != LOSSES]
    rooms = {parts[1] for parts in names if parts[0] == "nanogpt_surgery" and len(parts) > 1}
    room = room_of(path)
    on_the_way = str(path.relative_to(PACKAGE)) in ON_THE_WAY
    more = {"lora"} if path.parent == PACKAGE / "generation" / "native" else set()
    assert (rooms - {room} <= MAY_IMPORT[room] | more) is not on_the_way


def test_the_fast_way_never_imports_the_loop_and_the_loop_only_its_door():
    training = PACKAGE / "training"
    for path in (training / "fast").glob("*.py"):
        assert "nanogpt_surgery.training.fit" not in set(imported(path)), path
    fast = {name for name in imported(training / "fit.py") if ".training.fast" in name}
    assert fast == {"nanogpt_surgery.training.fast.accelerate"}


def test_every_room_is_in_the_table():
    assert {room_of(path) for path in SOURCES} <= MAY_IMPORT.keys()


def test_the_anatomy_needs_torch_alone():
    outside = set().union(*(third_parties(p) for p in SOURCES if room_of(p) == "model"))
    assert outside == {"torch"}


def third_parties(path):
    roots = {name.split(".")[0] for name in imported(path)}
    return roots - set(sys.stdlib_module_names) - {"nanogpt_surgery", "pydoc_data"}


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    declared = {line.split(">")[0].split("=")[0].replace("-", "_") for line in lines}
    used = set().union(*(third_parties(path) for path in SOURCES))
    assert used <= declared


def test_main_py_uses_the_public_names_alone():
    import nanogpt_surgery

    source = (ROOT / "src" / "main.py").read_text(encoding="utf-8")
    names = [name for name in imported(ROOT / "src" / "main.py") if "nanogpt_surgery" in name]
    assert names
    assert {name.removeprefix("nanogpt_surgery.") for name in names} <= set(nanogpt_surgery.__all__)
    assert "argparse" not in source
    assert len(source.splitlines()) <= 100


@pytest.mark.parametrize(
    "module",
    [
        "nanogpt_surgery",
        "nanogpt_surgery.cli",
        "nanogpt_surgery.cli.framework.app",
        "nanogpt_surgery.model.config",
        "nanogpt_surgery.training.settings",
        "nanogpt_surgery.files.writing",
        "nanogpt_surgery.memory",
        "nanogpt_surgery.lora.settings",
        "nanogpt_surgery.cli.commands.serve",
    ],
)
def test_torch_and_the_server_are_not_loaded_by(module):
    heavy = "{'torch', 'starlette', 'uvicorn'}"
    code = f"import sys, {module}; sys.exit(' '.join({heavy} & {{*sys.modules}}) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
