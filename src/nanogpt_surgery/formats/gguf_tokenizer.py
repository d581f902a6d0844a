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

from gguf import GGUFWriter

from nanogpt_surgery.data.bpe_tokenizer import GPT2_PATTERN, BPETokenizer
from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizer import Tokenizer
from nanogpt_surgery.data.tokenizer_json import CUTTINGS, byte_level_json, sentencepiece_json
from nanogpt_surgery.errors import SurgeryError

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_TURN_ENDS = ("eot_token_id", "eom_token_id")


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that the metadata describe; None if they describe none.

    Raises:
        SurgeryError: it is of a kind that we do not have, or damaged.
    """
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
        raise SurgeryError(f"its tokenizer is of the kind {kind!r}, which is not one we have")
    ends = [_id(own, name, tokens) for name in ("eos_token_id", *_TURN_ENDS)]
    template = metadata.get(TEMPLATE)
    return PretrainedTokenizer(
        contents,
        bos_id=_id(own, "bos_token_id", tokens),
        stop_ids=list(dict.fromkeys(i for i in ends if i is not None)),
        add_bos=bool(own.get("add_bos_token", add_bos)),
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level(
    own: dict[str, Any], tokens: list[str], special: dict[int, bool]
) -> tuple[dict[str, Any], bool]:
    pre, merges = own.get("pre"), own.get("merges")
    if pre not in CUTTINGS:
        raise SurgeryError(
            f"its words are cut as {pre!r} cuts them, which is not one of {', '.join(CUTTINGS)}"
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


def write_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Write a tokenizer's metadata, its vocabulary filled up to the model's.

    Raises:
        SurgeryError: llama.cpp has no such tokenizer.
    """
    if isinstance(tokenizer, CharacterTokenizer):
        _write_characters(writer, tokenizer, vocab_size)
        return
    if not isinstance(tokenizer, (BPETokenizer, PretrainedTokenizer)):
        raise SurgeryError(f"llama.cpp has no tokenizer like a {type(tokenizer).__name__}")
    contents = tokenizer.to_json()
    model = contents["model"]
    if model.get("type") != "BPE":
        raise SurgeryError(f"llama.cpp's file has no place for a {model.get('type')} tokenizer")
    tokens, types = _vocabulary(contents, vocab_size)
    if model.get("byte_fallback"):
        _write_sentencepiece(writer, contents, tokens, types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of_cutting(contents))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(pair) for pair in _pairs(model)])
    for name, value in (("bos", getattr(tokenizer, "bos_id", None)), ("eos", tokenizer.eos_id)):
        if value is not None:
            writer.add_uint32(f"{PREFIX}{name}_token_id", value)
    writer.add_add_bos_token(getattr(tokenizer, "add_bos", False))
    template = getattr(tokenizer, "chat_template", None)
    if template is not None:
        writer.add_chat_template(template)


def _write_characters(writer: GGUFWriter, tokenizer: CharacterTokenizer, vocab_size: int) -> None:
    """Characters as RWKV's kind of vocabulary: the longest token that fits, and no special ids.

    Byte-level BPE would do as well, but llama.cpp takes its token 11 for the end of every text.
    """
    tokens = [_escaped(character) for character in tokenizer.id_to_character.values()]
    tokens, types = _filled(tokens, [NORMAL] * len(tokens), vocab_size)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(tokens)
    writer.add_token_types(types)


def _escaped(character: str) -> str:
    """A character as RWKV's vocabulary writes it: printable ASCII as it is, other bytes in hex."""
    data = character.encode()
    return "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in data
    )


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


def _vocabulary(contents: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, id by id, with names for ids that the tokenizer leaves out."""
    names = {i: token for token, i in contents["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, NORMAL)
    if contents["model"].get("byte_fallback"):
        kinds |= {i: BYTE for i, token in names.items() if _BYTE_TOKEN.fullmatch(token)}
    for token in contents.get("added_tokens", []):
        names[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    last = max(names)
    tokens = [names.get(i, f"[PAD{i}]") for i in range(last + 1)]
    return _filled(tokens, [kinds.get(i, UNUSED) for i in range(last + 1)], vocab_size)


_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def _filled(tokens: list[str], types: list[int], size: int) -> tuple[list[str], list[int]]:
    if len(tokens) > size:
        raise SurgeryError(f"the tokenizer has {len(tokens)} tokens, the model only {size}")
    more = range(len(tokens), size)
    return [*tokens, *(f"[PAD{i}]" for i in more)], [*types, *(UNUSED for _ in more)]


def _pairs(model: dict[str, Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def _name_of_cutting(contents: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level BPE cuts words."""
    before = contents.get("pre_tokenizer") or {}
    stages = before.get("pretokenizers", [before])
    patterns = [stage["pattern"].get("Regex") for stage in stages if stage.get("type") == "Split"]
    last = stages[-1]
    if last.get("type") == "ByteLevel" and last.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    digits = any(stage.get("type") == "Digits" for stage in stages)
    prefixed = any(stage.get("add_prefix_space") for stage in stages)
    for name, cutting in CUTTINGS.items():
        if (patterns, digits, prefixed) == ([cutting.pattern], cutting.digits, False):
            return name
    raise SurgeryError(
        "llama.cpp has no name that we know for how this tokenizer cuts words",
        f"known are {', '.join(CUTTINGS)}",
    )


def _write_sentencepiece(
    writer: GGUFWriter, contents: dict[str, Any], tokens: list[str], types: list[int]
) -> None:
    """Merges become scores: the earlier a merge, the higher the score of what it makes."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(contents["model"])):
        ranks.setdefault(left + right, rank)
    unknown = contents["model"].get("unk_token")
    types = [UNKNOWN if token == unknown else t for token, t in zip(tokens, types, strict=True)]
    steps = (contents.get("normalizer") or {}).get("normalizers", [])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    writer.add_add_space_prefix(any(step.get("type") == "Prepend" for step in steps))
    if unknown in tokens:
        writer.add_unk_token_id(tokens.index(unknown))
