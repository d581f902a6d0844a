"""`surgery generate` on many prompts, several times each, with log-probabilities."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers.commands import called, write_model
from helpers.tokenizers import byte_level

from nanogpt_surgery import CharacterTokenizer, SimpleGPT, generate, open_model, save_model
from nanogpt_surgery.cli.framework.app import run
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.generation.engine import chosen_engine

FEW = ["--max-new-tokens", 6, "--seed", 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("generate")
    write_model(place / "m")
    (place / "prompts.txt").write_text("abc\n\nThe fox\nx\n")
    (place / "prompts.CSV").write_text("id,prompt\n1,abc\n2,The fox\n3,x\n")
    (place / "prompts.jsonl").write_text('{"prompt": "abc"}\n"The fox"\n{"prompt": "x"}\n')
    return place


def records(folder: Path, *arguments: object) -> list[dict]:
    out, _ = called("generate", folder / "m", *arguments, "--json")
    return [json.loads(line) for line in out.splitlines()]


def alone(folder: Path, prompt: str, seed: int) -> str:
    model, tokenizer = open_model(folder / "m")
    return tokenizer.decode(list(generate(model, tokenizer.encode(prompt), 6, seed=seed)))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.CSV"])
def test_a_file_of_prompts_is_continued_as_each_alone(folder: Path, name: str) -> None:
    few = [*FEW, "--samples", 2, "--batch-size", 4]
    found = records(folder, "--prompts", folder / name, *few)
    expected = [(text, sample) for text in ("abc", "The fox", "x") for sample in (1, 2)]
    assert [(r["prompt"], r["sample"]) for r in found] == expected
    assert [r["text"] for r in found] == [
        alone(folder, r["prompt"], 3 + i) for i, r in enumerate(found)
    ]
    assert {r["ended"] for r in found} == {"length"}
    assert len({r["text"] for r in found}) == 6


def test_what_computed_a_text_is_told(folder: Path) -> None:
    model, _ = open_model(folder / "m")
    for flags, engine in (((), "auto"), (("--plain",), "plain")):
        found = records(folder, "--prompt", "x", *FEW, "--samples", 2, *flags)
        assert [r["engine"] for r in found] == [str(chosen_engine(model, engine))] * 2
    assert found[0]["engine"].startswith("plain")


def test_seeds_of_further_prompts_begin_again_after_the_largest(folder: Path) -> None:
    last = 2**64 - 1
    words = ["--max-new-tokens", 6, "--seed", last, "--batch-size", 1]
    found = records(folder, "--prompts", folder / "prompts.txt", *words)
    seeds = (last, 0, 1)
    expected = [alone(folder, r["prompt"], seed) for r, seed in zip(found, seeds, strict=True)]
    assert [r["text"] for r in found] == expected


def test_log_probabilities_are_those_of_a_plain_pass(folder: Path) -> None:
    [found] = records(folder, "--prompt", "abc", *FEW, "--logprobs", 2)
    model, tokenizer = open_model(folder / "m")
    text = "abc"
    for token in found["tokens"]:
        with torch.no_grad():
            plain = model(torch.tensor([tokenizer.encode(text)]))[0, -1].log_softmax(-1)
        assert token["logprob"] == pytest.approx(float(plain[token["id"]]), abs=1e-4)
        assert [other["id"] for other in token["likeliest"]] == plain.topk(2).indices.tolist()
        text += token["text"]
    assert text == "abc" + found["text"]


def test_for_people(folder: Path) -> None:
    words = ["--prompt", "abc", *FEW, "--samples", 2, "--logprobs", 1]
    shown, _ = called("generate", folder / "m", *words)
    assert shown.startswith("--- sample 1\nabc")
    assert shown.count("--- sample") == 2
    assert len(shown.splitlines()) >= 2 * 2 + 2 * 6


def test_a_bias_bans_and_forces(folder: Path) -> None:
    _, tokenizer = open_model(folder / "m")
    [index] = tokenizer.encode("q")
    forced, _ = called(
        "generate", folder / "m", "--prompt", "a", *FEW, "--logit-bias", f"{index}=1e4"
    )
    assert forced == "aqqqqqq\n"
    banned = [
        word for i in range(tokenizer.vocab_size - 1) for word in ("--logit-bias", f"{i}=-inf")
    ]
    only, _ = called("generate", folder / "m", "--prompt", "a", *FEW, *banned)
    assert only == "a" + tokenizer.decode([tokenizer.vocab_size - 1]) * 6 + "\n"


def test_a_stop_string_ends_one_row_and_not_the_others(folder: Path) -> None:
    free = records(folder, "--prompts", folder / "prompts.txt", *FEW)
    cut = free[1]["text"][2:4]
    found = records(
        folder, "--prompts", folder / "prompts.txt", *FEW, "--stop", cut, "--logprobs", 0
    )
    assert found[1]["text"] == free[1]["text"].partition(cut)[0]
    assert found[1]["ended"] == "stop"
    assert len(found[1]["tokens"]) == free[1]["text"].index(cut) + 2, "it ends with the stop string"
    for i in (0, 2):
        assert found[i]["text"] == free[i]["text"].partition(cut)[0]


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["--logit-bias", "x"], ["--logit-bias x is not ID=BIAS"]),
        (["--logit-bias", "1=nan"], ["logit_bias"]),
        (["--logit-bias", "999=1"], ["999", "0 to 95"]),
        (["--samples", "0", "--logprobs", "-1"], ["samples is 0", "logprobs is -1"]),
        (["--prompts", "no.txt"], ["no.txt"]),
        (["--prompts", "bad.jsonl"], ["bad.jsonl", "record 2 has no prompt"]),
        (["--prompts", "empty.txt"], ["empty.txt", "there are none"]),
        (["--prompts", "latin1.txt"], ["latin1.txt", "0xe9 at position 3"]),
        (["--samples", "2", "--max-new-tokens", "-10"], ["max_new_tokens is -10"]),
        (["--stop", ""], ["a stop string is empty"]),
    ],
)
def test_errors_are_sentences(folder: Path, monkeypatch, arguments, pieces) -> None:
    monkeypatch.chdir(folder)
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompts": "a"}\n')
    (folder / "empty.txt").write_text("\n")
    (folder / "latin1.txt").write_bytes(b"caf\xe9\n")
    out, errors = called("generate", "m", *arguments, check=1)
    for piece in pieces:
        assert piece in errors
    assert out == ""


def test_prompts_are_split_at_line_ends_alone(folder: Path, tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d\u2029e"]
    letters = CharacterTokenizer("".join(texts))
    save_model(SimpleGPT(letters.vocab_size, 8, 2, 1, 30), tmp_path / "m", letters)
    (tmp_path / "p.txt").write_bytes("\r\n".join([*texts, ""]).encode())
    out, _ = called("generate", tmp_path / "m", "--prompts", tmp_path / "p.txt", *FEW, "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == texts


def test_a_prompt_on_standard_input_that_is_not_utf_8_is_refused(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    _, errors = called("generate", folder / "m", "--prompt=-", check=1)
    assert "standard input" in errors and "0xe9 at position 3" in errors


@pytest.mark.parametrize("more", [[], ["--samples", 2], ["--samples", 2, "--json"]])
def test_a_note_stands_behind_the_text_and_not_in_it(tmp_path: Path, more: list) -> None:
    """Both streams as a terminal shows them."""
    write_model(tmp_path / "m", block_size=8)
    words = ["generate", tmp_path / "m", "--prompt", "abc", "--max-new-tokens", 20, *more]
    words += ["--seed", 3, "--batch-size", 1]
    terminal = io.StringIO()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        run(list(map(str, words)))
    shown = terminal.getvalue()
    text, note, rest = shown.partition("\nnote: the text has outgrown the model's block_size of 8")
    assert note and rest.count("\n") == 1
    assert text == called(*words)[0].removesuffix("\n")


@pytest.mark.parametrize("more", [[], ["--samples", 2], ["--samples", 2, "--json"]])
def test_that_nothing_was_added_is_said(folder: Path, more: list) -> None:
    _, tokenizer = open_model(folder / "m")
    [new] = tokenizer.encode("u")
    forced = ["--prompt", "a", "--logit-bias", f"{new}=1e4", *more]
    _, errors = called("generate", folder / "m", *forced, "--stop", "u")
    assert "nothing was added" in errors
    _, errors = called("generate", folder / "m", *forced, "--max-new-tokens", 2)
    assert not errors


def test_a_model_that_answers_is_said_to_continue_raw_text(tmp_path: Path) -> None:
    for name, template in (("chat", "{{ messages[0].content }}"), ("plain", None)):
        tokenizer = PretrainedTokenizer(byte_level(), stop_ids=[2], chat_template=template)
        save_model(SimpleGPT(300, 8, 2, 1, 30), tmp_path / name, tokenizer)
    _, errors = called("generate", tmp_path / "chat", "--prompt", "a", *FEW)
    assert f"surgery ask {tmp_path / 'chat'}" in errors
    _, errors = called("generate", tmp_path / "plain", "--prompt", "a", *FEW)
    assert "surgery ask" not in errors


def test_a_draft_changes_no_text(folder: Path) -> None:
    words = ["generate", folder / "m", "--prompt", "abcabcabc", *FEW]
    out, errors = called(*words, "--speculate", "lookup")
    assert out == called(*words)[0] and "drafted" in errors
    several = [*words, "--samples", 2, "--logprobs", 2, "--json"]
    out, errors = called(*several, "--speculate", "lookup")
    assert "drafted" in errors
    found, wanted = ([*map(json.loads, text.splitlines())] for text in (out, called(*several)[0]))
    assert [one["text"] for one in found] == [one["text"] for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        pairs = zip(one["tokens"], other["tokens"], strict=True)
        assert all(t["logprob"] == pytest.approx(u["logprob"], abs=1e-5) for t, u in pairs)
