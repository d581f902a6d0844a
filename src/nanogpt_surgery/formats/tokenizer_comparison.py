"""A tokenizer that was written against the one it was written from, on texts for each of its parts.

One sentence does not see a flag of an added token, a normalizer, or a merge: every part has texts
that come out otherwise without it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, prompt_ids, vocab_size_of
from nanogpt_surgery.errors import SurgeryError, quoted

Anything = TypeVar("Anything")

_WORDS = 300  # of the vocabulary, at most
_TOKENS = 300  # of the added ones, at most
_TEXTS = {
    "words": [
        "Once upon a time, in 1823: naïve café?\n\tdef f(x):  return x",
        "It's we'll THEY'RE I'D don't",
        "12 3456 7.5e-3 x1y22z ²½Ⅳ ٣٤",
        "a.b,c;d!?... --- ``quoted'' \"x\" (y)[z]{w} <p> & #1 $2 %3 @me a_b /* */ |",
        "中文字符 日本語テキスト 한국어 עברית العربية हिन्दी 😀👍🏽 ∑√∞",
        "line\nline\r\nline\n\n\nline \n line\t\ttab\u00a0nbsp\u3000wide\u200bzero",
    ],
    "spaces": ["two  three   four    ", "trailing ", "x\n", "a \n b", "x▁y"],
    "blank first": [" x", "  two", "   ", " 7", " naïve"],
    "normalizer": [
        "cafe\u0301 n\u0303 A\u030a \u1112\u1161\u11ab",
        "ﬁne ２３ Ｗide ℌ ① ǆ",
        "ÉCOLE École straße İstanbul",
        "it\u2019s \u201cso\u201d \u2026 \u2014",
        "nul\x00bell\x07del\x7f",
    ],
    "unknown": ["\U0001f9ff\U000e0041 \ue000 \ufffd"],
}


def check_tokenizer(
    tokenizer: Tokenizer | None, again: Tokenizer | None, lost: Collection[str] = ()
) -> None:
    """Refuse unless a tokenizer that was opened again encodes as the one written, part by part.

    Args:
        tokenizer: what was written.
        again: what was opened again.
        lost: parts that are known not to be carried over, and were said.

    Raises:
        SurgeryError: the ids of a text differ (with the part, the text and the first other id), or
            the tokens of a role.
    """
    if tokenizer is None:
        return
    if again is None:
        raise SurgeryError("the tokenizer that was written does not open again")
    for part, text in probe_texts(tokenizer):
        if part not in lost:
            _check_text(part, text, tokenizer, again)
    for role in ("bos_id", "eos_id", "add_bos", "chat_template", "pad_id"):
        ours, theirs = getattr(tokenizer, role, None), getattr(again, role, None)
        if hasattr(tokenizer, role) and ours != theirs:
            raise SurgeryError(
                f"the tokenizer that was written has {quoted(theirs)} as {role}, the model's "
                f"{quoted(ours)}"
            )


def _check_text(part: str, text: str, tokenizer: Tokenizer, again: Tokenizer) -> None:
    for encode in (lambda t, x: list(t.encode(x)), prompt_ids):
        ours, theirs = encode(tokenizer, text), encode(again, text)
        if ours == theirs:
            continue
        place = next(
            (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
            min(len(ours), len(theirs)),
        )
        raise SurgeryError(
            f"the tokenizer that was written encodes otherwise than the model's ({part}): "
            f"{quoted(text)} is {quoted(theirs[place : place + 4])} from its token {place} on, "
            f"where the model's has {quoted(ours[place : place + 4])}"
        )


def probe_texts(tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Texts that exercise a tokenizer, each with the part that it is for."""
    characters = getattr(tokenizer, "character_to_id", None)
    if characters is not None:
        for part, texts in _TEXTS.items():
            yield from ((part, "".join(c for c in text if c in characters)) for text in texts)
        yield "words", "".join(characters)
        return
    for part, texts in _TEXTS.items():
        yield from ((part, text) for text in texts)
    added = _added(tokenizer)
    for token in _some(sorted(added), _TOKENS):
        yield f"added token {quoted(token)}", f"a{token}"
        yield f"added token {quoted(token)}", f"a {token}"
        yield "blank first", f"a {token}  b {token} ."
        for text in (f"{token}b", f"{token}{token}", f"x{token}y z{token}.\n"):
            yield "after a token", text
    yield from (("vocabulary", text) for text in _vocabulary(tokenizer, added))


def _added(tokenizer: Tokenizer) -> set[str]:
    """The added tokens, as a text writes them."""
    to_json = getattr(tokenizer, "to_json", None)
    listed = to_json().get("added_tokens") if to_json is not None else None
    return {token["content"] for token in listed or []}


def _vocabulary(tokenizer: Tokenizer, added: set[str]) -> Iterator[str]:
    """Tokens of the vocabulary as text, evenly chosen, alone and in a row."""
    texts = [tokenizer.decode([i]) for i in _some(range(vocab_size_of(tokenizer)), _WORDS)]
    whole = [text for text in texts if text and "\ufffd" not in text and text not in added]
    plain = [text for text in whole if not text.startswith(" ")]
    yield from plain
    yield "-" + "".join(whole)
    yield "-" + "".join(reversed(whole))


def _some(values: Sequence[Anything], most: int) -> Sequence[Anything]:
    """At most so many, evenly spaced."""
    return values[:: max(1, -(-len(values) // most))]
