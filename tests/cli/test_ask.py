"""`surgery ask`: the answer of the chat, once; with --compare also without the adapter."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from helpers.commands import called, write_adapter, write_model

from nanogpt_surgery import (
    ChatTemplate,
    Conversation,
    SamplingSettings,
    load_adapter,
    open_model,
)
from nanogpt_surgery.generation.engine import chosen_engine

FEW = ["--max-new-tokens", 8, "--template", "plain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ask")
    write_adapter(write_model(place / "m"), place / "a", 1)
    return place


def answer(
    folder: Path,
    question: str,
    seed: int,
    adapter: bool = False,
    system: str = "",
    temperature: float = 1.0,
) -> str:
    model, tokenizer = open_model(folder / "m")
    if adapter:
        load_adapter(model, folder / "a")
    talk = Conversation(model, tokenizer, ChatTemplate("plain"))
    talk.system = system
    return "".join(talk.ask(question, 8, SamplingSettings(temperature), seed=seed))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stdout_is_the_answer_alone(folder: Path, temperature: float) -> None:
    more = ["--seed", 3, "--temperature", temperature]
    out, errors = called("ask", folder / "m", "where?", *FEW, *more)
    assert out == answer(folder, "where?", 3, temperature=temperature) + "\n"
    assert "8 tokens" in errors  # it was cut off
    out, _ = called("ask", folder / "m", "where?", *FEW, *more, "--adapter", folder / "a")
    assert out == answer(folder, "where?", 3, True, temperature=temperature) + "\n"


def test_the_system_prompt_and_a_named_adapter_count(folder: Path) -> None:
    words = ["where?", *FEW, "--seed", 4, "--system", "Hm.", "--adapter", f"n={folder / 'a'}"]
    assert called("ask", folder / "m", *words)[0] == answer(folder, "where?", 4, True, "Hm.") + "\n"


def test_a_question_from_standard_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.TextIOWrapper(io.BytesIO(b"one\r\ntwo\r\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", data)
    out, _ = called("ask", folder / "m", "-", *FEW, "--seed", 5)
    assert out == answer(folder, "one\ntwo", 5) + "\n"


def test_both_answers_are_drawn_by_one_seed(folder: Path) -> None:
    compare = ["--adapter", folder / "a", "--compare"]
    out, errors = called("ask", folder / "m", "x?", *FEW, *compare)
    seed = int(errors.split("seed ")[1].split()[0])
    base, adapted = answer(folder, "x?", seed), answer(folder, "x?", seed, True)
    assert base != adapted
    first, second = out.split("--- ")[1:]
    assert first.partition("\n")[2] == base + "\n"
    assert second.partition("\n")[2] == adapted + "\n"


def test_as_json(folder: Path) -> None:
    more = ["--adapter", folder / "a", "--compare", "--json", "--seed", 6]
    found = json.loads(called("ask", folder / "m", "x?", *FEW, *more)[0])
    assert found.pop("engine") == str(chosen_engine(open_model(folder / "m")[0], "auto"))
    assert found == {
        "question": "x?",
        "base_answer": answer(folder, "x?", 6),
        "base_ended": "length",
        "answer": answer(folder, "x?", 6, True),
        "ended": "length",
        "seed": 6,
    }


def test_an_empty_answer_is_said(folder: Path) -> None:
    _, tokenizer = open_model(folder / "m")
    [new] = tokenizer.encode("u")
    forced = ["--logit-bias", f"{new}=1e4", "--stop", "u"]
    out, errors = called("ask", folder / "m", "x?", *FEW, *forced)
    assert out == "\n"
    assert "empty" in errors
    found = json.loads(called("ask", folder / "m", "x?", *FEW, *forced, "--json")[0])
    assert (found["answer"], found["ended"]) == ("", "stop")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m", "x?", "--compare"], "--adapter"),
        (["m", " "], "empty"),
        (["m", "x?", "--max-new-tokens", 0], "max_new_tokens is 0"),
        (["a", "x?"], "--adapter a"),
    ],
)
def test_what_is_refused(
    folder: Path, words: list[object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    out, errors = called("ask", *words, check=1)
    assert not out
    assert said in errors


@pytest.mark.parametrize("columns", [60, 120])
def test_side_by_side_where_there_is_room(
    folder: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--max-new-tokens", 70, "--template", "plain", "--temperature", 0]
    monkeypatch.setenv("COLUMNS", str(columns))
    words = ["x?", *few, "--adapter", folder / "a", "--compare"]
    out, _ = called("ask", folder / "m", *words, terminal=True)
    headings = [line for line in out.splitlines() if "without adapter" in line and "with /" in line]
    assert len(headings) == (columns == 120)
    if headings:
        assert max(len(re.sub(r"\x1b\[\d*m", "", line)) for line in out.splitlines()) <= columns


def test_a_draft_leaves_the_answer_and_says_how_often_it_was_right(folder: Path) -> None:
    words = ["ask", folder / "m", "x?", *FEW, "--seed", 3]
    wanted, _ = called(*words)
    out, errors = called(*words, "--draft-model", folder / "m", "--draft-tokens", 2)
    assert out == wanted and "100% of" in errors
    found = json.loads(called(*words, "--speculate", "lookup", "--json")[0])
    assert found["answer"] == wanted.removesuffix("\n")
    assert 0 <= found["accepted"] <= found["drafted"]
    both = ["--draft-model", folder / "m", "--speculate", "lookup"]
    assert "--draft-model" in called(*words, *both, check=1)[1]
