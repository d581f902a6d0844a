"""One page (look.html) that shows a model looking at a text, and opens without a network."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.interpret.comparison import Moved
from nanogpt_surgery.interpret.lens import Lens

TEMPLATE = Path(__file__).with_name("look.html")
MOST_WEIGHTS = 1 << 24  # of attention, a byte each
ANSWERS = 5  # that are shown of each layer


@dataclass(frozen=True)
class Side:
    """A model as it looks at a text: the base, or with an adapter."""

    lens: Lens
    attention: Tensor
    """(L, H, T, S)"""


def page(
    title: str,
    tokens: Sequence[str],
    answers: Callable[[int], str],
    sides: Mapping[str, Side],
    moved: Sequence[Moved] = (),
) -> str:
    """Returns the page as HTML; all that a model or a user wrote is in it as text alone.

    Args:
        title: above all.
        tokens: the text's.
        answers: gives the text of an id.
        sides: one or two, by their names.
        moved: tokens whose probability an adapter moved.

    Raises:
        SurgeryError: the text has too many tokens for a page (both numbers).
    """
    layers, heads, count, _ = next(iter(sides.values())).attention.shape
    weights = layers * heads * count * count * len(sides)
    if weights > MOST_WEIGHTS:
        raise SurgeryError(
            f"{count:,} tokens make {weights:,} weights of attention, and a page takes "
            f"{MOST_WEIGHTS:,}",
            "give it a shorter text",
        )
    data = {
        "title": title,
        "tokens": list(tokens),
        "layers": layers,
        "heads": heads,
        "sides": [_side(name, side, answers) for name, side in sides.items()],
        "moved": [
            [tokens[m.position], answers(m.id), _finite(m.without), _finite(m.with_it)]
            for m in moved
        ],
    }
    # In a script element only "<" could end it or begin a comment.
    written = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", written, 1)


def _finite(share: float) -> float | None:
    """Returns a probability to four digits; None of NaN, which JSON has not."""
    return round(share, 4) if math.isfinite(share) else None


def _side(name: str, side: Side, answers: Callable[[int], str]) -> dict[str, Any]:
    lens = side.lens
    likeliest, shares = (x[:, 0, :, :ANSWERS] for x in (lens.likeliest, lens.probabilities))
    texts = {i: answers(i) for i in set(likeliest.flatten().tolist())}
    pairs = zip(likeliest.tolist(), shares.tolist(), strict=True)
    weights = (side.attention.float() * 255).round().byte().cpu().numpy().tobytes()
    return {
        "name": name,
        "lens": [
            [
                [[texts[i], _finite(p)] for i, p in zip(*position, strict=True)]
                for position in zip(*layer, strict=True)
            ]
            for layer in pairs
        ],
        "ranks": lens.final_rank[:, 0].tolist(),
        "attention": base64.b64encode(weights).decode(),
    }
