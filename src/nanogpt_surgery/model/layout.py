"""Rows that are not one text each from the first column on: several texts, or padding before one.

What a token is depends then on two things that its column does not say: its position in its text,
and which columns belong to that text.

Legend: B rows, T new columns, S columns so far and new.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Positions (B, T), and a mask (B, 1, T, S) that is true where a token may look."""

    positions: Tensor
    mask: Tensor

    @classmethod
    def of_documents(cls, documents: Tensor) -> Layout:
        """Texts one after the other: (B, T) numbers, the same for the tokens of one text.

        Each text begins at position 0, and no token sees another text.
        """
        columns = torch.arange(documents.size(1), device=documents.device)  # (T,)
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        first = torch.where(begins, columns, 0).cummax(1).values  # (B, T): where its text begins
        same = first[:, :, None] == first[:, None, :]  # (B, T, T)
        return cls(columns - first, (same & (columns[:, None] >= columns)).unsqueeze(1))

    @classmethod
    def after_padding(cls, padding: Tensor, start: int, new: int) -> Layout:
        """Texts that end together: (B,) columns of padding before each; `new` columns at `start`.

        A column of padding sees itself alone: a softmax over nothing has no value.
        """
        columns = torch.arange(start + new, device=padding.device)  # (S,)
        rows = columns[start:]  # (T,)
        causal = rows[:, None] >= columns  # (T, S)
        visible = causal & (columns >= padding[:, None, None])  # (B, T, S)
        mask = visible | (rows[:, None] == columns)
        return cls((rows - padding[:, None]).clamp_min(0), mask.unsqueeze(1))
