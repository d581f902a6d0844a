"""The tokenizer in a GGUF file's metadata.

| `tokenizer.ggml.model` | what it is                                                            |
|------------------------|-----------------------------------------------------------------------|
| `gpt2`                 | byte-level BPE; `tokenizer.ggml.pre` names how words are cut          |
| `llama`                | SentencePiece: merges follow from scores; bytes for what is missing   |
| `rwkv`                 | the longest token that fits: a character tokenizer as we write it     |

The first two become a `tokenizer.json`: both are BPE models of the `tokenizers` package, which
differ in how text is cut and spaces are written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanogpt_surgery.data.tokenizers.bpe_tokenizer import GPT2_PATTERN
from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError, foreign_file, quoted

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TURN_ENDS = ("eot_token_id", "eom_token_id")


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that the metadata describe; None if they describe none.

    Raises:
        SurgeryError: it is of a kind that we do not have, or damaged.
    """
    with foreign_file("the GGUF file", PREFIX + "*"):
        own = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
        kind, template = own.get("model"), metadata.get(TEMPLATE)
        template = template if isinstance(template, str) else None
        if kind in (None, "none", "no_vocab"):
            return None
        tokens = own.get("tokens")
        if not isinstance(tokens, list):
            raise SurgeryError(f"{PREFIX}tokens is missing")
        types = _aligned(own, "token_type", tokens) or [NORMAL] * len(tokens)
        special = {
            i: kind == CONTROL for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)
        }
        if kind == "gpt2":
            contents, add_bos = _byte_level(own, tokens, special), own.get("pre") == "llama-bpe"
        elif kind == "rwkv":
            characters = _characters(tokens, types)
            characters.chat_template = template
            return characters
        elif kind == "llama":
            contents, add_bos = _sentencepiece(own, tokens, types, special), True
        else:
            raise SurgeryError(
                f"its tokenizer is of the kind {quoted(kind)}, which is not one we have"
            )
        ends = [_id(own, name, tokens) for name in ("eos_token_id", *TURN_ENDS)]
        tokenizer = PretrainedTokenizer(
            contents,
            bos_id=_id(own, "bos_token_id", tokens),
            stop_ids=list(dict.fromkeys(i for i in ends if i is not None)),
            add_bos=bool(own.get("add_bos_token", add_bos)),
            chat_template=template,
        )
        for role, name in (("pad_token", "padding_token_id"), ("unk_token", "unknown_token_id")):
            index = _id(own, name, tokens)
            if index is not None:
                tokenizer.special_tokens[role] = tokens[index]
        return tokenizer


def _byte_level(own: dict[str, Any], tokens: list[str], special: dict[int, bool]) -> dict[str, Any]:
    pre, merges = own.get("pre"), own.get("merges")
    if not isinstance(pre, str) or pre not in CUTTINGS:
        raise SurgeryError(
            f"its words are cut as {quoted(pre)} cuts them, which is not one of "
            f"{', '.join(CUTTINGS)}"
        )
    if not isinstance(merges, list) or any(merge.count(" ") != 1 for merge in merges):
        raise SurgeryError(f"{PREFIX}merges is missing, or holds what is not a pair")
    return byte_level_json(tokens, merges, special, CUTTINGS[pre])


def _sentencepiece(
    own: dict[str, Any], tokens: list[str], types: list[int], special: dict[int, bool]
) -> dict[str, Any]:
    scores = _aligned(own, "scores", tokens)
    if scores is None:
        raise SurgeryError(f"{PREFIX}scores is missing")
    unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    if unknown is not None:
        special = special | {unknown: True}
    space_first = bool(own.get("add_space_prefix", True))
    return sentencepiece_json(tokens, scores, special, unknown, space_first)


def _aligned(own: dict[str, Any], name: str, tokens: list[str]) -> list[Any] | None:
    """An array with a number for each token."""
    values = own.get(name)
    if values is None:
        return None
    if not hasattr(values, "tolist") or len(values) != len(tokens):
        raise SurgeryError(f"{PREFIX}{name} has not one number for each of {len(tokens)} tokens")
    return values.tolist()


def _id(own: dict[str, Any], name: str, tokens: list[str]) -> int | None:
    value = own.get(name)
    return value if type(value) is int and 0 <= value < len(tokens) else None


def _unescaped(token: str) -> str:
    data = re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), token.encode())
    return data.decode(errors="replace")


def _characters(tokens: list[str], types: list[int]) -> CharacterTokenizer:
    characters = [_unescaped(t) for t, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    if any(len(character) != 1 for character in characters):
        raise SurgeryError("its tokenizer is RWKV's, of which only single characters are read")
    if len(set(characters)) < len(characters):
        raise SurgeryError("its vocabulary has a character twice")
    return CharacterTokenizer.from_characters(characters)


_LARGEST_VOCABULARY = 300_000  # tokens, and half as many as merges; see tokenizer_limits.py
_LONGEST_TOKEN = 256  # characters
_MOST_MERGES = 5  # ways to make a token, on average; Gemma's vocabulary has 2.3
SPACE = "▁"  # SentencePiece's way to write a space
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}

# Contractions in either case, words with one sign before them, numbers, marks, then white space.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Cutting:
    """How a byte-level BPE cuts a text into words, under llama.cpp's name for it."""

    pattern: str
    digits: bool = False
    """each digit is a word of its own, before the pattern is applied"""
    ignore_merges: bool = False
    """a word that is a token is that token, however its parts would merge"""
    normalizer: str | None = None


CUTTINGS = {
    "gpt-2": Cutting(GPT2_PATTERN),
    "smollm": Cutting(GPT2_PATTERN, digits=True),
    "llama-bpe": Cutting(_LLAMA3_PATTERN, ignore_merges=True),
    "qwen2": Cutting(_QWEN2_PATTERN, normalizer="NFC"),
}


def byte_level_json(
    tokens: Sequence[str], merges: Sequence[str], special: dict[int, bool], cutting: Cutting
) -> dict[str, Any]:
    """A byte-level BPE.

    Args:
        tokens: as the byte alphabet writes them, id by id.
        merges: two tokens with a space between them, the first to be merged first.
        special: ids that become themselves where a text writes them out; true: they are control
            tokens, not text.
        cutting: how words are cut.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": cutting.pattern}, "behavior": "Isolated"}
    stages: list[dict[str, Any]] = [split | {"invert": False}, byte_level | {"use_regex": False}]
    if cutting.digits:
        stages.insert(0, {"type": "Digits", "individual_digits": True})
    model = {"vocab": _ids(tokens), "merges": _merges(tokens, merges)}
    return _bpe(tokens, special, model | {"ignore_merges": cutting.ignore_merges}) | {
        "normalizer": {"type": cutting.normalizer} if cutting.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": stages},
        "decoder": byte_level | {"use_regex": True},
    }


def sentencepiece_json(
    tokens: Sequence[str],
    scores: Sequence[float],
    special: dict[int, bool],
    unknown: int | None,
    space_first: bool = True,
) -> dict[str, Any]:
    """A SentencePiece model of the BPE kind, with bytes for characters that it does not have.

    Args:
        tokens: with `▁` for spaces, and `<0x0A>` for the byte 10, id by id.
        scores: the pair whose token has the highest score is merged first.
        special: as in `byte_level_json`.
        unknown: the id for what cannot be written even in bytes.
        space_first: a space is put before each text.
    """
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps = [PREPEND, REPLACE] if space_first else [REPLACE]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_first else []
    model = {
        "vocab": _ids(tokens),
        "merges": _merges_by_score(tokens, scores, special),
        "unk_token": None if unknown is None else tokens[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
    }
    return _bpe(tokens, special, model) | {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
    }


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], special: dict[int, bool]
) -> list[list[str]]:
    """Every way to make a token from two others, that of the highest score first.

    Raises:
        SurgeryError: there are more ways, or longer tokens, than any real vocabulary has.
    """
    ids = _ids(tokens)
    merges: list[tuple[str, str]] = []
    most = _MOST_MERGES * len(tokens) + 10_000
    for index in sorted(range(len(tokens)), key=lambda i: (-scores[i], i)):
        token = tokens[index]
        if index not in special:
            if len(token) > _LONGEST_TOKEN:
                raise SurgeryError(
                    f"token {index} has {len(token):,} characters; a SentencePiece token has at "
                    f"most {_LONGEST_TOKEN}"
                )
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
            merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
            if len(merges) > most:
                raise SurgeryError(
                    f"its tokens can be made from others in more than {most:,} ways, which no real "
                    "vocabulary needs"
                )
    return [list(pair) for pair in merges]


def _merges(tokens: Sequence[str], merges: Sequence[str]) -> list[str]:
    """The merges as they are, two tokens with a space between, after a look at each of them."""
    if len(merges) > 2 * _LARGEST_VOCABULARY:
        raise SurgeryError(
            f"there are {len(merges):,} merges; the limit is {2 * _LARGEST_VOCABULARY:,}"
        )
    known = set(tokens)
    for place, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in known or right not in known or left + right not in known:
            raise SurgeryError(
                f"merge {place:,}, {quoted(merge)}, is not of two tokens that make a third"
            )
    return list(merges)


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    if len(tokens) > _LARGEST_VOCABULARY:
        raise SurgeryError(
            f"the vocabulary has {len(tokens):,} tokens; the limit is {_LARGEST_VOCABULARY:,}"
        )
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise SurgeryError(f"the vocabulary has the token {quoted(twice)} twice")
    return ids


def _bpe(tokens: Sequence[str], special: dict[int, bool], model: dict[str, Any]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": control} | flags
            for i, control in sorted(special.items())
        ],
        "post_processor": None,
        "model": {"type": "BPE"} | model,
    }
