"""Keys and values of texts that have ended, for those that begin alike with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt_surgery.model.kv_cache import KVCache

MOST_TEXTS = 512  # each is compared with the beginning of every new text


@dataclass(eq=False)
class Beginning:
    """Tokens whose keys and values are there."""

    key: str
    """of the weights that have computed them"""
    cache: KVCache
    ids: Tensor
    """of the tokens, (S,), on the CPU"""

    @property
    def n_bytes(self) -> int:
        """Of the keys and values."""
        tensors = (t for layer in self.cache.layers for t in (layer.keys, layer.values))
        return sum(t.numel() * t.element_size() for t in tensors)


class PrefixCache:
    """The texts that were used last, as many as there is room for.

    Args:
        new_cache: makes an empty cache for so many tokens.
    """

    def __init__(self, new_cache: Callable[[int], KVCache]):
        self.new_cache = new_cache
        self.texts: list[Beginning] = []  # the one used last comes last
        self.n_bytes = 0

    def longest(self, key: str, ids: Tensor) -> tuple[Beginning | None, int]:
        """Returns the text that begins most like some ids, and how many of them it has."""
        best, most = None, 0
        for text in self.texts:
            if text.key == key and (n := n_alike(text.ids, ids)) > most:
                best, most = text, n
        if best is not None:
            self.texts.remove(best)
            self.texts.append(best)
        return best, most

    def add(self, key: str, cache: KVCache, length: int, room: int) -> None:
        """Keeps the first `length` tokens of a cache, if there is room for them.

        Args:
            key: of the weights.
            cache: of one text; it belongs to this from now on.
            length: how many tokens.
            room: bytes that all texts may have.
        """
        if length == 0:
            return
        cache.truncate(length)
        if length < cache.max_length:
            cache = copied(cache, length, self.new_cache(length))
        new = Beginning(key, cache, cache.ids[0, :length].cpu())
        kept = [t for t in self.texts if t.key != key or n_alike(t.ids, new.ids) < len(t.ids)]
        longer = any(t.key == key and n_alike(t.ids, new.ids) == length for t in kept)
        if not longer and new.n_bytes <= room:
            self.texts = [*kept, new]
            self.n_bytes = sum(text.n_bytes for text in self.texts)
            self.make_room(room)

    def make_room(self, room: int) -> None:
        """Drops the texts that were not used for the longest time, until the others fit."""
        while self.texts and (self.n_bytes > room or len(self.texts) > MOST_TEXTS):
            self.n_bytes -= self.texts.pop(0).n_bytes

    def clear(self) -> None:
        """Drops all."""
        self.texts, self.n_bytes = [], 0


def n_alike(one: Tensor, other: Tensor) -> int:
    """Returns how many ids (S,) and (T,) begin alike."""
    n = min(len(one), len(other))
    differing = torch.nonzero(one[:n] != other[:n])
    return int(differing[0]) if len(differing) else n


def copied(cache: KVCache, length: int, to: KVCache) -> KVCache:
    """Returns an empty cache, filled with the first tokens of another."""
    to.append_ids(cache.ids[:, :length])
    for new, old in zip(to.layers, cache.layers, strict=True):
        new.append(old.keys[:, :, :length], old.values[:, :, :length])
    return to
