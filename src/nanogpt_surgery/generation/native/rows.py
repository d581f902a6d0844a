"""Several texts at once, of any lengths: those with one new id share a step of the decoder.

Each row has a cache of its own, so none is padded, and nothing of a row depends on the others: its
prompt is computed by itself, as `generate` computes it, and so is each token that the decoder
cannot compute. Where `lora_rows` gives each row its own adapter, that is computed with it.

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
from nanogpt_surgery.lora.per_row import one_of_rows
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import KVCache


class NativeRows:
    """The logits of several texts as they grow.

    Args:
        model: to be decoded.
        rows: how many texts.
        length: tokens of the longest, at most; those past block_size slide.

    Raises:
        SurgeryError: the decoder does not compute this model.
    """

    def __init__(self, model: SimpleGPT, rows: int, length: int):
        cache = new_cache(model, rows, min(model.config.block_size, length))
        self.model, self.texts = model, [TextCache(row) for row in row_caches(cache)]
        self.native = NativeSteps(model, cache, required=True)
        self.native.required = False  # what happens to the model later is computed plainly

    def logits(self, texts: Mapping[int, list[int]]) -> list[Tensor]:
        """Returns the logits (V,) after each of some rows' ids, by row; their caches hold them.

        Raises:
            NotFiniteError: one of them is no finite number.
        """
        found = {}
        grown = [r for r, ids in texts.items() if self._has_one_more(self.texts[r].cache, ids)]
        if grown and self.native.can_step():
            found = dict(zip(grown, self._step(grown, texts), strict=True))
        for row in texts.keys() - found:
            with one_of_rows(self.model, row):
                found[row] = next_logits(self.model, texts[row], self.texts[row].cache)
        return [found[row] for row in texts]

    def _has_one_more(self, cache: KVCache, ids: list[int]) -> bool:
        """Returns whether a text has one id more than its cache, which has room for it."""
        return len(ids) == cache.length + 1 <= cache.max_length

    def _step(self, rows: Sequence[int], texts: Mapping[int, list[int]]) -> Tensor:
        assert self.native.decoder is not None, "can_step has seen to it"
        adapters = self.native.decoder.adapters_of_rows or [0] * len(self.texts)
        for row in rows:
            self.texts[row].cache.append_ids(torch.tensor([texts[row][-1:]]))
        new = [NewTokens(self.texts[row], adapter=adapters[row]) for row in rows]
        logits = torch.cat(self.native.decoder.step_texts(new))  # (N, V)
        for row, of_row in zip(rows, logits, strict=True):
            with one_of_rows(self.model, row):
                run = partial(last_logits, self.model, torch.tensor(texts[row]))
                check_finite(of_row, self.model, run)
        return logits
