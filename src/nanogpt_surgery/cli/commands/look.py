"""`surgery look`: each layer's answer to a text, where tokens look, what an adapter moved."""

from __future__ import annotations

import json as json_of
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_surgery.cli.framework.console import say, width_of
from nanogpt_surgery.cli.framework.options import (
    AdapterFolder,
    Json,
    Model,
    OpeningOptions,
    Overwrite,
    check_out,
    one_adapter,
    typed_or_read,
)
from nanogpt_surgery.errors import printable
from nanogpt_surgery.report import Report

if TYPE_CHECKING:
    from nanogpt_surgery.interpret.looking import Look

CELL, MARGIN, WIDTH = 12, 6, 100  # columns of the grid; the last where there is no terminal


def look(
    model: Model,
    *,
    prompt: str,
    adapter: AdapterFolder = None,
    out: Path | None = None,
    overwrite: Overwrite = False,
    layers: tuple[int, ...] | None = None,
    heads: tuple[int, ...] | None = None,
    opening: OpeningOptions = OpeningOptions(),
    json: Json = False,
) -> None:
    """Show what each layer would answer to a text, and what an adapter moved.

    The grid has a row for each layer and a column for each token: the likeliest next token, if the
    model ended there, and its probability in percent.

    Args:
        prompt: the text to look at; - reads it from standard input
        out: a folder for pictures (PNG) and look.html, a page that opens without a network
        layers: whose attention is drawn; by default the first, the middle and the last
        heads: the heads that are drawn; all by default
    """
    from nanogpt_surgery.interpret.looking import look_at

    text = typed_or_read(prompt)
    if out is not None:
        check_out(out, overwrite)
    looked = look_at(*opening.open(model, one_adapter(adapter)), text)
    pictures = {"layers": layers, "heads": heads}
    looked.check_choices(**pictures)
    if out is not None:
        looked.write(out, f"{model}{f' and {adapter}' if adapter else ''}", **pictures)
        say(f"wrote {out}; {out / 'look.html'} opens in a browser")
    if json:
        print(json_of.dumps(looked.to_dict(), indent=2))
    else:
        _print_grid(looked)
        _print_moved(looked)


def _print_grid(looked: Look) -> None:
    """A row for each layer, the last above; as many of the last tokens as there is room for."""
    from rich.console import Console
    from rich.text import Text

    lens, width = looked.lens, width_of(sys.stdout) or WIDTH
    columns = max(1, min(len(looked.tokens), (width - MARGIN) // CELL))
    first = len(looked.tokens) - columns
    console = Console(file=sys.stdout, width=width, highlight=False, soft_wrap=True)
    head = "".join(_fitted(token, CELL) for token in looked.tokens[first:])
    console.print(Text(" " * MARGIN + head.rstrip(), style="bold"))
    for layer in range(len(lens.likeliest) - 1, -1, -1):
        line = Text(f"{layer or 'input':>{MARGIN - 2}}  ")
        for position in range(first, len(looked.tokens)):
            share = float(lens.probabilities[layer, 0, position, 0])
            answer = looked.shown(int(lens.likeliest[layer, 0, position, 0]))
            cell = f"{_fitted(answer, CELL - 4)}{100 * share:3.0f} "
            line.append(cell, style=_style(share))
        line.rstrip()
        console.print(line)
    if first:
        console.print(Text(f"(the last {columns} of {len(looked.tokens)} tokens)"))


def _fitted(token: str, width: int) -> str:
    """A token in so many columns, the last one blank."""
    from rich.cells import set_cell_size

    return set_cell_size(printable(token), width - 1) + " "


def _style(share: float) -> str:
    """The bluer the likelier, on light and on dark."""
    for least, style in ((0.75, "white on blue"), (0.4, "bold blue"), (0.1, "blue")):
        if share >= least:
            return style
    return "dim"


def _print_moved(looked: Look) -> None:
    if looked.comparison is None:
        return
    rows = [
        {
            "after": looked.tokens[moved.position],
            "token": looked.shown(moved.id),
            "without": round(moved.without, 4),
            "with": round(moved.with_it, 4),
        }
        for moved in looked.comparison.moved
    ]
    kl = float(looked.comparison.kl.mean())
    report = Report("what the adapter moved most", rows, {"kl divergence": kl})
    print(printable(report.to_text(width_of(sys.stdout), whole=True)))
