"""A terminal of 60 columns: no line is longer, and no number is cut in two, in any command."""

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.commands import LETTERS, called

WIDTH = 60
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TINY = ["--n-embd", 32, "--n-head", 2, "--n-layer", 2, "--block-size", 64, "--batch-size", 4]
FEW = ["--max-steps", 6, "--device", "cpu", "--precision", "float32"]


def lines_of(*arguments: object) -> list[str]:
    """What a command shows on a terminal, both streams, line by line."""
    shown = "\n".join(called(*arguments, terminal=True))
    return re.split(r"[\r\n]+", CONTROL.sub("", shown))


@pytest.fixture(autouse=True)
def narrow(tmp_path, monkeypatch):
    """Relative names: a path has no blank to break it at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    Path("t.txt").write_text(
        "What is the cat? It sat on a mat plus one, and was 1,234 to 567,890 years old.\n" * 300
        + LETTERS
    )
    pairs = [{"prompt": f"What is {i} plus one?", "completion": str(i + 1)} for i in range(40)]
    Path("p.json").write_text(json.dumps(pairs))


# In this order: each needs what those before it made.
COMMANDS = {
    "tokenizer train": ["tokenizer", "train", "t.txt", "--vocab-size", 270, "--out", "tok"],
    "data prepare": ["data", "prepare", "t.txt", "--tokenizer", "tok", "--out", "prep"],
    "train": ["train", "t.txt", "--out", "m", *TINY, "--mlp", "gelu_tanh", *FEW],
    "train prepared": ["train", "prep", "--out", "b", *TINY, *FEW, "--evaluate-every", 2],
    "finetune": ["finetune", "m", "p.json", "--out", "a", *FEW, "--batch-size", 4,
                 "--sample-every", 3, "--block-size", 64],
    "finetune plan": ["finetune", "m", "p.json", "--out", "a2", "--plan", "--batch-size", 4],
    "train plan": ["train", "t.txt", "--out", "m2", "--plan", *TINY],
    "plan": ["plan", "m", "--targets", "all-linear"],
    "verify-resume": ["verify-resume", "m", "--before", 4],
    "eval": ["eval", "m", "t.txt"],
    "eval of an adapter": ["eval", "m", "p.json", "--adapter", "a"],
    "inspect": ["inspect", "m"],
    "inspect an adapter": ["inspect", "a"],
    "ask": ["ask", "m", "What is 3 plus one?", "--adapter", "a", "--max-new-tokens", 20,
            "--compare"],
    "generate": ["generate", "m", "--prompt", "The", "--max-new-tokens", 20],
    "chat": ["chat", "m", "--adapter", "a", "--max-new-tokens", 20],
    "data preview": ["data", "preview", "m", "p.json", "--examples", 1],
    "doctor": ["doctor"],
    "merge plan": ["merge", "m", "a", "--plan"],
    "merge": ["merge", "m", "a"],
    "log": ["log", "m"],
    "undo": ["undo", "m"],
    "redo": ["redo", "m"],
    "export": ["export", "m", "--out", "x.gguf"],
}  # fmt: skip


SLOW = ("verify-resume",)  # five processes of its own


def held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command, which may need what those before it made, and looks at its lines."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is 3?\n/help\n")))
    lines = lines_of(*COMMANDS[name])
    assert any(lines), name
    wide = [line for line in lines if len(line) > WIDTH and " " in line.strip()]
    assert wide == [], name
    cut = [pair for pair in pairwise(lines) if re.search(r"\d[,.]?$", pair[0])
           and re.match(r"[,.]?\d", pair[1]) and len(pair[0]) == WIDTH]  # fmt: skip
    assert cut == [], name


def test_lines_fit_and_numbers_stay_whole(monkeypatch):
    """One test, since each command needs what the ones before it made."""
    for name in COMMANDS:
        if name not in SLOW:
            held(name, monkeypatch)


@pytest.mark.slow
def test_lines_of_slow_commands_fit(monkeypatch):
    for name in ("train", *SLOW):
        held(name, monkeypatch)
