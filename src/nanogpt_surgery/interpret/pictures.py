"""Pictures (PNG) of the lens, of attention, of shares in a logit, of an adapter's spectra.

Backgrounds are transparent, and what is drawn reads on white and on black.

Legend: L layers, T tokens, S keys, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nanogpt_surgery.drawing import BLUE, GREY, ORANGE, drawable, paint
from nanogpt_surgery.interpret.attribution import Attribution
from nanogpt_surgery.interpret.lens import Lens
from nanogpt_surgery.report import Report

LONGEST_LABEL = 10  # characters of a token
MOST_CELLS_WITH_TEXT = 1200


def draw_lens(lens: Lens, tokens: Sequence[str], answers: Any, goal: Path, row: int = 0) -> None:
    """Draws each layer's answer after each token, the bluer the likelier.

    Args:
        lens: of a text.
        tokens: that text's, T of them.
        answers: gives the text of an id.
        goal: the PNG to write.
        row: of the batch.
    """
    likely, ids = lens.probabilities[:, row, :, 0], lens.likeliest[:, row, :, 0]
    count, width = likely.shape
    figure, axes = _figure(max(4, 0.75 * width + 1.2), max(3, 0.26 * count + 1.2))
    axes.imshow(_shades(likely**1.5), aspect="auto", origin="lower")
    if likely.numel() <= MOST_CELLS_WITH_TEXT:
        for y in range(count):
            for x in range(width):
                colour = GREY if likely[y, x] < 0.6 else "white"
                _write(axes, x, y, answers(int(ids[y, x])), colour)
    _label_tokens(axes.xaxis, tokens)
    axes.set_yticks(range(0, count, 1 + count // 32))
    axes.set(ylabel="after how many layers")
    axes.set_title("the likeliest next token; the stronger the blue, the likelier")
    _save(figure, axes, goal)


def draw_attention(
    probabilities: Tensor, tokens: Sequence[str], names: Sequence[int], title: str, goal: Path
) -> None:
    """Draws how much each token (down) looks at each key (across): a picture for each head.

    Args:
        probabilities: (H, T, S), S = T.
        tokens: of the text.
        names: the numbers of these heads.
        title: above all.
        goal: the PNG to write.
    """
    heads, count = probabilities.size(0), probabilities.size(1)
    columns = min(heads, 4)
    rows = -(-heads // columns)
    side = max(2.2, 0.16 * count + 1)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * side, rows * side + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for head, axes in enumerate(grid):
        if head >= heads:
            axes.set_axis_off()
            continue
        axes.imshow(_shades(probabilities[head]))
        axes.set_title(f"head {names[head]}", fontsize=9)
        _label_tokens(axes.xaxis, tokens, small=True)
        _label_tokens(axes.yaxis, tokens, small=True)
        paint(axes)
    text, fonts = drawable(title)
    figure.suptitle(text, family=fonts, color=GREY, parse_math=False)
    figure.savefig(goal, dpi=110, transparent=True, format="png")


def draw_attribution(found: Attribution, title: str, goal: Path, row: int = 0) -> None:
    """Draws each head's and each feed-forward's share in a logit: blue adds, orange takes.

    The strength of the colour is the square root of the share, relative to the largest.
    """
    import torch

    heads = found.heads[row]  # (L, H)
    shares = torch.cat((heads, found.feed_forward[row][:, None]), 1)
    count, width = shares.shape
    largest = float(shares.abs().amax().clamp_min(1e-9))
    figure, axes = _figure(max(4.5, 0.45 * width + 1.5), max(3, 0.22 * count + 1.2))
    strength = (shares / largest).abs().sqrt() * shares.sign()  # small ones are seen, too
    axes.imshow(_signed(strength), aspect="auto", origin="lower")
    axes.set_xticks(range(width), [*map(str, range(width - 1)), "feed-forward"], rotation=90)
    axes.set_yticks(range(0, count, 1 + count // 32))
    axes.set(xlabel=f"head; the strongest colour is {largest:.2f}", ylabel="layer")
    text, fonts = drawable(title)
    axes.set_title(text, family=fonts, parse_math=False)
    _save(figure, axes, goal)


def draw_examination(report: Report, goal: Path) -> None:
    """Draws ‖ΔW‖ / ‖W‖ of each layer, and of how many directions it is beside its rank."""
    rows = [row for row in report.rows if row["rank"]]
    places = range(len(rows))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, max(2.5, 0.11 * len(rows) + 1.5)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(places, [row["ΔW / W"] for row in rows], color=BLUE)
    left.set(xlabel="‖ΔW‖ / ‖W‖")
    left.set_yticks(places, [row["layer"] for row in rows], fontsize=6)
    left.invert_yaxis()
    right.barh(places, [row["rank"] for row in rows], color=GREY, alpha=0.3, label="rank")
    ranks = [row["effective rank"] for row in rows]
    right.barh(places, ranks, color=ORANGE, label="effective rank")
    right.set(xlabel="directions")
    for axes in (left, right):
        axes.margins(y=0.01)
        paint(axes)
    legend = right.get_legend()
    if legend is not None:  # above the bars, not on them
        legend.remove()
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False,
                      labelcolor=GREY)  # fmt: skip
    figure.savefig(goal, dpi=90, transparent=True, format="png")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, axes: Any, goal: Path) -> None:
    paint(axes)
    figure.savefig(goal, dpi=110, transparent=True, format="png")


def _shades(shares: Tensor) -> Any:
    """Returns blue as strong as each number from 0 to 1, (…, 4)."""
    return _coloured(shares.clamp(0, 1), BLUE)


def _signed(shares: Tensor) -> Any:
    """Returns blue for positive numbers up to 1, orange for negative ones, (…, 4)."""
    blue, orange = _coloured(shares.clamp(0, 1), BLUE), _coloured((-shares).clamp(0, 1), ORANGE)
    return (shares >= 0)[..., None].numpy() * blue + (shares < 0)[..., None].numpy() * orange


def _coloured(alpha: Tensor, colour: str) -> Any:
    import numpy as np
    from matplotlib.colors import to_rgb

    shares = alpha.float().cpu().numpy()[..., None]
    rgb = np.broadcast_to(np.array(to_rgb(colour)), (*shares.shape[:-1], 3))
    return np.concatenate((rgb, shares), -1)


def _label_tokens(axis: Any, tokens: Sequence[str], small: bool = False) -> None:
    every = 1 + len(tokens) // 64
    texts = [drawable(token[:LONGEST_LABEL])[0] for token in tokens[::every]]
    axis.set_ticks(range(0, len(tokens), every), texts, fontsize=6 if small else 8)
    for label in axis.get_ticklabels():
        label.set(parse_math=False, family=drawable("".join(tokens))[1])
        if axis.axis_name == "x":
            label.set_rotation(90)


def _write(axes: Any, x: int, y: int, text: str, colour: str) -> None:
    shown, fonts = drawable(text[:LONGEST_LABEL])
    place = {"ha": "center", "va": "center", "fontsize": 6.5, "parse_math": False}
    axes.text(x, y, shown, color=colour, family=fonts, **place)
