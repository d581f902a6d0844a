"""A tokenizer as llama.cpp's metadata: carried over whole, or refused by the name of the part.

llama.cpp knows a tokenizer by its kind and by a few names, where a `tokenizer.json` puts one
together from parts: each part is compared with what the kind does. What llama.cpp does otherwise in
a few texts alone is written, and said (`Lost`).
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from typing import Any, Literal, TypeAlias

from gguf import GGUFWriter

from nanogpt_surgery.data.tokenizers.bpe_tokenizer import GPT2_PATTERN, BPETokenizer, pairs_of
from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.token_text import BYTE_OF_CHARACTER
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.data.tokenizers.tokenizer_limits import steps_of
from nanogpt_surgery.errors import SurgeryError, first_problems, quoted, warn
from nanogpt_surgery.formats.gguf.tokenizer import (
    BYTE,
    CONTROL,
    CUTTINGS,
    NORMAL,
    PREFIX,
    PREPEND,
    REPLACE,
    SPACE,
    TEMPLATE,
    TURN_ENDS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

Found: TypeAlias = tuple[int, str]  # where a token begins in a text, and the token
_MOST_OVERLAPS, _LONGEST = 100_000, 128  # looked at, and characters of their tokens
Lost: TypeAlias = Literal["blank first", "after a token", "NFC", "overlap"]
_LOST = {
    "blank first": "a text that begins with a blank gets one blank more",
    "after a token": "text behind a special token gets a blank before it",
    "NFC": "accents written apart from their letters stay apart (NFC)",
    "overlap": "other added tokens are found where some overlap",
}
_FLAGS = ("single_word", "lstrip", "rstrip")
_IN_UTF8 = {
    c for c, byte in BYTE_OF_CHARACTER.items() if byte not in (0xC0, 0xC1, *range(0xF5, 256))
}
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def write_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> set[Lost]:
    """Writes a tokenizer's metadata, its vocabulary filled up to the model's.

    Returns:
        In which texts llama.cpp's ids will differ; the user was warned.

    Raises:
        SurgeryError: a part of the tokenizer is one that llama.cpp has not (all of them, by name).
    """
    _write_templates(writer, tokenizer)
    if isinstance(tokenizer, CharacterTokenizer):
        _write_characters(writer, tokenizer, vocab_size)
        return set()
    if not isinstance(tokenizer, (BPETokenizer, PretrainedTokenizer)):
        raise SurgeryError(f"llama.cpp has no tokenizer like a {type(tokenizer).__name__}")
    contents = tokenizer.to_json()
    kind = contents["model"].get("type")
    if kind != "BPE":
        raise SurgeryError(f"llama.cpp's file has no place for a {kind} tokenizer")
    is_sentencepiece = bool(contents["model"].get("byte_fallback"))
    problems = [*_wrong_parts(contents, is_sentencepiece), *_wrong_ends(tokenizer)]
    if problems:
        raise SurgeryError(
            f"llama.cpp has no place for parts of this tokenizer: {first_problems(problems, 8)}",
            "format='huggingface' carries it over as it is",
        )
    tokens, types = _vocabulary(contents, vocab_size)
    lost: set[Lost] = set()
    if is_sentencepiece:
        lost = _write_sentencepiece(writer, contents, tokens, types)
    else:
        if contents.get("normalizer"):
            lost.add("NFC")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of_cutting(contents))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(pair) for pair in pairs_of(contents["model"]["merges"])])
    _write_ids(writer, tokenizer, tokens)
    example = overlap(contents.get("added_tokens") or [])
    if example:
        lost.add("overlap")
    if lost:
        said = ", and ".join(_LOST[part] for part in sorted(lost))
        warn(f"in llama.cpp {said}{example}")
    return lost


def _write_ids(writer: GGUFWriter, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """The tokens that have a role, and what is put around a text."""
    eos = getattr(tokenizer, "eos_id", None)
    ids = {"bos": getattr(tokenizer, "bos_id", None), "eos": eos}
    ids |= {"padding": getattr(tokenizer, "pad_id", None)}
    for name, value in ids.items():
        if value is not None:
            writer.add_uint32(f"{PREFIX}{name}_token_id", value)
    more = sorted(getattr(tokenizer, "stop_ids", frozenset()) - {eos})
    for key, value in zip(TURN_ENDS, more, strict=False):
        writer.add_uint32(f"{PREFIX}{key}", value)
    if left := more[len(TURN_ENDS) :]:
        names = ", ".join(quoted(tokens[i]) for i in left if i < len(tokens))
        warn(
            f"a GGUF file names {1 + len(TURN_ENDS)} tokens that end a turn; llama.cpp will not "
            f"stop at {names} unless it knows them by their names"
        )
    writer.add_add_bos_token(getattr(tokenizer, "add_bos", False))
    if getattr(tokenizer, "suffix_ids", []):
        writer.add_add_eos_token(True)


def _write_templates(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    template = getattr(tokenizer, "chat_template", None)
    if template is not None:
        writer.add_chat_template(template)
    for name, text in getattr(tokenizer, "chat_templates", {}).items():
        if name != "default":
            writer.add_string(f"{TEMPLATE}.{name}", text)


def _wrong_ends(tokenizer: BPETokenizer | PretrainedTokenizer) -> Iterator[str]:
    """Yields in words which ids around a text are others than BOS before it and EOS behind it."""
    for where, ids, name in (("before", "prefix_ids", "bos"), ("behind", "suffix_ids", "eos")):
        found = list(getattr(tokenizer, ids, []))
        if found not in ([], [getattr(tokenizer, f"{name}_id", None)]):
            tokens = ", ".join(quoted(tokenizer.token_of(i)) for i in found)
            yield f"post_processor: {tokens} {where} a text, which is not its {name.upper()}"


def _wrong_parts(contents: dict[str, Any], is_sentencepiece: bool) -> list[str]:
    """The parts of a `tokenizer.json` that its kind has not in llama.cpp, in words."""
    model = contents["model"]
    found = [
        f"model.{key} {quoted(model[key])}"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    if is_sentencepiece:
        found += _wrong_sentencepiece(contents)
    else:
        found += _wrong_byte_level(contents)
    for token in contents.get("added_tokens") or []:
        flags = [flag for flag in _FLAGS if token.get(flag)]
        if token.get("normalized") and _changes(contents.get("normalizer"), token["content"]):
            flags.append("normalized")
        found += [f"{flag} of the added token {quoted(token['content'])}" for flag in flags]
    return found


def overlap(added: list[dict[str, Any]]) -> str:
    """An example of a text in which llama.cpp finds other added tokens; empty if there is none.

    llama.cpp takes the longest first (in bytes), and of two that are as long either. Here those
    that are not normalized are taken first, then the one that begins first, and of those the
    longest.
    """
    normalized = {
        token["content"]: bool(token.get("normalized"))
        for token in added
        if 0 < len(token["content"]) <= _LONGEST
    }
    lengths = {len(token) for token in normalized}
    for text, equal in dict.fromkeys(islice(_overlapping(normalized), _MOST_OVERLAPS)):
        places = ((start, text[start : start + n]) for start in range(len(text)) for n in lengths)
        found = {(start, token) for start, token in places if token in normalized}
        here = _taken(found, lambda f: (normalized[f[1]], f[0], -len(f[1])))
        there = _taken(found, lambda f: (-len(f[1].encode()), f[1] != equal, f[0]))  # noqa: B023
        if here != there:
            ours, theirs = _names(here - there), _names(there - here)
            return f" (in {quoted(text)} {theirs}, not {ours})"
    return ""


def _overlapping(normalized: dict[str, bool]) -> Iterator[tuple[str, str]]:
    """Yields the shortest texts in which two added tokens overlap.

    With each, the second of two that are equally long: llama.cpp may take either first.
    """
    tokens = sorted(normalized)
    beginnings = {token[0] for token in tokens}
    for first in tokens:
        if normalized[first]:  # one in it that is not comes before it
            yield first, ""
        for start in range(1, len(first)):
            if first[start] in beginnings:
                for second in _that_begin_with(first[start:], tokens):
                    is_equal = len(second.encode()) == len(first.encode())
                    yield first[:start] + second, second if is_equal and second != first else ""


def _that_begin_with(text: str, tokens: list[str]) -> Iterator[str]:
    """The tokens of a sorted list that begin with a text."""
    after = islice(tokens, bisect_left(tokens, text), None)
    return takewhile(lambda token: token.startswith(text), after)


def _names(found: set[Found]) -> str:
    return ", ".join(quoted(token) for _, token in sorted(found))


def _taken(found: set[Found], order: Callable[[Found], Any]) -> set[Found]:
    """The tokens found in a text that are taken, in this order, each unless one lies there."""
    taken: set[Found] = set()
    for start, token in sorted(found, key=order):
        if all(start + len(token) <= s or s + len(t) <= start for s, t in taken):
            taken.add((start, token))
    return taken


def _changes(normalizer: dict[str, Any] | None, text: str) -> bool:
    """Whether a normalizer that was let pass makes another text of this one."""
    for step in steps_of(normalizer, "normalizers"):
        if step["type"] == "Prepend" or (step["type"] == "Replace" and " " in text):
            return True
        if step["type"] == "NFC" and unicodedata.normalize("NFC", text) != text:
            return True
    return False


def _wrong_byte_level(contents: dict[str, Any]) -> Iterator[str]:
    cutting = CUTTINGS.get(_name_of_cutting(contents))
    if cutting is None:
        cuts = _shown(steps_of(contents.get("pre_tokenizer"), "pretokenizers"))
        known = ", ".join(CUTTINGS)
        yield f"pre_tokenizer: {cuts} cuts words in a way that is not one of {known}"
        return
    steps = [step["type"] for step in steps_of(contents.get("normalizer"), "normalizers")]
    wanted = [cutting.normalizer] if cutting.normalizer else []
    if steps != wanted:
        found, there = (", ".join(names) or "none" for names in (map(quoted, steps), wanted))
        yield f"normalizer: {found}, where words that are cut so have {there}"
    if bool(contents["model"].get("ignore_merges")) != cutting.ignore_merges:
        yield f"model.ignore_merges {not cutting.ignore_merges}"
    missing = _IN_UTF8 - contents["model"]["vocab"].keys()
    if missing and contents["model"].get("unk_token") is not None:
        yield f"model.unk_token, which stands for the {len(missing)} bytes without a token"


def _shown(steps: list[dict[str, Any]]) -> str:
    return ", ".join(quoted(step.get("type")) for step in steps) or "nothing"


def _name_of_cutting(contents: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level BPE cuts words; empty where there is none."""
    *before, last = steps_of(contents.get("pre_tokenizer"), "pretokenizers") or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return ""
    found: list[Any] = [_cut(step) for step in before]
    if last.get("use_regex", True):
        found.append(GPT2_PATTERN)
    for name, cutting in CUTTINGS.items():
        if found == [*(["Digits"] if cutting.digits else []), cutting.pattern]:
            return name
    return ""


def _cut(step: dict[str, Any]) -> Any:
    """How a step cuts: a pattern, each digit, or something that no name stands for."""
    if step.get("type") == "Split":
        plain = step.get("behavior") == "Isolated" and not step.get("invert")
        return step.get("pattern", {}).get("Regex") if plain else step
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "Digits"
    return step


def _wrong_sentencepiece(contents: dict[str, Any]) -> Iterator[str]:
    model = contents["model"]
    steps = steps_of(contents.get("normalizer"), "normalizers")
    before = steps_of(contents.get("pre_tokenizer"), "pretokenizers")
    strange = [step for step in steps if step not in (PREPEND, REPLACE)]
    if strange:
        yield f"normalizer: {_shown(strange)}"
    spaces = [step for step in before if step.get("type") == "Metaspace"]
    others = [step for step in before if step not in spaces]
    if others or len(spaces) > 1 or any(s.get("replacement") != SPACE for s in spaces):
        yield f"pre_tokenizer: {_shown(before)}"
    elif not spaces and REPLACE not in steps:
        yield f"normalizer: nothing writes a space as {SPACE}"
    elif spaces and spaces[0].get("split", True):
        inside = [token for token in model["vocab"] if SPACE in token[1:]]
        if inside:
            yield f"pre_tokenizer: Metaspace split, beside the token {quoted(inside[0])}"
    if model.get("ignore_merges"):
        yield "model.ignore_merges True"
    missing = _BYTES - model["vocab"].keys()
    if missing:
        yield f"model.vocab: no token for {len(missing)} of the 256 bytes"


def _write_sentencepiece(
    writer: GGUFWriter, contents: dict[str, Any], tokens: list[str], types: list[int]
) -> set[Lost]:
    """Merges become scores: the earlier a merge, the higher the score of what it makes."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs_of(contents["model"]["merges"])):
        ranks.setdefault(left + right, rank)
    unknown = contents["model"].get("unk_token")
    types = [UNKNOWN if token == unknown else t for token, t in zip(tokens, types, strict=True)]
    space_first, lost = _space_first(contents)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    writer.add_add_space_prefix(space_first)
    if unknown in tokens:
        writer.add_unk_token_id(tokens.index(unknown))
    return lost


def _space_first(contents: dict[str, Any]) -> tuple[bool, set[Lost]]:
    """Whether a blank is put before a text, and where Metaspace does it otherwise.

    Metaspace puts none before a text that begins with one, and `first` none behind an added token;
    llama.cpp does both.
    """
    for step in steps_of(contents.get("pre_tokenizer"), "pretokenizers"):
        usual = "always" if step.get("add_prefix_space", True) else "never"
        scheme = step.get("prepend_scheme", usual)
        if scheme != "never":
            return True, _LOST_BY_FIRST if scheme == "first" else _LOST_BY_FIRST - {"after a token"}
    return PREPEND in steps_of(contents.get("normalizer"), "normalizers"), set()


_LOST_BY_FIRST: set[Lost] = {"blank first", "after a token"}


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


def _vocabulary(contents: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, id by id, with names for ids that the tokenizer leaves out."""
    names = {i: token for token, i in contents["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, NORMAL)
    if contents["model"].get("byte_fallback"):
        kinds |= {i: BYTE for i, token in names.items() if token in _BYTES}
    for token in contents.get("added_tokens", []):
        names[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    last = max(names)
    tokens = [names.get(i, f"[PAD{i}]") for i in range(last + 1)]
    return _filled(tokens, [kinds.get(i, UNUSED) for i in range(last + 1)], vocab_size)


def _filled(tokens: list[str], types: list[int], size: int) -> tuple[list[str], list[int]]:
    if len(tokens) > size:
        raise SurgeryError(f"the tokenizer has {len(tokens)} tokens, the model only {size}")
    more = range(len(tokens), size)
    return [*tokens, *(f"[PAD{i}]" for i in more)], [*types, *(UNUSED for _ in more)]
