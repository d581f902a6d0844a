"""The ids that the `post_processor` of a `tokenizer.json` puts around a text."""

from __future__ import annotations

from typing import Any

from nanogpt_surgery.errors import SurgeryError, quoted


def added_around(processor: Any) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before a text, and those it puts behind it.

    Raises:
        SurgeryError: it writes the text another number of times than once.
    """
    if not isinstance(processor, dict):
        return [], []
    kind = processor.get("type")
    if kind == "Sequence":  # each puts its own around what those before it made
        before: list[int] = []
        behind: list[int] = []
        for step in processor["processors"]:
            first, last = added_around(step)
            before, behind = [*first, *before], [*behind, *last]
        return before, behind
    if kind in ("RobertaProcessing", "BertProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]]
    if kind == "TemplateProcessing":
        return _template(processor)
    return [], []


def _template(processor: dict[str, Any]) -> tuple[list[int], list[int]]:
    pieces = processor["single"]
    texts = [i for i, piece in enumerate(pieces) if "Sequence" in piece]
    if len(texts) != 1:
        raise SurgeryError(
            f"the tokenizer.json's post_processor writes a text {len(texts)} times; it must be once"
        )
    return _ids(processor, pieces[: texts[0]]), _ids(processor, pieces[texts[0] + 1 :])


def _ids(processor: dict[str, Any], pieces: list[Any]) -> list[int]:
    table = processor["special_tokens"]
    names = [piece["SpecialToken"]["id"] for piece in pieces]
    unknown = [name for name in names if name not in table]
    if unknown:
        raise SurgeryError(
            f"the tokenizer.json's post_processor has no ids for {quoted(unknown[0])}"
        )
    return [i for name in names for i in table[name]["ids"]]


def begin_with(token: str | None, index: int) -> dict[str, Any]:
    """A post-processor that puts a token (BOS) before a text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
