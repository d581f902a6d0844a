"""What every tokenizer can do, and how a large text becomes ids without a Python list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Anything that turns text into ids and back: ours, tiktoken's `Encoding`, your own.

    A tokenizer that also has `encode_to_numpy(text)` (tiktoken's name for it) encodes large texts
    straight into an array.
    """

    def encode(self, text: str, /) -> list[int]:
        """The ids of a text."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of ids."""
        ...


def encode_text(tokenizer: Tokenizer, text: str) -> Tensor:
    """The ids of a text as a tensor (N,) of int32."""
    to_numpy = getattr(tokenizer, "encode_to_numpy", None)
    ids = np.asarray(to_numpy(text) if to_numpy else tokenizer.encode(text))
    return torch.from_numpy(ids.astype(np.int32, copy=False))


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that begins a context, with what the tokenizer puts before it (BOS)."""
    encode: Callable[[str], list[int]] = getattr(tokenizer, "encode_prompt", tokenizer.encode)
    return encode(text)


def stop_ids(tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens after which a text or a turn is over, where the tokenizer has any."""
    return frozenset(getattr(tokenizer, "stop_ids", ()))
