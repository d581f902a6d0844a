"""Every block of the documentation does what it says: run in order, in an empty folder."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import called

ROOT = Path(__file__).parents[1]
ADDRESS = "http://127.0.0.1:8000"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [block for block in blocks(page, "python") if ADDRESS not in block]
    if not found:
        pytest.skip(f"{page.name} has no python block")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in found:
            exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the steps of a long training: CI has main.py for a whole one.

    A server runs until the next command of ours; what asks it comes between, also in Python.
    """
    lines = list(commands(page))
    if not lines:
        pytest.skip(f"{page.name} has no command of ours")
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        address = ADDRESS
        for line in lines:
            if not line.startswith("uv run surgery "):
                asked(line.replace(ADDRESS, address))
                continue
            words = shlex.split(re.sub(r"(--max-steps \d+)0\b", r"\1", line))[3:]
            stack.close()
            if words[0] == "serve":
                address = stack.enter_context(served(words))
            else:
                assert any(called(*words)), line


def commands(page: Path) -> Iterator[str]:
    """The commands of the shell blocks that are ours or ask our server, and such Python blocks."""
    text = page.read_text("utf-8").replace("\\\n", "")
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.M | re.S):
        if language == "sh":
            yield from (
                line
                for line in block.splitlines()
                if re.match(r"uv run surgery |curl |printf ", line)
            )
        elif ADDRESS in block or block.startswith("# A small model to serve"):
            yield block


@contextlib.contextmanager
def served(words: list[str]) -> Iterator[str]:
    """The address of a server in a process of its own; SIGTERM ends it with status 0."""
    command = [sys.executable, "-m", "nanogpt_surgery", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().partition(": ")[0]
        finally:
            process.terminate()
            assert process.wait(600) == 0


def asked(what: str) -> None:
    """Runs a line of curl, or one that writes a file, or a block of Python."""
    if what.startswith("printf "):
        text, path = re.fullmatch(r"printf '(.*)' > (\S+)", what).groups()
        Path(path).write_text(text.replace(r"\n", "\n"), "utf-8")
    elif not what.startswith("curl "):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(what, "docs", "exec"), {"__name__": "docs"})
    elif shutil.which("curl") is not None or os.environ.get("CLIENT_TESTS") == "required":
        done = subprocess.run([*shlex.split(what), "--fail"], capture_output=True, timeout=600)
        assert done.returncode == 0, f"{what}\n{done.stdout.decode()}"
        assert done.stdout, what


def heading_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere_and_named_modules_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in heading_anchors(target), link
    for name in re.findall(r"`(\w+/[\w/]+\.py)`", text):
        places = (ROOT, ROOT / "src", ROOT / "src" / "nanogpt_surgery")
        assert any((place / name).is_file() for place in places), name


def test_main_is_one_page_and_tells_the_story(tmp_path: Path) -> None:
    """The real page, with fewer steps and less text: CI runs it whole."""
    page = ROOT / "src" / "main.py"
    text = page.read_text("utf-8")
    assert len(text.splitlines()) <= 100
    assert "argparse" not in text
    short = re.sub(r"\b(400|250)\b", "3", text)
    assert short != text
    short = re.sub(r"\b(python_reference\(\)|python_source\(\)\[:500_000\])", r"\1[:40_000]", short)
    assert short.count("[:40_000]") == 2
    (tmp_path / "main.py").write_text(short, "utf-8")
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    for piece in ("held-out loss", "with LoRA", "trained", "every frozen tensor has its bits"):
        assert piece in done.stdout
    rows = re.findall(r"^  (before|LoRA disabled) +(\S+) +(\S+)$", done.stdout, re.M)
    assert rows[0][1:] == rows[1][1:], "disabled, the model is what it was"
