"""Whether the keys and values of a generation fit into memory."""

from __future__ import annotations

import torch

from nanogpt_surgery.memory import check_memory
from nanogpt_surgery.model.config import GPTConfig


def check_cache_fits(
    config: GPTConfig, rows: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises `SurgeryError` where the keys and values of so many rows and tokens do not fit."""
    numbers = 2 * config.n_layer * rows * tokens * config.n_kv_head * config.head_dim
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    check_memory(
        f"a cache of {rows:,} rows of {tokens:,} tokens",
        {"keys and values": numbers * dtype.itemsize},
        "lower batch_size or max_new_tokens",
        free,
    )
