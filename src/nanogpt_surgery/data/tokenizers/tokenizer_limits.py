"""Limits for what a stranger's `tokenizer.json` may do to a text: no step multiplies its length.

The tokenizers in public use must open. The largest of October 2026 by each measure:

| measure       | tokenizer                                        |        has |      limit |
|---------------|--------------------------------------------------|------------|------------|
| bytes of JSON | Gemma 2 saved anew (in SigLIP 2)                 | 34,363,188 | 50,331,648 |
|               | Gemma 3n                                         | 33,442,559 |            |
|               | Llama 4; gpt-oss 27,868,174                      | 27,948,578 |            |
| tokens        | Gemma 3 and 4; BLOOM 250,680                     |    262,144 |    300,000 |
| merges        | Gemma 2; Gemma 3 514,906, Llama 4 439,802        |    580,604 |    600,000 |
| added tokens  | for Emu3.5's images; for Llasa's sounds 65,536   |    131,072 |    140,000 |
| nested tokens | llm-jp 2.1 (Unigram), runs of blanks             |         24 |         32 |
| bytes of one  | llm-jp 2.1                                       |         72 |        128 |

The limit on bytes stands in `files/writing.py`, those on tokens and merges, for vocabularies of
GGUF files, in `formats/gguf/tokenizer.py`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

from nanogpt_surgery.errors import SurgeryError, quoted

LARGEST_GROWTH = 8  # characters that one character may become
LONGEST_UNIGRAM = 128  # bytes of a token; sentencepiece's own limit is 16 characters by default
MOST_NESTED = 32  # tokens of a unigram vocabulary, each of which begins the next
LONGEST_WORD = 500  # characters of a word that WordPiece looks at; BERT's limit is 100
MOST_ADDED = 140_000  # tokens
LONGEST_EXPRESSION = 10_000  # characters; those in use have some hundred
MOST_REPEATED = 1_000  # times that an expression repeats a group, groups within it multiplied
LONGEST_WAIT = 60  # seconds that an expression may be foreseen to take for a text
_PROBED = 16_384  # characters on which that is measured
_GROUP_COUNT = re.compile(r"\)[?*+]?\{(\d*),?(\d*)\}")
_CHILDREN = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
_REPEATED = ("ByteLevel", "Precompiled")  # grow a text again and again


def check_limits(contents: dict[str, Any]) -> None:
    """Raises `SurgeryError` if a tokenizer would need memory or time beyond all measure."""
    for part, children in _CHILDREN.items():
        steps = steps_of(contents.get(part), children)
        growth = math.prod(map(_growth, steps))
        for kind in _REPEATED:
            growth *= 2 ** max(0, sum(step.get("type") == kind for step in steps) - 1)
        what = f"the {part} of tokenizer.json makes up to {growth:,} characters of one"
        _check_at_most(LARGEST_GROWTH, growth, what)
    for expression in expressions(contents):
        _check_expression(expression)
    added = contents.get("added_tokens")
    if isinstance(added, list):
        what = f"tokenizer.json has {len(added):,} added tokens"
        _check_at_most(MOST_ADDED, len(added), what)
    model = contents.get("model")
    if isinstance(model, dict):
        _check_model(model)


def _check_at_most(limit: int, found: int, what: str) -> None:
    if found > limit:
        raise SurgeryError(f"{what}; the limit is {limit:,}")


def expressions(contents: dict[str, Any]) -> list[str]:
    """The regular expressions by which a `tokenizer.json` cuts or changes a text."""
    steps = [
        s for part, children in _CHILDREN.items() for s in steps_of(contents.get(part), children)
    ]
    patterns = [step.get("pattern") for step in steps]
    found = [pattern.get("Regex") for pattern in patterns if isinstance(pattern, dict)]
    return [expression for expression in found if isinstance(expression, str)]


def _check_expression(expression: str) -> None:
    what = f"a regular expression in tokenizer.json has {len(expression):,} characters"
    _check_at_most(LONGEST_EXPRESSION, len(expression), what)
    counts = [int((most or least or "1")[:9]) for least, most in _GROUP_COUNT.findall(expression)]
    repeated = math.prod(max(1, count) for count in counts)
    what = f"the regular expression {quoted(expression)} in tokenizer.json repeats a group"
    _check_at_most(MOST_REPEATED, repeated, f"{what} up to {repeated:,} times")


def check_speed(encode: Callable[[str], Any], text: str) -> None:
    """Raises `SurgeryError` if the time for a text grows with its square, beyond all measure.

    No look at a regular expression can tell; the beginning of the text is encoded to measure it.
    A quarter of it may take twice its time on a busy machine, so the least of three counts, and
    what passes though it is slow is measured once more, on four times as much.
    """
    encode("a")  # what is slow once alone
    for size in (_PROBED, 4 * _PROBED):
        if len(text) <= 2 * size:
            return
        quarter = min(_seconds(encode, text[: size // 4]) for _ in range(3))
        whole = _seconds(encode, text[:size])
        foreseen = whole * (len(text) / size) ** 2
        if whole <= 0.05 or foreseen <= LONGEST_WAIT:
            return
        if whole > 8 * quarter:
            raise SurgeryError(
                f"a regular expression in tokenizer.json takes {whole:.2g} s for {size:,} "
                f"characters of the text and {quarter:.2g} s for {size // 4:,}, so about "
                f"{foreseen:,.0f} s for all {len(text):,}; the limit is {LONGEST_WAIT} s",
                "encode it in shorter parts",
            )


def _seconds(encode: Callable[[str], Any], text: str) -> float:
    begun = time.process_time()
    encode(text)
    return time.process_time() - begun


def _check_model(model: dict[str, Any]) -> None:
    vocab, longest = model.get("vocab"), model.get("max_input_chars_per_word")
    if isinstance(vocab, list):
        rows = [row[0] for row in vocab if isinstance(row, list) and row]
        texts = [text for text in rows if isinstance(text, str)]
        size = max((len(text.encode(errors="replace")) for text in texts), default=0)
        what = f"a token of the unigram vocabulary in tokenizer.json has {size:,} bytes"
        _check_at_most(LONGEST_UNIGRAM, size, what)
        _check_nested(texts)
    if type(longest) is int:
        what = f"max_input_chars_per_word in tokenizer.json is {longest:,}"
        _check_at_most(LONGEST_WORD, longest, what)


def _check_nested(tokens: list[str]) -> None:
    """Each character of a text is tried with every token that may begin there."""
    if max(map(len, tokens), default=0) <= MOST_NESTED:
        return
    begun: list[str] = []  # tokens that begin this one, each within the next
    for token in sorted(set(tokens)):
        while begun and not token.startswith(begun[-1]):
            begun.pop()
        begun.append(token)
        if len(begun) > MOST_NESTED:
            raise SurgeryError(
                f"{len(begun)} tokens of the unigram vocabulary in tokenizer.json begin alike, "
                f"each within the next, up to {quoted(token)}; the limit is {MOST_NESTED}"
            )


def steps_of(part: Any, children: str) -> list[dict[str, Any]]:
    """The steps of a part of a `tokenizer.json`, those of sequences within it one by one."""
    if not isinstance(part, dict):
        return []
    within = part.get(children)
    if not isinstance(within, list):
        return [part]
    return [step for child in within for step in steps_of(child, children)]


def _growth(step: dict[str, Any]) -> int:
    """How many characters a step makes of one."""
    if step.get("type") == "Prepend":
        text = step.get("prepend")
        return 1 + len(text) // 64 if isinstance(text, str) else 1
    content, pattern = step.get("content"), step.get("pattern")
    if step.get("type") != "Replace" or not isinstance(content, str):
        return 1
    text = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1, math.ceil(len(content) / max(1, len(text) if isinstance(text, str) else 1)))
