"""Several texts at once, of any lengths: their new ids share a step of the decoder.

Each row has a cache of its own, so none is padded, and nothing of a row depends on the others. Long
prompts, for which PyTorch is faster, are computed each by itself, as `generate` computes them, and
so is each token that the decoder cannot compute. Where `lora_rows` gives each row its own adapter,
that is computed with it.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from nanogpt_surgery.generation.generate import last_logits, new_cache, next_logits
from nanogpt_surgery.generation.native.decoder import (
    NativeSteps,
    NewTokens,
    TextCache,
    row_caches,
)
from nanogpt_surgery.generation.settings import Engine
from nanogpt_surgery.lora.per_row import one_of_rows
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.simple_gpt import SimpleGPT


class SeparateRows:
    """The logits of several texts as they grow, each with a cache of its own on the CPU.

    Args:
        model: to be decoded.
        rows: how many texts.
        length: tokens of the longest, at most; those past block_size slide.
        engine: as for `generate`.

    Raises:
        SurgeryError: the decoder is asked for, and does not compute this model.
    """

    def __init__(self, model: SimpleGPT, rows: int, length: int, engine: Engine = "auto"):
        cache = new_cache(model, rows, min(model.config.block_size, length))
        self.model, self.texts = model, [TextCache(row) for row in row_caches(cache)]
        self.native = None
        if engine != "plain":
            self.native = NativeSteps(model, cache, required=engine == "native")
            self.native.required = False  # what happens to the model later is computed plainly

    def logits(self, texts: Mapping[int, list[int]]) -> list[Tensor]:
        """Returns the logits (V,) after each of some rows' ids, by row; their caches hold them.

        Raises:
            NotFiniteError: one of them is no finite number.
        """
        found = {}
        taken = list[int]()
        if self.native is not None and self.native.can_step():
            taken = [
                row for row, ids in texts.items() if self._takes(row, ids, self.native.longest)
            ]
        if taken:
            found = dict(zip(taken, self._step(taken, texts), strict=True))
        for row in texts.keys() - found:
            with one_of_rows(self.model, row):
                found[row] = next_logits(self.model, texts[row], self.texts[row].cache)
        return [found[row] for row in texts]

    def _takes(self, row: int, ids: list[int], longest: int) -> bool:
        """Returns whether the decoder is given a text's new ids: they fit, and are not too many."""
        cache = self.texts[row].cache
        return len(ids) <= cache.max_length and len(ids) - cache.length <= longest

    def _step(self, rows: Sequence[int], texts: Mapping[int, list[int]]) -> Tensor:
        assert self.native is not None and self.native.decoder is not None, "see _takes"
        adapters, new = self.native.decoder.adapters_of_rows or [0] * len(self.texts), []
        for row in rows:
            cache = self.texts[row].cache
            ids = torch.tensor([texts[row][cache.length :]])
            cache.append_ids(ids)
            new.append(NewTokens(self.texts[row], ids.size(1), adapter=adapters[row]))
        logits = torch.cat(self.native.decoder.step_texts(new))  # (N, V)
        for row, of_row in zip(rows, logits, strict=True):
            check_finite(of_row, self.model, partial(self._anew, row, texts[row]))
        return logits

    def _anew(self, row: int, ids: list[int]) -> Tensor:
        with one_of_rows(self.model, row):
            return last_logits(self.model, torch.tensor(ids))
