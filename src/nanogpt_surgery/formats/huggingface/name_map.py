"""Which tensor of ours is which of theirs, for each family, as a table; both directions follow.

A row pairs modules of ours with one of theirs. Several of ours are stacked along the output into
one fused matrix (GPT-2's `c_attn`), and GPT-2's Conv1D keeps its matrices transposed, (in, out).
`*` stands for the number of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

Anything = TypeVar("Anything")


@dataclass(frozen=True)
class Row:
    """Modules of ours, and the one of theirs that holds them.

    `conv1d`: its matrix is transposed. `interleaved`: so many heads keep their rotary pairs side by
    side, in rows 2 i and 2 i + 1, where ours lie half a head apart (0: as ours).
    """

    ours: tuple[str, ...]
    theirs: str
    conv1d: bool = False
    interleaved: int = 0

    def at(self, layer: int) -> Row:
        """The row of one layer."""
        ours = tuple(name.replace("*", str(layer)) for name in self.ours)
        return replace(self, ours=ours, theirs=self.theirs.replace("*", str(layer)))

    def transposes(self, kind: str) -> bool:
        """Whether their tensor of a kind, "weight" or "bias", is ours transposed."""
        return self.conv1d and kind == "weight"


def _llama_like() -> list[Row]:
    same = """
        layers.*.input_layernorm layers.*.post_attention_layernorm layers.*.self_attn.q_proj
        layers.*.self_attn.k_proj layers.*.self_attn.v_proj layers.*.self_attn.o_proj
        layers.*.self_attn.q_norm layers.*.self_attn.k_norm layers.*.mlp.gate_proj
        layers.*.mlp.up_proj layers.*.mlp.down_proj embed_tokens norm
    """.split()
    return [Row((name,), f"model.{name}") for name in same] + [Row(("lm_head",), "lm_head")]


_ATTENTION = "layers.*.self_attn."
_GPT2 = [
    Row(("embed_tokens",), "transformer.wte"),
    Row(("embed_positions",), "transformer.wpe"),
    Row(("layers.*.input_layernorm",), "transformer.h.*.ln_1"),
    Row(
        (f"{_ATTENTION}q_proj", f"{_ATTENTION}k_proj", f"{_ATTENTION}v_proj"),
        "transformer.h.*.attn.c_attn",
        conv1d=True,
    ),
    Row((f"{_ATTENTION}o_proj",), "transformer.h.*.attn.c_proj", conv1d=True),
    Row(("layers.*.post_attention_layernorm",), "transformer.h.*.ln_2"),
    Row(("layers.*.mlp.up_proj",), "transformer.h.*.mlp.c_fc", conv1d=True),
    Row(("layers.*.mlp.down_proj",), "transformer.h.*.mlp.c_proj", conv1d=True),
    Row(("norm",), "transformer.ln_f"),
    Row(("lm_head",), "lm_head"),
]

NAME_MAPS: dict[str, list[Row]] = {
    "gpt2": _GPT2,
    "llama": _llama_like(),
    "qwen2": _llama_like(),
    "qwen3": _llama_like(),
}


def identity(names: Iterable[str]) -> list[Row]:
    """A table for tensors that carry our own names."""
    return [Row((module,), module) for module in {name.rpartition(".")[0]: None for name in names}]


def each_layer(table: Iterable[Row], n_layer: int) -> Iterator[Row]:
    """A table's rows, those with a `*` once for each layer."""
    for row in table:
        yield from (row.at(i) for i in range(n_layer)) if "*" in row.theirs else [row]


def to_theirs(tensors: dict[str, Tensor], rows: Iterable[Row]) -> dict[str, Tensor]:
    """Our tensors under a family's names and in its orientation."""
    left = dict(tensors)
    converted: dict[str, Tensor] = {}
    for row in rows:
        for kind in ("weight", "bias"):
            parts = [left.pop(f"{name}.{kind}") for name in row.ours if f"{name}.{kind}" in left]
            if parts:
                assert len(parts) == len(row.ours), f"{row.theirs} has only some of its parts"
                joined = torch.cat(parts) if len(parts) > 1 else parts[0]
                converted[f"{row.theirs}.{kind}"] = _turned(joined, row, kind).contiguous()
    assert not left, f"no name in the family for {sorted(left)}"
    return converted


def to_ours(tensors: dict[str, Tensor], rows: Iterable[Row]) -> tuple[dict[str, Tensor], list[str]]:
    """The inverse of `to_theirs`, as views, and the names that the family does not have."""
    left = dict(tensors)
    converted: dict[str, Tensor] = {}
    for row in rows:
        for kind in ("weight", "bias"):
            joined = left.pop(f"{row.theirs}.{kind}", None)
            if joined is not None:
                parts = _turned(joined, row, kind).tensor_split(len(row.ours))
                converted |= {f"{n}.{kind}": part for n, part in zip(row.ours, parts, strict=True)}
    return converted, sorted(left)


def normal_names(tensors: Mapping[str, Anything], family: str) -> dict[str, Anything]:
    """Tensors named as the family's rows name them, without buffers that follow from the config.

    A file of the body alone leaves the prefix `transformer.` or `model.` out. Older GPT-2 files
    carry the causal masks, older Llama files the rotary frequencies.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
    prefix = "transformer." if family == "gpt2" else "model."
    if family not in NAME_MAPS or any(name.startswith(prefix) for name in kept):
        return kept
    return {name if name.startswith("lm_head.") else prefix + name: t for name, t in kept.items()}


_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def _turned(tensor: Tensor, row: Row, kind: str) -> Tensor:
    turns = row.transposes(kind) and tensor.dim() == 2
    return tensor.t() if turns else torch.atleast_1d(tensor)
