"""A model on disk with an adapter on it, ready to be merged, and the ids to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, required_tokenizer
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.formats.model_file import open_model
from nanogpt_surgery.formats.peft.adapter_layout import load_adapter
from nanogpt_surgery.history.hashing import UPDATES, combined, plain_name, tensor_hashes
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.model.finite import check_finite_weights
from nanogpt_surgery.model.simple_gpt import SimpleGPT

PROBE_ROWS, PROBE_TOKENS = 4, 64


@dataclass
class Merge:
    """A merge that is about to happen: the adapted model, and all that its report will say.

    The model is float32; `dtypes` says what each of its tensors is to be written in, and `source`
    what was opened; `base` is the hash of its weights.
    """

    model: SimpleGPT
    tokenizer: Tokenizer | None
    dtypes: dict[str, torch.dtype]
    source: str
    base: str
    adapter: str
    probe: Tensor
    probed_on: str

    @property
    def title(self) -> str:
        """What happens, in words."""
        return f"merge {self.adapter}"

    def planned(self) -> dict[str, Any]:
        """The sizes to expect."""
        own = [(plain_name(n), p) for n, p in self.model.named_parameters() if UPDATES not in n]
        size = sum(p.numel() * self.dtypes[name].itemsize for name, p in own)
        names = sorted({dtype_name(self.dtypes[name]) for name, _ in own})
        return {"dtype": " and ".join(names), "model_bytes": size}

    def round(self) -> None:
        """Give each weight of the merged model the dtype that it is to be written in."""
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self.dtypes[name])


def dtype_name(dtype: torch.dtype) -> str:
    """As files write it: "float32"."""
    return str(dtype).removeprefix("torch.")


def prepare(
    model: str | Path,
    adapter: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    probe: str | None = None,
    force: bool = False,
    tied: Tied | None = None,
) -> Merge:
    """Open a model with an adapter on it, in float32; arguments as in `merge_adapter`."""
    network, tokenizer = open_model(model, "each")
    stored = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    if dtype is None:
        _check_wider(stored, str(model))
    dtypes = stored if dtype is None else dict.fromkeys(stored, getattr(torch, dtype))
    check_finite_weights(network, str(model))
    network.float()
    base = combined(tensor_hashes(network).values())
    load_adapter(network, adapter, tied=tied, force=force)
    ids, probed_on = _probe(network, tokenizer, probe)
    return Merge(network, tokenizer, dtypes, str(model), base, str(adapter), ids, probed_on)


def _check_wider(stored: dict[str, torch.dtype], where: str) -> None:
    """Raise `SurgeryError` for tensors that float32 would round, merged or not."""
    wide = [name for name, dtype in stored.items() if dtype == torch.float64]
    if wide:
        raise SurgeryError(
            f"{where} holds {len(wide)} tensors in float64 ({', '.join(wide[:4])}), and a merge "
            "computes in float32",
            "--dtype float32 writes them so",
        )


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
