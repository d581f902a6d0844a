"""Whether the keys and values of a generation fit into memory."""

from __future__ import annotations

import torch

from nanogpt_surgery.memory import check_memory
from nanogpt_surgery.model.simple_gpt import SimpleGPT


def check_rows_fit(model: SimpleGPT, rows: int, tokens: int) -> None:
    """Raises `SurgeryError` where so many rows of so many tokens cannot be continued at once."""
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
