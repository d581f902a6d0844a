"""Batches of conversations in which only some tokens are trained on.

Legend: B rows in a batch, T tokens in a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.conversations.chat import end_ids
from nanogpt_surgery.data.conversations.instructions import Example
from nanogpt_surgery.data.gpt_dataset import Batch
from nanogpt_surgery.data.shuffling import IntArray, rows_of_step, visited
from nanogpt_surgery.data.text.corpus import TRAIN_SHARE
from nanogpt_surgery.data.tokenizers.token_text import TextStream
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError, warn

UNTRAINED = -100  # what cross-entropy passes over


@dataclass(frozen=True)
class Counts:
    """Counts of what a dataset holds, and of what had to be left out."""

    examples: int
    rows: int
    tokens: int
    trained: int
    """targets that count in the loss"""
    ends: int
    """targets that end a turn: without any, the model never learns to stop"""
    truncated: int
    """examples longer than the window, whose end was cut off"""
    dropped: int
    """examples of which no trained token was left"""

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain values for a report, with the share that is trained on."""
        return {
            "examples": self.examples,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "trained_share": self.trained / self.tokens,
            "answers_that_end": self.ends,
            "truncated": self.truncated,
            "dropped": self.dropped,
        }


class InstructionDataset(Dataset[tuple[Tensor, Tensor]]):
    """Rows of (input, target), the target shifted by one and −100 where nothing is trained on.

    Args:
        examples: ids and which of them are trained on.
        block_size: tokens in a row, T.
        pack: put several examples in one row; batches then say which tokens belong together, so
            that the model keeps them apart.
        end_ids: tokens that end a turn, to be counted.

    Raises:
        SurgeryError: nothing is left to train on.
    """

    @check_arguments
    def __init__(
        self,
        examples: Sequence[Example],
        block_size: int,
        pack: bool = False,
        end_ids: Sequence[int] = (),
    ):
        self.block_size = block_size
        cut = [example.cut(block_size + 1) for example in examples]
        kept = [example for example in cut if any(example.trained[1:])]
        if not kept:
            raise SurgeryError(
                f"none of {len(examples)} examples has an answer within {block_size} tokens",
                "give a larger block_size",
            )
        self.first = kept[0]  # in the order given, whichever row holds it
        rows = _packed(kept, block_size) if pack else [[example] for example in kept]
        self.inputs = torch.zeros(len(rows), block_size, dtype=torch.int32)
        self.targets = torch.full((len(rows), block_size), UNTRAINED, dtype=torch.int32)
        self.documents = torch.zeros(len(rows), block_size, dtype=torch.int32)
        for row, members in enumerate(rows):
            self._fill(row, members)
        self.packs = int(self.documents.max()) > 1
        ends = torch.isin(self.targets, torch.tensor(sorted(end_ids), dtype=torch.int32))
        self.counts = Counts(
            examples=len(examples),
            rows=len(rows),
            tokens=sum(len(example.ids) for example in kept),
            trained=int((self.targets != UNTRAINED).sum()),
            ends=int(ends.sum()),
            truncated=sum(len(example.ids) > block_size + 1 for example in examples),
            dropped=len(examples) - len(kept),
        )

    @classmethod
    def for_tokenizer(
        cls, examples: Sequence[Example], tokenizer: Tokenizer, block_size: int, pack: bool = False
    ) -> InstructionDataset:
        """With the tokenizer's own ends of turns; warns if no target is one."""
        dataset = cls(examples, block_size, pack, sorted(end_ids(tokenizer)))
        if not dataset.counts.ends:
            warn(
                "no target ends a turn, so the model will not learn to stop: the template writes "
                "no token that ends one, or every answer is cut off"
            )
        return dataset

    def _fill(self, row: int, members: list[Example]) -> None:
        place = 0
        for number, example in enumerate(members, 1):
            end = place + len(example.ids) - 1
            ids = torch.tensor(example.ids, dtype=torch.int32)
            trained = torch.tensor(example.trained[1:])
            self.inputs[row, place:end] = ids[:-1]
            self.targets[row, place:end] = torch.where(trained, ids[1:], UNTRAINED)
            self.documents[row, place:end] = number
            place = end

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Row `index`: input and target, (T,) int64 each."""
        return self.inputs[index].long(), self.targets[index].long()

    def indices(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> IntArray:
        """Which rows make the batch of a step, (B,): a pure function of (seed, step, rank).

        Raises:
            SurgeryError: the batch cannot be shared evenly by the processes.
        """
        rows = rows_of_step(step, batch_size, rank, world_size)
        return visited(rows, len(self), seed)

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """The batch of a step; with documents where a row holds several."""
        return self._batch_of(
            torch.from_numpy(self.indices(step, batch_size, seed, rank=rank, world_size=world_size))
        )

    @property
    def tokens(self) -> int:
        """How many places for tokens the rows have."""
        return self.inputs.numel()

    def iter_all(self, batch_size: int, every: int = 1) -> Iterator[Batch]:
        """All rows once, in their order, or every so many of them one."""
        for rows in torch.arange(0, len(self), every).split(batch_size):
            yield self._batch_of(rows)

    def _batch_of(self, rows: Tensor) -> Batch:
        batch = self.inputs[rows].long(), self.targets[rows].long()  # (B, T) each
        return (*batch, self.documents[rows]) if self.packs else batch


def split_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, block_size: int, pack: bool = False
) -> tuple[InstructionDataset, InstructionDataset]:
    """The first nine tenths of the examples, to train on, and the last, to validate.

    What is held out is packed in any case: its loss is the same, and sooner there. Warns of
    examples to train on that the window is too short for.

    Raises:
        SurgeryError: there are too few to hold any out, or one part has no answer in reach.
    """
    cut = int(len(examples) * TRAIN_SHARE)
    if cut == 0:
        raise SurgeryError(
            f"{len(examples)} conversation is too few: the last tenth is held out for validation",
            "give at least 2",
        )
    train = InstructionDataset.for_tokenizer(examples[:cut], tokenizer, block_size, pack)
    ends = sorted(end_ids(tokenizer))
    held_out = InstructionDataset(examples[cut:], block_size, pack=True, end_ids=ends)
    if dropped := train.counts.dropped:
        warn(
            f"{dropped:,} of {cut:,} examples to train on are left out: no answer begins within "
            f"{block_size:,} tokens; a larger block_size takes them in"
        )
    return train, held_out


def _packed(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Rows of examples: each, the longest first, goes to the fullest row that has room for it."""
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (places left, row), the least first
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        need = len(example.ids) - 1
        place = bisect_left(room, (need, 0))
        if place == len(room):
            rows.append([])
            room.append((size, len(rows) - 1))
        left, row = room.pop(place)
        rows[row].append(example)
        insort(room, (left - need, row))
    return rows


def preview(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of an example in stretches, each with whether it is trained on.

    Each token is decoded after those before it, so the stretches joined are the text of all ids.
    """
    groups = groupby(preview_tokens(example, tokenizer), key=itemgetter(1))
    return [("".join(text for text, _ in tokens), trained) for trained, tokens in groups]


def preview_tokens(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of each token of an example, with whether it is trained on.

    Tokens that share a character have it with the last of them, and nothing before.
    """
    stream = TextStream(tokenizer)
    texts = [stream.push(index) for index in example.ids]
    if texts:
        texts[-1] += stream.finish()
    return list(zip(texts, example.trained, strict=True))
