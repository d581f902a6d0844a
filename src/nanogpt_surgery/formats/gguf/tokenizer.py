"""The tokenizer in a GGUF file's metadata.

| `tokenizer.ggml.model` | what it is                                                            |
|------------------------|-----------------------------------------------------------------------|
| `gpt2`                 | byte-level BPE; `tokenizer.ggml.pre` names how words are cut          |
| `llama`                | SentencePiece: merges follow from scores; bytes for what is missing   |
| `rwkv`                 | the longest token that fits: a character tokenizer as we write it     |
"""

from __future__ import annotations

import re
from typing import Any

from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.data.tokenizers.tokenizer_json import (
    CUTTINGS,
    byte_level_json,
    sentencepiece_json,
)
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
        return _tokenizer_of(metadata)


def _tokenizer_of(metadata: dict[str, Any]) -> Tokenizer | None:
    own = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
    kind = own.get("model")
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
        contents, add_bos = _byte_level(own, tokens, special)
    elif kind == "rwkv":
        return _characters(tokens, types)
    elif kind == "llama":
        contents, add_bos = _sentencepiece(own, tokens, types, special)
    else:
        raise SurgeryError(f"its tokenizer is of the kind {quoted(kind)}, which is not one we have")
    ends = [_id(own, name, tokens) for name in ("eos_token_id", *TURN_ENDS)]
    template = metadata.get(TEMPLATE)
    tokenizer = PretrainedTokenizer(
        contents,
        bos_id=_id(own, "bos_token_id", tokens),
        stop_ids=list(dict.fromkeys(i for i in ends if i is not None)),
        add_bos=bool(own.get("add_bos_token", add_bos)),
        chat_template=template if isinstance(template, str) else None,
    )
    for role, name in (("pad_token", "padding_token_id"), ("unk_token", "unknown_token_id")):
        index = _id(own, name, tokens)
        if index is not None:
            tokenizer.special_tokens[role] = tokens[index]
    return tokenizer


def _byte_level(
    own: dict[str, Any], tokens: list[str], special: dict[int, bool]
) -> tuple[dict[str, Any], bool]:
    pre, merges = own.get("pre"), own.get("merges")
    if not isinstance(pre, str) or pre not in CUTTINGS:
        raise SurgeryError(
            f"its words are cut as {quoted(pre)} cuts them, which is not one of "
            f"{', '.join(CUTTINGS)}"
        )
    if not isinstance(merges, list) or any(merge.count(" ") != 1 for merge in merges):
        raise SurgeryError(f"{PREFIX}merges is missing, or holds what is not a pair")
    return byte_level_json(tokens, merges, special, CUTTINGS[pre]), pre == "llama-bpe"


def _sentencepiece(
    own: dict[str, Any], tokens: list[str], types: list[int], special: dict[int, bool]
) -> tuple[dict[str, Any], bool]:
    scores = _aligned(own, "scores", tokens)
    if scores is None:
        raise SurgeryError(f"{PREFIX}scores is missing")
    unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), None)
    if unknown is not None:
        special = special | {unknown: True}
    space_first = bool(own.get("add_space_prefix", True))
    return sentencepiece_json(tokens, scores, special, unknown, space_first), True


def _aligned(own: dict[str, Any], name: str, tokens: list[str]) -> list[Any] | None:
    """An array with a number for each token."""
    values = own.get(name)
    if values is None:
        return None
    if not hasattr(values, "tolist") or len(values) != len(tokens):
        raise SurgeryError(f"{PREFIX}{name} has not one number for each of {len(tokens)} tokens")
    numbers: list[Any] = values.tolist()
    return numbers


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
