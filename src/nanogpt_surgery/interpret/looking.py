"""A text as a model looks at it: what each layer would answer, attention, what adapters moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.interpret.attribution import attribution
from nanogpt_surgery.interpret.comparison import Comparison, compare, without
from nanogpt_surgery.interpret.lens import Lens, attention, logit_lens
from nanogpt_surgery.interpret.page import Side, page
from nanogpt_surgery.interpret.pictures import draw_attention, draw_attribution, draw_lens
from nanogpt_surgery.lora.several import has_lora, lora_layers
from nanogpt_surgery.model.simple_gpt import SimpleGPT

TOP = 10  # likeliest answers that are kept, and moved tokens


@dataclass(frozen=True)
class Look:
    """All that was measured on a text; `look_at` gives one."""

    model: SimpleGPT
    ids: torch.Tensor
    """(1, T)"""
    tokens: list[str]
    shown: Callable[[int], str]
    """an id as text in which blanks are seen"""
    lens: Lens
    comparison: Comparison | None
    """what adapters moved, if the model carries any"""

    def to_dict(self) -> dict[str, Any]:
        """Returns tokens, the answers of each layer, and the tokens moved most, as plain values."""
        lens = self.lens
        places = range(len(self.tokens))
        layers = [
            {
                "layer": layer,
                "answers": [
                    [
                        {"id": int(i), "text": self.shown(int(i)), "probability": float(p)}
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
        moved = self.comparison.moved if self.comparison else []
        return {
            "tokens": self.tokens,
            "ids": self.ids[0].tolist(),
            "layers": layers,
            "moved": [vars(one) | {"text": self.shown(one.id)} for one in moved],
        }

    def check_choices(self, layers: Sequence[int] | None, heads: Sequence[int] | None) -> None:
        """Raises `SurgeryError` for a layer or a head that the model has not."""
        config = self.model.config
        for name, count, numbers in (
            ("layers", config.n_layer, layers),
            ("heads", config.n_head, heads),
        ):
            for chosen in numbers or ():
                if not 0 <= chosen < count:
                    raise SurgeryError(f"{name} has {chosen}; the model's are 0 to {count - 1}")

    def write(
        self,
        folder: Path,
        title: str,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        """Writes pictures (PNG) and look.html, a page that opens without a network.

        Args:
            folder: made, or replaced.
            title: the page's.
            layers: whose attention is drawn; by default the first, the middle and the last.
            heads: that are drawn; all by default.

        Raises:
            SurgeryError: as `check_choices`, or the text is too long for a page.
        """
        self.check_choices(layers, heads)
        weights = attention(self.model, self.ids)[:, 0]  # (L, H, T, S)
        shares = attribution(self.model, self.ids)
        sides = {"with the adapter" if self.comparison else "model": Side(self.lens, weights)}
        if self.comparison is not None:
            with without(lora_layers(self.model).values()):
                plain = attention(self.model, self.ids)[:, 0]
            sides = {"base": Side(self.comparison.lens_without, plain), **sides}
        moved = self.comparison.moved if self.comparison else ()
        html = page(title, self.tokens, self.shown, sides, moved)
        last = len(weights) - 1
        drawn = list(heads or range(weights.size(1)))

        def fill(new: Path) -> None:
            (new / "look.html").write_text(html, encoding="utf-8")
            draw_lens(self.lens, self.tokens, self.shown, new / "lens.png")
            of_what = f"shares in the logit of {self.shown(int(shares.token))}"
            draw_attribution(shares, of_what, new / "attribution.png")
            for layer in sorted(set(layers or (0, last // 2, last))):
                goal = new / f"attention-{layer}.png"
                draw_attention(weights[layer, drawn], self.tokens, drawn, f"layer {layer}", goal)

        write_folder(folder, fill)


def look_at(model: SimpleGPT, tokenizer: Tokenizer, text: str) -> Look:
    """Measures a model, with the adapters that take part in it, on a text.

    Raises:
        SurgeryError: the text is empty, or the vocabulary lacks a character of it.
    """
    ids = prompt_ids(tokenizer, text)
    if not ids:
        raise SurgeryError("the text is empty; there is nothing to look at")

    def shown(index: int) -> str:
        return tokenizer.decode([index]).replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")

    row = torch.tensor([ids])
    top = min(TOP, model.config.vocab_size)
    compared = compare(model, row, top, left_out=False) if has_lora(model) else None
    lens = compared.lens_with if compared else logit_lens(model, row, top)
    return Look(model, row, [shown(i) for i in ids], shown, lens, compared)
