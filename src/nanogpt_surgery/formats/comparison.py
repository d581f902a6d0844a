"""Compares what was written with what it was written from; what does not agree is not kept.

For a tokenizer one sentence does not do, which does not see a flag of an added token, a normalizer,
or a merge: every part has texts that come out otherwise without it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, prompt_ids, vocab_size_of
from nanogpt_surgery.errors import SurgeryError, quoted, warn
from nanogpt_surgery.history.journal import shortened
from nanogpt_surgery.history.model_history import tensor_hash
from nanogpt_surgery.lora.merging import in_turn
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.loss import eval_mode, kl_divergence
from nanogpt_surgery.model.precision import computing_in_float32
from nanogpt_surgery.model.simple_gpt import SimpleGPT

# How far a number may move, as a share of the largest in its row.
_TOLERANCES = {"F32": 0.0, "F16": 2**-10, "BF16": 2**-8, "Q8_0": 0.6 / 127}
_PROBE = 16


@dataclass(frozen=True)
class Written:
    """A tensor that was written, as it was noted while it was in memory."""

    kind: str
    """how it was stored"""
    sha256: str
    """of the numbers that a reader is to find, float32; see `tensor_hash`"""
    moved: float
    """how far the farthest of them is from its own, as a share of the largest in its row"""


def compare(
    written: Mapping[str, Written],
    again: SimpleGPT,
    tokenizer: Tokenizer | None,
    tokenizer_again: Tokenizer | None,
    lost: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Compares every tensor to the bit, and the tokenizer on texts for each part.

    Args:
        written: the tensors, by their names in the model.
        again: what the file holds.
        tokenizer: what was written.
        tokenizer_again: what the file holds.
        lost: parts of the tokenizer that are known not to be carried over, and were said.

    Returns:
        A row for each kind of storage.

    Raises:
        SurgeryError: a tensor is not what was written, or what was written is further from the
            model's own than its kind allows, or the tokenizer encodes otherwise.
    """
    rows = _tensor_rows(written, again)
    if tokenizer is None:
        warn("no tokenizer was written: whoever opens the file must bring ids")
    check_tokenizer(tokenizer, tokenizer_again, lost)
    return rows


def check_equal(
    model: SimpleGPT,
    again: SimpleGPT,
    tokenizer: Tokenizer | None,
    tokenizer_again: Tokenizer | None,
) -> None:
    """Raises `SurgeryError` unless tensors have the same bits and texts the same ids."""
    ours, theirs = model.state_dict(), again.state_dict()
    wrong = [
        name
        for name, tensor in ours.items()
        if name not in theirs or not _same_bits(tensor, theirs[name])
    ]
    if wrong:
        raise SurgeryError(f"what was written does not read back: {', '.join(wrong[:8])}")
    check_tokenizer(tokenizer, tokenizer_again)


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    left, right = (t.detach().cpu().contiguous().view(torch.uint8) for t in (ours, theirs))
    return torch.equal(left, right)


def _tensor_rows(written: Mapping[str, Written], again: SimpleGPT) -> list[dict[str, Any]]:
    theirs = again.state_dict()
    worst: dict[str, list[float]] = {}
    wrong: list[str] = []
    found = in_turn(lambda name: tensor_hash(theirs[name].float()), written)
    for (name, one), sha256 in zip(written.items(), found, strict=True):
        if sha256 != one.sha256:
            wrong.append(
                f"{name} has the sha256 {shortened(sha256)} instead of {shortened(one.sha256)}"
            )
        elif not one.moved <= _TOLERANCES[one.kind] * 1.01 + 2**-24:
            wrong.append(f"{name} moved by {one.moved:.2g} of its row's largest number")
        worst.setdefault(one.kind, []).append(one.moved)
    if wrong:
        raise SurgeryError(
            f"what was written does not read back: {'; '.join(wrong[:8])}",
            "the weights may be beyond the range of this type; try F32",
        )
    return [
        {"stored as": kind, "tensors": len(errors), "largest error": max(errors)}
        for kind, errors in sorted(worst.items())
    ]


def largest_move(ours: Tensor, theirs: Tensor) -> float:
    """The farthest that a number is from its own, as a share of the largest in its row."""
    if ours.shape != theirs.shape:
        return float("inf")
    widest = torch.float64 if ours.dtype == torch.float64 else torch.float32
    ours, theirs = ours.detach().to("cpu", widest), theirs.detach().to(widest)
    scale = ours.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return float(((ours - theirs).abs() / scale).max())


def effect_on_logits(model: SimpleGPT, again: SimpleGPT) -> dict[str, float]:
    """How far a written model's logits on probe ids are from those of what was written.

    The largest error, the KL divergence, and the share of unchanged top tokens.

    Raises:
        SurgeryError: they are not finite.
    """
    draw = torch.Generator().manual_seed(0)
    length = min(_PROBE, model.config.block_size)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=draw)
    device = model.embed_tokens.weight.device
    with computing_in_float32(model), computing_in_float32(again):
        with eval_mode(model), torch.no_grad():
            ours, theirs = model(ids.to(device)).cpu(), again(ids)
        check_finite(ours, model, lambda: model(ids.to(device)))
        check_finite(theirs, again, lambda: again(ids), "the written model")
    return {
        "largest_logit_error": float((ours - theirs).abs().max()),
        "kl_divergence": float(kl_divergence(ours, theirs)),
        "top_token_unchanged": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }


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
    """Checks that a tokenizer that was opened again encodes as the one written, part by part.

    Parts that are `lost` are known not to be carried over, and were said.

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
