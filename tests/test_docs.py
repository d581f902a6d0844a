"""Every block of the documentation does what it says: run in order, in an empty folder."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import called

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page, "python")
    if not found:
        pytest.skip(f"{page.name} has no python block")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in found:
            exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the steps of a long training: CI has main.py for a whole one."""
    found = blocks(page, "sh")
    lines = [line for block in found for line in block.splitlines() if "surgery " in line]
    if not lines:
        pytest.skip(f"{page.name} has no command of ours")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(re.sub(r"(--max-steps \d+)0\b", r"\1", line))
        assert words[:3] == ["uv", "run", "surgery"]
        assert any(called(*words[3:])), line


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
        timeout=300,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    for piece in ("held-out loss", "with LoRA", "trained", "every frozen tensor has its bits"):
        assert piece in done.stdout
    rows = re.findall(r"^  (before|LoRA disabled) +(\S+) +(\S+)$", done.stdout, re.M)
    assert rows[0][1:] == rows[1][1:], "disabled, the model is what it was"
