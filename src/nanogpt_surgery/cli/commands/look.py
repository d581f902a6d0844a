"""`surgery look`: each layer's answer to a text, where tokens look, what an adapter moved."""

from __future__ import annotations

import json as json_of
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import Json, say, width_of
from nanogpt_surgery.cli.framework.options import Overwrite, check_out
from nanogpt_surgery.cli.model_options import (
    DEFAULT_OPENING,
    AdapterFolder,
    Model,
    OpeningOptions,
    one_adapter,
)
from nanogpt_surgery.errors import SurgeryError, printable

if TYPE_CHECKING:
    import torch

    from nanogpt_surgery.interpret import Comparison, Lens
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

CELL, MARGIN, WIDTH = 12, 6, 100  # columns of the grid; the last where there is no terminal
TOP = 10  # likeliest answers that are kept, and moved tokens


@Parameter(name="*")
@dataclass(frozen=True)
class PictureOptions:
    """Pictures of attention, with --out."""

    layers: tuple[int, ...] | None = None
    """whose attention is drawn; by default the first, the middle and the last"""
    heads: tuple[int, ...] | None = None
    """the heads that are drawn; all by default"""


DEFAULT_PICTURES = PictureOptions()


@dataclass(frozen=True)
class Looked:
    """All that was measured on a text."""

    model: SimpleGPT
    ids: torch.Tensor
    tokens: list[str]
    shown: Callable[[int], str]
    lens: Lens
    comparison: Comparison | None


def look(
    model: Model,
    *,
    prompt: str,
    adapter: AdapterFolder = None,
    out: Path | None = None,
    overwrite: Overwrite = False,
    pictures: PictureOptions = DEFAULT_PICTURES,
    opening: OpeningOptions = DEFAULT_OPENING,
    json: Json = False,
) -> None:
    """Show what each layer would answer to a text, and what an adapter moved.

    The grid has a row for each layer and a column for each token: the likeliest next token, if the
    model ended there, and its probability in percent.

    Parameters
    ----------
    prompt
        the text to look at; - reads it from standard input
    out
        a folder for pictures (PNG) and look.html, a page that opens without a network
    """
    from nanogpt_surgery.data.text.corpus import read_texts

    text = read_texts(["-"]) if prompt == "-" else prompt
    if out is not None:
        check_out(out, overwrite)
    looked = _look(model, text, adapter, opening)
    _check_choices(looked.model, pictures)
    if out is not None:
        _write(out, f"{model}{f' and {adapter}' if adapter else ''}", looked, pictures)
        say(f"wrote {out}; {out / 'look.html'} opens in a browser")
    if json:
        print(json_of.dumps(_as_json(looked), indent=2))
    else:
        _print_grid(looked)
        _print_moved(looked)


def _look(model: str, text: str, adapter: Path | None, opening: OpeningOptions) -> Looked:
    import torch

    from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
    from nanogpt_surgery.interpret import compare, logit_lens

    network, tokenizer = opening.open(model, one_adapter(adapter))
    ids = prompt_ids(tokenizer, text)
    if not ids:
        raise SurgeryError("the text is empty; there is nothing to look at")

    def shown(index: int) -> str:
        return tokenizer.decode([index]).replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")

    row = torch.tensor([ids])
    top = min(TOP, network.config.vocab_size)
    return Looked(
        network,
        row,
        [shown(i) for i in ids],
        shown,
        logit_lens(network, row, top),
        compare(network, row, top, left_out=False) if adapter else None,
    )


def _check_choices(model: SimpleGPT, pictures: PictureOptions) -> None:
    counts = {"layers": model.config.n_layer, "heads": model.config.n_head}
    for name, count in counts.items():
        for chosen in getattr(pictures, name) or ():
            if not 0 <= chosen < count:
                raise SurgeryError(f"{name} has {chosen}; the model's are 0 to {count - 1}")


def _print_grid(looked: Looked) -> None:
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


def _print_moved(looked: Looked) -> None:
    from nanogpt_surgery.report import Report

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


def _as_json(looked: Looked) -> dict[str, Any]:
    lens = looked.lens
    places = range(len(looked.tokens))
    layers = [
        {
            "layer": layer,
            "answers": [
                [
                    {"id": int(i), "text": looked.shown(int(i)), "probability": float(p)}
                    for i, p in zip(
                        lens.likeliest[layer, 0, position],
                        lens.probabilities[layer, 0, position],
                        strict=True,
                    )
                ]
                for position in places
            ],
            "final_rank": lens.final_rank[layer, 0].tolist(),
            "final_probability": lens.final_probability[layer, 0].tolist(),
        }
        for layer in range(len(lens.likeliest))
    ]
    moved = looked.comparison.moved if looked.comparison else []
    return {
        "tokens": looked.tokens,
        "ids": looked.ids[0].tolist(),
        "layers": layers,
        "moved": [vars(one) | {"text": looked.shown(one.id)} for one in moved],
    }


def _write(out: Path, title: str, looked: Looked, pictures: PictureOptions) -> None:
    from nanogpt_surgery.files.atomic import write_folder
    from nanogpt_surgery.interpret import attention, attribution
    from nanogpt_surgery.interpret.page import Side, page
    from nanogpt_surgery.interpret.pictures import draw_attention, draw_attribution, draw_lens

    weights = attention(looked.model, looked.ids)[:, 0]
    shares = attribution(looked.model, looked.ids)
    sides = {"with the adapter" if looked.comparison else "model": Side(looked.lens, weights)}
    if looked.comparison is not None:
        plain = Side(looked.comparison.lens_without, _attention_without(looked))
        sides = {"base": plain, **sides}
    moved = looked.comparison.moved if looked.comparison else ()
    html = page(title, looked.tokens, looked.shown, sides, moved)

    def fill(folder: Path) -> None:
        (folder / "look.html").write_text(html, encoding="utf-8")
        draw_lens(looked.lens, looked.tokens, looked.shown, folder / "lens.png")
        of_what = f"shares in the logit of {looked.shown(int(shares.token))}"
        draw_attribution(shares, of_what, folder / "attribution.png")
        for layer in _layers(looked.model, pictures.layers):
            heads = list(pictures.heads or range(weights.size(1)))
            goal = folder / f"attention-{layer}.png"
            draw_attention(weights[layer, heads], looked.tokens, heads, f"layer {layer}", goal)

    write_folder(out, fill)


def _attention_without(looked: Looked) -> torch.Tensor:
    from nanogpt_surgery.interpret import attention
    from nanogpt_surgery.interpret.comparison import without
    from nanogpt_surgery.lora.several import lora_layers

    with without(lora_layers(looked.model).values()):
        return attention(looked.model, looked.ids)[:, 0]


def _layers(model: SimpleGPT, chosen: Sequence[int] | None) -> list[int]:
    last = model.config.n_layer - 1
    return sorted(set(chosen or (0, last // 2, last)))
