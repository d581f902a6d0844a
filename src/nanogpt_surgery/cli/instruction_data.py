"""Conversations as examples with answers to train on, for `finetune` and `data preview`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
    from nanogpt_surgery.data.conversations.instructions import Example
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.report import Report

LONGEST_WINDOW = 256
DataKind = Literal["auto", "text", "instructions"]
TemplateName = Literal["model", "chatml", "plain"]


@dataclass(frozen=True)
class InstructionSettings:
    """Which files are instruction data, and what of them is trained on."""

    data: DataKind = "auto"
    """what the files hold; auto: instructions where all are JSON, JSONL, CSV or TSV"""
    template: TemplateName = "model"
    """how conversations are written: as the model's own template does, or as one of ours"""
    answers_only: bool = True
    """train on answers and what ends them, or on every token"""
    pack: bool = False
    """put several conversations in a row; they do not see each other"""


def window(asked: int | None, context: int | None) -> int:
    """Tokens in a window: what is asked for, else the model's context, at most 256.

    Raises:
        SurgeryError: less than one is asked for, or more than the context.
    """
    if asked is None:
        return LONGEST_WINDOW if context is None else min(context, LONGEST_WINDOW)
    if asked < 1:
        raise SurgeryError(f"block_size is {asked}; it must be at least 1")
    if context is not None and asked > context:
        raise SurgeryError(
            f"a block_size of {asked} tokens exceeds the model's of {context}",
            f"--block-size {context}, or less",
        )
    return asked


def is_instructions(paths: Sequence[str], settings: InstructionSettings) -> bool:
    """Whether the named files are instruction data, as the settings say or their content does."""
    from nanogpt_surgery.data.conversations.instructions import is_instruction_data

    return settings.data == "instructions" or (
        settings.data == "auto" and is_instruction_data(paths)
    )


def read_examples(
    paths: Sequence[str], tokenizer: Tokenizer, settings: InstructionSettings
) -> list[Example]:
    """The conversations of all files, as ids."""
    from nanogpt_surgery.data.conversations.chat import template_of
    from nanogpt_surgery.data.conversations.instructions import (
        check_conversations,
        encode_conversations,
        read_conversations,
    )

    if not paths:
        raise SurgeryError(
            "no file of instruction data is named", "name a JSON, JSONL, CSV or TSV file"
        )
    template = template_of(tokenizer)
    if settings.template != "model":
        template = replace(template, source=settings.template)
    conversations = [found for path in paths for found in read_conversations(path)]
    check_conversations(conversations, tokenizer)
    return encode_conversations(
        conversations,
        tokenizer,
        template,
        answers_only=settings.answers_only,
    )


def instruction_datasets(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    block_size: int,
    settings: InstructionSettings,
) -> tuple[InstructionDataset, InstructionDataset]:
    """The first nine tenths of the conversations, to train on, and the last, to validate.

    What is held out is packed in any case: its loss is the same, and sooner there.

    Raises:
        SurgeryError: there are too few to hold any out, or one part has no answer in reach.
    """
    from nanogpt_surgery.data.conversations.chat import end_ids
    from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
    from nanogpt_surgery.data.text.corpus import TRAIN_SHARE

    cut = int(len(examples) * TRAIN_SHARE)
    if cut == 0:
        raise SurgeryError(
            f"{len(examples)} conversation is too few: the last tenth is held out for validation",
            "give at least 2",
        )
    ends = sorted(end_ids(tokenizer))
    try:
        return (
            InstructionDataset.for_tokenizer(examples[:cut], tokenizer, block_size, settings.pack),
            InstructionDataset(examples[cut:], block_size, pack=True, end_ids=ends),
        )
    except SurgeryError as error:
        raise SurgeryError(error.what, "give a larger --block-size") from None


def say_left_out(dataset: InstructionDataset) -> None:
    """How many examples the window is too short for, and what helps."""
    counts = dataset.counts
    if counts.dropped:
        say(
            f"note: {counts.dropped:,} of {counts.examples:,} examples to train on are left out: "
            f"no answer begins within {dataset.block_size:,} tokens; a larger --block-size takes "
            "them in"
        )


def counts_of(**datasets: InstructionDataset) -> Report:
    """Counts what instruction datasets hold, a row for each."""
    from nanogpt_surgery.report import Report

    rows = [
        {
            "part": name.replace("_", " "),
            **counts_in(dataset),
            "rows": len(dataset) if dataset.packs else None,  # of several examples
        }
        for name, dataset in datasets.items()
    ]
    return Report("instruction data", rows, {})


def counts_in(dataset: InstructionDataset) -> dict[str, Any]:
    """Counts what an instruction dataset holds, what is not trained on, and what was left out."""
    counts = dataset.counts
    return {
        "examples": counts.examples,
        "tokens": counts.tokens,
        "trained_tokens": counts.trained,
        "trained_share": counts.trained / counts.tokens,
        "answers_that_end": counts.ends,
        "truncated": counts.truncated,
        "dropped": counts.dropped,
    }
