"""Tokenizers larger than the largest in public use open.

The table in `data/tokenizers/tokenizer_limits.py` has the real ones that these are built after.
"""

import itertools
import json

import pytest
from helpers.measured import costs
from helpers.tokenizers import byte_level, sentencepiece_like, unigram

from nanogpt_surgery.formats.gguf.tokenizer import CUTTINGS, byte_level_json, sentencepiece_json

FLAGS = {
    "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
}  # fmt: skip
LETTERS = [chr(0x4E00 + i) for i in range(56)]
OPENING = """
from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer
def opened(path):
    tokenizer = open_tokenizer(path)
    text = "一丁 丂七丄丅丆万"
    found = tokenizer.decode(tokenizer.encode(text))
    if found != text:
        raise SurgeryError(found)
    raise SurgeryError(f"{tokenizer.vocab_size} tokens")
"""


def words(count: int) -> tuple[list[str], list[list[str]]]:
    """All strings of one to three letters and some of four, with each way to merge them."""
    strings = itertools.chain.from_iterable(
        map("".join, itertools.product(LETTERS, repeat=length)) for length in (1, 2, 3, 4)
    )
    tokens = list(itertools.islice(strings, count))
    return tokens, [[t[:i], t[i:]] for t in tokens for i in range(1, len(t))]


def added(first: int, count: int) -> list[dict]:
    return [FLAGS | {"id": first + i, "content": f"<|visual {i:06}|>"} for i in range(count)]


def spread_out(contents: dict) -> str:
    """JSON as `tokenizers` writes it, a merge on four lines; `json` itself would take seconds."""
    text = json.dumps(contents, ensure_ascii=False)
    text = text.replace("], [", "\n      ],\n      [\n        ").replace(", ", ",\n        ")
    return text.replace("{", "{\n      ").replace("}", "\n    }")


def gemma() -> dict:
    """262,144 tokens as Gemma 3 has, 585,176 merges where Gemma 2 has 580,604, and more bytes."""
    tokens, merges = words(255_743)
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    vocab = {token: i for i, token in enumerate([*bytes_, "▁", *tokens])}
    contents = sentencepiece_like() | {"added_tokens": added(len(vocab), 6_144)}
    model = {"vocab": vocab, "merges": merges, "unk_token": None}
    return contents | {"post_processor": None, "model": contents["model"] | model}


def codebook() -> dict:
    """150,001 tokens of a text model, and 131,072 added ones, as for Emu3.5's images."""
    tokens, merges = words(150_000)
    vocab = {token: i for i, token in enumerate([*tokens, " "])}
    contents = byte_level() | {"pre_tokenizer": None, "decoder": {"type": "Fuse"}}
    model = contents["model"] | {"vocab": vocab, "merges": merges}
    return contents | {"added_tokens": added(len(vocab), 131_072), "model": model}


def sentences() -> dict:
    """256,000 tokens of a unigram model, with runs of 24 blanks as llm-jp has them."""
    contents = unigram()
    vocab = [["<unk>", 0.0], *[["▁" * i, -9.0] for i in range(1, 25)]]
    vocab += [[token, -10.0 - i / 99_999] for i, token in enumerate(words(255_975)[0])]
    return contents | {"model": contents["model"] | {"vocab": vocab}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "n_tokens", "n_bytes", "mib"),
    [
        (gemma, 262_144, 34_363_188, 1000),
        (codebook, 281_073, 34_363_188, 750),
        (sentences, 256_000, 10_000_000, 400),
    ],
)
def test_a_tokenizer_as_large_as_any_in_use_opens(make, n_tokens, n_bytes, mib, tmp_path):
    """Of a gigabyte at most; measured are 667, 478 and 207 MiB."""
    file = tmp_path / "tokenizer.json"
    file.write_text(spread_out(make()), "utf-8")
    assert file.stat().st_size > n_bytes
    cost = costs(OPENING, [tmp_path])[tmp_path.name]
    assert cost.error == f"{n_tokens} tokens"
    assert cost.mib < mib


@pytest.mark.slow
def test_vocabularies_of_gguf_files_may_be_as_large():
    tokens, merges = words(255_743)
    pairs = [" ".join(merge) for merge in merges]
    assert len(pairs) > 580_604
    contents = byte_level_json(tokens, pairs, {}, CUTTINGS["gpt-2"])
    assert len(contents["model"]["merges"]) == len(pairs)
    by_score = sentencepiece_json(tokens, range(0, -len(tokens), -1), {}, None)
    assert sorted(by_score["model"]["merges"]) == sorted(merges)
