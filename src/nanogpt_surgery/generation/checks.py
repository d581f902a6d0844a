"""Checks of what a generation is asked for, before the first token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.generation.settings import SamplingSettings, check_count, check_seed
from nanogpt_surgery.memory import check_memory
from nanogpt_surgery.model.simple_gpt import SimpleGPT


def check_request(
    model: SimpleGPT,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    settings: SamplingSettings,
    seed: int | None,
) -> list[list[int]]:
    """Returns the ids of prompts that a model can go on from.

    Raises:
        SurgeryError: anything is not as `generate` says.
    """
    check_count(max_new_tokens)
    check_seed(seed)
    check_bias(model, settings)
    found = [check_prompt(model, prompt) for prompt in prompts]
    check_rows_fit(model, len(found), max(map(len, found)) + max_new_tokens)
    return found


def check_rows_fit(model: SimpleGPT, rows: int, tokens: int) -> None:
    """Raises `SurgeryError` if the keys and values of rows of so many tokens outgrow the memory."""
    config, weight = model.config, next(model.parameters())
    tokens = min(config.block_size, tokens)
    numbers = 2 * config.n_layer * rows * tokens * config.n_kv_head * config.head_dim
    on_gpu = weight.device.type == "cuda"
    check_memory(
        f"a cache of {rows:,} rows of {tokens:,} tokens",
        {"keys and values": numbers * weight.dtype.itemsize},
        "lower batch_size or max_new_tokens",
        torch.cuda.mem_get_info(weight.device)[0] if on_gpu else None,
    )


def check_prompt(model: SimpleGPT, ids: Sequence[int] | Tensor) -> list[int]:
    """Returns a prompt's ids.

    Raises:
        SurgeryError: they are no whole numbers, not one row, none, or not of the vocabulary.
    """
    try:
        prompt = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        prompt = None
    if prompt is None or (prompt.numel() and (prompt.is_floating_point() or prompt.is_complex())):
        kind = type(ids).__name__ if prompt is None else str(prompt.dtype)
        raise SurgeryError(
            f"the prompt is {quoted(ids)} ({kind}); it must be ids, which are whole numbers",
            "tokenizer.encode(text) makes ids of a text",
        )
    if prompt.dim() != 1 and prompt.shape[:-1] != (1,):
        raise SurgeryError(
            f"the prompt has the shape {tuple(prompt.shape)}; it must be one row of ids",
            "call generate for each prompt",
        )
    if prompt.numel() == 0:
        raise SurgeryError("the prompt is empty; generation starts from at least one token")
    least, most, vocab_size = int(prompt.min()), int(prompt.max()), model.config.vocab_size
    if not 0 <= least <= most < vocab_size:
        raise SurgeryError(
            f"the prompt has ids from {least} to {most}; the model's vocabulary is 0 to "
            f"{vocab_size - 1}"
        )
    return prompt.to(torch.long).flatten().tolist()


def check_bias(model: SimpleGPT, settings: SamplingSettings) -> None:
    """Raises `SurgeryError` if a bias is on an id outside the vocabulary."""
    vocab_size = model.config.vocab_size
    outside = [index for index in settings.logit_bias if not 0 <= index < vocab_size]
    if outside:
        raise SurgeryError(
            f"logit_bias names the id {outside[0]}; the model's vocabulary is 0 to {vocab_size - 1}"
        )
