"""A model on disk with an adapter on it, ready to be merged, and the ids to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanogpt_surgery.data.tokenizer import Tokenizer, required_tokenizer
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.formats.adapter_layout import load_adapter
from nanogpt_surgery.formats.model_file import open_model
from nanogpt_surgery.lora.hashing import UPDATES, combined, tensor_hashes
from nanogpt_surgery.model.simple_gpt import SimpleGPT

PROBE_ROWS, PROBE_TOKENS = 4, 64


@dataclass
class Merge:
    """A merge that is about to happen: the adapted model, and all that its report will say."""

    model: SimpleGPT
    tokenizer: Tokenizer | None
    precision: torch.dtype
    base: str
    title: str
    probe: Tensor
    probed_on: str

    def planned(self) -> dict[str, Any]:
        """The sizes to expect."""
        own = [p.numel() for n, p in self.model.named_parameters() if UPDATES not in n]
        name = str(self.precision).removeprefix("torch.")
        return {"dtype": name, "model_bytes": sum(own) * self.precision.itemsize}


def prepare(
    model: str | Path,
    adapter: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    probe: str | None = None,
    force: bool = False,
) -> Merge:
    """Open a model with an adapter on it, in float32; arguments as in `merge_adapter`."""
    network, tokenizer = open_model(model)
    stored = network.lm_head.weight.dtype
    network.float()
    base = combined(tensor_hashes(network).values())
    load_adapter(network, adapter, force=force)
    ids, probed_on = _probe(network, tokenizer, probe)
    precision = stored if dtype is None else getattr(torch, dtype)
    return Merge(network, tokenizer, precision, base, f"merge {adapter}", ids, probed_on)


def _probe(model: SimpleGPT, tokenizer: Tokenizer | None, text: str | None) -> tuple[Tensor, str]:
    """Ids (B, T) to measure on, and what they are in words."""
    length = min(PROBE_TOKENS, model.config.block_size)
    if text is None:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (PROBE_ROWS, length), generator=draw)
        return ids, f"{ids.numel()} random tokens"
    hint = "without --probe it is measured on random tokens"
    tokenizer = required_tokenizer(tokenizer, "the model", hint)
    encoded = list(tokenizer.encode(text[: 64 * PROBE_ROWS * PROBE_TOKENS]))
    rows = min(PROBE_ROWS, len(encoded) // length)
    if not rows:
        raise SurgeryError(f"the probe text has {len(encoded)} tokens, fewer than {length}",
                           "give a longer one, or none: then it is random tokens")  # fmt: skip
    ids = torch.tensor(encoded[: rows * length]).view(rows, length)
    return ids, f"{ids.numel()} tokens of the text given"
