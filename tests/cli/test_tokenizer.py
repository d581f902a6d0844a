"""A tokenizer trained on the command line, elsewhere and in a training."""

import json
from pathlib import Path

import pytest
from helpers.commands import called
from transformers import AutoTokenizer

from nanogpt_surgery import BPETokenizer, open_model, python_reference, split_by_position
from nanogpt_surgery.data.tokenizers.tokenizer import tokenizer_fingerprint
from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer

TEXT = python_reference()[:40_000] + "\nnaïve 日本語 😀\n"
SMALL = "--n-embd 16 --n-head 2 --n-layer 1 --block-size 12 --batch-size 4 --warmup-steps 1".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = [place / "text.txt", "--out", place / "words", "--vocab-size", 400, "--json"]
    report, _ = called("tokenizer", "train", *arguments)
    (place / "report.json").write_text(report)
    return place


def test_the_report_is_measured_on_text_it_has_not_learnt_from(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    learnt, held_out = split_by_position(TEXT)
    tokenizer = BPETokenizer.train(learnt, 400)
    assert tokenizer_fingerprint(open_tokenizer(folder / "words")) == tokenizer_fingerprint(
        tokenizer
    )
    assert report["vocabulary"] == 400
    assert report["held_out_tokens"] == len(tokenizer.encode(held_out))
    assert report["characters_per_token"] == len(held_out) / len(tokenizer.encode(held_out)) > 1.5
    assert report["bytes_per_token"] > report["characters_per_token"], "日本語 has 3 bytes each"


def test_transformers_opens_the_folder_and_encodes_alike(folder: Path) -> None:
    ours, theirs = open_tokenizer(folder / "words"), AutoTokenizer.from_pretrained(folder / "words")
    assert isinstance(ours, BPETokenizer)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.eos_token_id == ours.eos_id == 399


def test_a_model_trained_with_it_carries_it_and_resumes_with_it_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    arguments = ["text.txt", "--out", "run", *SMALL, "--evaluate-every", 2]
    words = ["--tokenizer", "words"]
    called("train", *arguments, *words, "--max-steps", 2)
    model, tokenizer = open_model(folder / "run")
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(
        open_tokenizer(folder / "words")
    )
    assert model.config.vocab_size == 400
    theirs = AutoTokenizer.from_pretrained(folder / "run")
    assert theirs("naïve 日本語")["input_ids"] == tokenizer.encode("naïve 日本語")
    other = ["--tokenizer", "characters", "--max-steps", 2, "--resume"]
    _, refused = called("train", *arguments, *other, check=1)
    assert "tokenizer was words and is characters" in refused
    assert "--tokenizer words" in refused
    _, said = called("train", *arguments, *words, "--max-steps", 2, "--resume")
    assert "going on from step 2" in said


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["tokenizer", "train", "t.txt", "--out", "o", "--vocab-size", "99"], ["99", "257"]),
        (["tokenizer", "train", "t.txt", "--out", "full", "--vocab-size", "300"], ["full"]),
        (["tokenizer", "train", "t.txt", "--out", "o"], ["--vocab-size", "tokenizer train --help"]),
        (["train", "t.txt", "--out", "o", "--tokenizer", "full"], ["holds no tokenizer.json"]),
        (
            ["train", "t.txt", "--out", "o", "--tokenizer", "no"],
            ["no such folder", "tokenizer train"],
        ),
    ],
)
def test_errors_are_sentences(
    arguments: list[str], pieces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("to be, or not to be\n" * 30)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    _, errors = called(*arguments, check=1)
    for piece in pieces:
        assert piece in errors
    assert not (tmp_path / "o").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["diary.txt"]
