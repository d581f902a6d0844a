"""Pictures that read on white paper and on a dark screen: colours, and letters of any script."""

from __future__ import annotations

from typing import Any

from nanogpt_surgery.errors import printable

GREY, BLUE, ORANGE = "#808080", "#3f8fd6", "#e0812c"  # on white and on black
LONGEST_TITLE = 70
NO_LETTERS = ("Last Resort", "LastResort", "Color Emoji", "Emoji", "cm", "STIX")  # fonts' names


def paint(axes: Any) -> None:
    """Makes grey all that is no curve, and the legend's background transparent."""
    axes.tick_params(colors=GREY)
    for line in axes.spines.values():
        line.set_color(GREY)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(GREY)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(labelcolor=GREY, framealpha=0, edgecolor=GREY)


def drawable(title: str) -> tuple[str, list[str]]:
    r"""A title as it can be drawn, and the fonts for it.

    What no font here has is written as its number: \u4e2d.
    """
    from matplotlib.font_manager import findfont

    text = printable(title).replace("\n", " ").replace("\t", " ")
    if len(text) > LONGEST_TITLE:
        text = "…" + text[1 - LONGEST_TITLE :]
    fonts, missing = ["DejaVu Sans"], _missing(set(text), str(findfont("DejaVu Sans")))
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
