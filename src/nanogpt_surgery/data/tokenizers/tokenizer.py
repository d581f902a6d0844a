"""The Tokenizer protocol, and large texts as ids without a Python list."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
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
    import torch

    return torch.from_numpy(encode_to_array(tokenizer, text))


def encode_to_array(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    """The ids of a text as an array (N,) of int32; torch is not loaded for it."""
    to_numpy = getattr(tokenizer, "encode_to_numpy", None)
    ids = np.asarray(to_numpy(text) if to_numpy else tokenizer.encode(text))
    return ids.astype(np.int32, copy=False)


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that begins a context, with what the tokenizer puts before it (BOS)."""
    encode: Callable[[str], list[int]] = getattr(tokenizer, "encode_prompt", tokenizer.encode)
    return encode(text)


def required_tokenizer(tokenizer: Tokenizer | None, whose: str, hint: str = "") -> Tokenizer:
    """The tokenizer of a model that text goes into.

    Raises:
        SurgeryError: there is none.
    """
    if tokenizer is None:
        raise SurgeryError(f"{whose} has no tokenizer, so text cannot become ids", hint)
    return tokenizer


def stop_ids(tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens after which a text or a turn is over, where the tokenizer has any."""
    return frozenset(getattr(tokenizer, "stop_ids", ()))


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """How many ids a model needs for a tokenizer: one more than the largest.

    Raises:
        SurgeryError: the tokenizer does not say.
    """
    size = getattr(tokenizer, "vocab_size", None)
    if not isinstance(size, int):
        raise SurgeryError(f"a {type(tokenizer).__name__} does not say its vocab_size")
    return size


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """The kind of a tokenizer and the sha256 of what its `tokenizer.json` says."""
    contents: dict[str, Any] = getattr(tokenizer, "to_json", dict)()
    written = json.dumps(contents, sort_keys=True).encode()
    return f"{type(tokenizer).__name__} {hashlib.sha256(written).hexdigest()}"
