"""`surgery model direction`, and --steer of generate, ask and chat."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import called, write_adapter, write_model

from nanogpt_surgery.formats.direction_file import load_direction
from nanogpt_surgery.surgery import Direction

WORDS = ["--positive", "good.txt", "--negative", "bad.txt"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_adapter(write_model(tmp_path / "m", block_size=64), tmp_path / "a", 1)
    Path("good.txt").write_text("good\nfine words\n")
    Path("bad.txt").write_text("bad\nawful, really\n")
    return tmp_path


def test_a_direction_is_planned_found_and_not_written_over(place: Path) -> None:
    words = ["model", "direction", "m", *WORDS, "--layer", 0, "--layer", 1]
    plan = json.loads(called(*words, "--plan", "--json")[0])
    assert [row["point"] for row in plan["rows"]] == ["layers.0.residual", "layers.1.residual"]
    assert plan["forward passes"] == 4 and plan["tokens"] == 30
    assert not Path("d").exists()
    options = ["--operation", "project_out", "--scale", 0.5, "--position", "mean"]
    report = json.loads(called(*words, "--out", "d", *options, "--json")[0])
    assert report["kl"] > 0
    found = load_direction("d")
    assert (found.operation, found.scale, len(found.vectors)) == ("project_out", 0.5, 2)
    assert "overwrite" in called(*words, "--out", "d", check=1)[1]
    called(*words, "--out", "d", "--overwrite")
    assert load_direction("d").operation == "add"
    assert "good.txt" in called(*words, "--out", "good.txt", "--overwrite", check=1)[1]
    assert Path("good.txt").read_text() == "good\nfine words\n"
    assert (
        "layers.2" in called("model", "direction", "m", *WORDS, "--layer", 2, "--plan", check=1)[1]
    )
    called(*words[:-2], "--layer", 1, "--out", "d.gguf", "--point", "residual_before", check=1)
    assert not Path("d.gguf").exists()
    called("model", "direction", "m", *WORDS, "--layer", 1, "--out", "d.gguf")
    assert list(load_direction("d.gguf").vectors) == ["layers.1.residual"]


def test_generate_and_ask_follow_a_direction_by_the_plain_code(place: Path) -> None:
    called("model", "direction", "m", *WORDS, "--layer", 1, "--out", "d")
    few = ["--temperature", 0, "--max-new-tokens", 12]
    plain, _ = called("generate", "m", "--prompt", "to be", *few)
    steered, said = called("generate", "m", "--prompt", "to be", *few, "--steer", "d=3")
    assert steered != plain and "hook" in said
    assert called("generate", "m", "--prompt", "to be", *few, "--steer", "d=0")[0] == plain
    asked = ["ask", "m", "to be?", *few, "--template", "plain", "--json"]
    both = json.loads(called(*asked, "--steer", "d=3", "--compare")[0])
    assert both["base_answer"] == json.loads(called(*asked)[0])["answer"]
    assert both["answer"] == json.loads(called(*asked, "--steer", "d=3")[0])["answer"]
    assert both["answer"] != both["base_answer"] and "hook" in both["engine"]
    with_adapter = json.loads(called(*asked, "--adapter", "a", "--steer", "d=3", "--compare")[0])
    assert with_adapter["base_answer"] == both["base_answer"]
    assert with_adapter["answer"] != both["answer"]


def test_chat_follows_a_direction_and_goes_without_it_afterwards(place: Path, monkeypatch) -> None:
    def said(*words: object) -> tuple[str, str]:
        typed = io.TextIOWrapper(io.BytesIO(b"to be\n"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", typed)
        few = ["--temperature", 0, "--max-new-tokens", 12, "--template", "none"]
        return called("chat", "m", *few, *words)

    called("model", "direction", "m", *WORDS, "--layer", 1, "--out", "d")
    plain, _ = said()
    steered, errors = said("--steer", "d=3")
    assert steered != plain and "hook" in errors
    generated = ["--prompt", "to be", "--temperature", 0, "--max-new-tokens", 12, "--steer", "d=3"]
    assert called("generate", "m", *generated)[0].removeprefix("to be").strip() == steered.strip()
    assert said("--steer", "d=0")[0] == plain


def test_what_cannot_be_followed_is_refused(place: Path) -> None:
    from nanogpt_surgery.formats.direction_file import save_direction

    save_direction(Direction({"layers.0.residual": torch.ones(9)}), "wide")
    for steer, said in (("wide", "16"), ("missing", "missing"), ("wide=x", "wide=x is not")):
        _, errors = called("generate", "m", "--prompt", "a", "--steer", steer, check=1)
        assert said in errors
