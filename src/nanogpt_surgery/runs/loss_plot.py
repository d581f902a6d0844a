"""The losses of a run as a PNG that reads on white paper and on a dark screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import printable

SMOOTHED_FROM = 200  # steps; fewer are drawn as they are
GREY, BLUE, ORANGE = "#808080", "#3f8fd6", "#e0812c"  # on white and on black
LONGEST_TITLE = 70
NO_LETTERS = ("Last Resort", "LastResort", "Color Emoji", "Emoji", "cm", "STIX")  # fonts' names


def plot_losses(
    metrics: Sequence[dict[str, Any]], goal: Path, title: str, base: bool = False
) -> None:
    """Draws training loss and validation loss against steps, from step 0 on.

    From 200 steps on the training loss is faint, with the mean of the steps around each one over
    it. The background is transparent.

    Args:
        metrics: rows with `step`, `loss` (or None) and `validation_loss` (or None), losses in nats
            a token; a row of step 0 is the validation before the first step.
        goal: the PNG to write.
        title: above the picture.
        base: whether the model of step 0 is one that is fine-tuned: its loss is a line then.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained, validated = _curve(metrics, "loss"), _curve(metrics, "validation_loss")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    _draw_training(axes, trained)
    if validated:
        steps, losses = zip(*validated, strict=True)
        axes.plot(steps, losses, color=ORANGE, marker="o", ms=4, clip_on=False, label="validation")
    if base and validated and validated[0][0] == 0:
        loss = validated[0][1]
        axes.axhline(loss, color=GREY, linestyle="--", label=f"validation, base: {loss:.3f}")
    last = max((row["step"] for row in metrics), default=0)
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step", ylabel="loss, nats a token")
    text, fonts = drawable(title)
    axes.set_title(text, family=fonts, parse_math=False)
    _paint(axes)
    figure.savefig(goal, dpi=120, transparent=True)


def _curve(metrics: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Steps with their loss, where one was measured."""
    found = [(row["step"], row.get(key)) for row in metrics]
    return [(step, loss) for step, loss in found if loss is not None and math.isfinite(loss)]


def _draw_training(axes: Any, trained: list[tuple[int, float]]) -> None:
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    if not trained or len(trained) < SMOOTHED_FROM:
        axes.plot(steps, losses, color=BLUE, linewidth=1.2, label="training")
        return
    width = max(5, len(losses) // 50)
    axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8)
    label = f"training, mean of {2 * width + 1} steps"
    inner = slice(width // 4, len(losses) - width // 4)  # at the very ends a mean is of too few
    axes.plot(steps[inner], centred_means(losses, width)[inner], color=BLUE, label=label)


def centred_means(values: Sequence[float], width: int) -> list[float]:
    """For each value the mean of it and of as many on either side, at most `width`.

    At the ends both sides are shorter alike, so that nothing lags.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    sides = [min(width, i, len(values) - 1 - i) for i in range(len(values))]
    return [(sums[i + s + 1] - sums[i - s]) / (2 * s + 1) for i, s in enumerate(sides)]


def _paint(axes: Any) -> None:
    """Grey for all that is no curve, and a legend without a background."""
    axes.grid(color=GREY, alpha=0.3)
    axes.tick_params(colors=GREY)
    for line in axes.spines.values():
        line.set_color(GREY)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(GREY)
    axes.legend(labelcolor=GREY, framealpha=0, edgecolor=GREY)


def drawable(title: str) -> tuple[str, list[str]]:
    r"""A title as it can be drawn, and the fonts for it.

    What no font here has is written as its number: \u4e2d.
    """
    text = printable(title).replace("\n", " ").replace("\t", " ")
    if len(text) > LONGEST_TITLE:
        text = "…" + text[1 - LONGEST_TITLE :]
    fonts, missing = ["DejaVu Sans"], _missing(set(text), _path_of("DejaVu Sans"))
    for name, path in _others() if missing else ():
        left = _missing(missing, path)
        if left != missing:
            fonts, missing = [*fonts, name], left
        if not missing:
            break
    return "".join(_escaped(c) if c in missing else c for c in text), fonts


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\U{number:08x}" if number > 0xFFFF else f"\\u{number:04x}"


def _path_of(name: str) -> str:
    from matplotlib.font_manager import findfont

    return str(findfont(name))


def _others() -> list[tuple[str, str]]:
    """The installed fonts of letters, one file a name."""
    from matplotlib.font_manager import fontManager

    plain = {
        font.name: font.fname
        for font in reversed(fontManager.ttflist)
        if font.style == "normal" and not any(word in font.name for word in NO_LETTERS)
    }
    return sorted(plain.items())


def _missing(characters: set[str], path: str) -> set[str]:
    """Those of the characters that a font has no glyph for; all, where it does not open."""
    from matplotlib.ft2font import FT2Font

    try:
        known = FT2Font(path).get_charmap()
    except (OSError, RuntimeError):
        return characters
    return {character for character in characters if ord(character) not in known}
