"""Adapters for other programs: llama.cpp's LoRA file and MLX's adapter folder.

Both know one scale for all layers where PEFT has one for each, so every layer's own is folded into
its B. What is written is read again and compared before it counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import write_file, write_folder
from nanogpt_surgery.files.writing import write_json
from nanogpt_surgery.formats.gguf.file import read_gguf
from nanogpt_surgery.formats.gguf.model import table
from nanogpt_surgery.formats.huggingface.config import existing_family_of
from nanogpt_surgery.formats.huggingface.name_map import each_layer
from nanogpt_surgery.formats.huggingface.safetensors_file import write_tensors
from nanogpt_surgery.formats.peft.layout import Factors, block_diagonal
from nanogpt_surgery.formats.placing import interleave
from nanogpt_surgery.lora.inject import bare_layer
from nanogpt_surgery.lora.stored_adapter import extract_adapter
from nanogpt_surgery.model.simple_gpt import SimpleGPT


@check_arguments
def save_lora_gguf(model: SimpleGPT, path: str | Path) -> None:
    """Writes the LoRA that a model carries as llama.cpp's adapter file, whole or not at all.

    A GGUF file that lies there is replaced.

    Raises:
        SurgeryError: there is no LoRA, llama.cpp has no such model, or an update that it cannot
            take. There is no new file then.
    """
    family = existing_family_of(model.config)
    factors = dict(_named(model, _folded(model), family))
    alpha = float(max(a.size(0) for a, _ in factors.values()))

    def write(new: Path) -> None:
        _write_gguf(new, family, factors, alpha)
        _check_gguf(new, factors, alpha)

    write_file(path, write)


def _write_gguf(path: Path, family: str, factors: dict[str, Factors], alpha: float) -> None:
    with closing(GGUFWriter(path, family)) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, (a, b) in factors.items():
            scaled = b * (a.size(0) / alpha)  # the reader multiplies by alpha / R
            writer.add_tensor(f"{name}.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", scaled.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _check_gguf(path: Path, factors: dict[str, Factors], alpha: float) -> None:
    file = read_gguf(path)
    found = {}
    for name in factors:
        a, b = (file.tensors[f"{name}.{end}"].read() for end in ("lora_a", "lora_b"))
        found[name] = (a, b * (alpha / a.size(0)))
    _check(factors, found)


@check_arguments
def save_mlx_adapter(model: SimpleGPT, folder: str | Path) -> None:
    """Writes the LoRA that a model carries as an adapter folder of mlx-lm, whole or not at all.

    MLX adapts the same projections in each of the last layers, with one rank: smaller updates are
    filled up with zeros, and so are layers between that have none. A folder of ours that lies there
    is replaced.

    Raises:
        SurgeryError: there is no LoRA, or it adapts what MLX does not: embeddings, the head, GPT-2.
    """
    family = existing_family_of(model.config)
    factors = _folded(model)
    others = [name for name in factors if not name.startswith("layers.")]
    if family == "gpt2" or others:
        what = "GPT-2" if family == "gpt2" else ", ".join(others)
        raise SurgeryError(f"an MLX adapter has no place for {what}", "merge_lora(model) instead")
    layers = range(min(int(name.split(".")[1]) for name in factors), model.config.n_layer)
    rank = max(a.size(0) for a, _ in factors.values())
    tensors = dict(_mlx_tensors(factors, layers, rank))
    config = {
        "fine_tune_type": "lora",
        "num_layers": len(layers),
        "lora_parameters": {
            "rank": rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({name.split(".", 2)[2] for name in factors}),
        },
    }

    def write(new: Path) -> None:
        write_json(new / "adapter_config.json", config)
        write_tensors(tensors, new / "adapters.safetensors")
        again = load_file(new / "adapters.safetensors")
        found = {
            name: (again[f"model.{name}.lora_a"].t(), again[f"model.{name}.lora_b"].t())
            for name in factors
        }
        _check(factors, found)

    write_folder(folder, write)


def _mlx_tensors(
    factors: dict[str, Factors], layers: range, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """A (in, R) and B (R, out) of every adapted projection, in every one of the layers."""
    shapes = {name.split(".", 2)[2]: (a.size(1), b.size(0)) for name, (a, b) in factors.items()}
    for layer in layers:
        for key, (n_in, n_out) in shapes.items():
            a, b = torch.zeros(n_in, rank), torch.zeros(rank, n_out)
            if (update := factors.get(f"layers.{layer}.{key}")) is not None:
                a[:, : update[0].size(0)], b[: update[0].size(0)] = update[0].t(), update[1].t()
            yield f"model.layers.{layer}.{key}.lora_a", a
            yield f"model.layers.{layer}.{key}.lora_b", b


def _folded(model: SimpleGPT) -> dict[str, Factors]:
    """A (R, in) and s · B (out, R), for each layer.

    Raises:
        SurgeryError: DoRA, a bias, an embedding or a module replaced whole: these formats have A
            and B alone.
    """
    adapter = extract_adapter(model)
    others = {
        "DoRA": [name for name, u in adapter.updates.items() if u.magnitude is not None],
        "what is added to a bias": [n for n, u in adapter.updates.items() if u.bias is not None],
        "an embedding's LoRA": [name for name, u in adapter.updates.items() if u.embedding],
        "a module replaced whole": list(adapter.whole),
    }
    for kind, names in others.items():
        if names:
            raise SurgeryError(
                f"{kind} has no place in this format: {', '.join(names[:4])}",
                "merge_lora(model) and hand on the whole model",
            )
    return {name: (u.A, u.B * u.scaling) for name, u in adapter.updates.items()}


def _named(
    model: SimpleGPT, factors: dict[str, Factors], family: str
) -> Iterator[tuple[str, Factors]]:
    """llama.cpp's names for the layers, with B's rows in its order."""
    tied = model.config.tie_head
    if tied and "lm_head" in factors:
        raise SurgeryError(
            "the head is tied to the embedding, and llama.cpp has no adapter for a tied head",
            "merge_lora(model) and save_gguf(model, path)",
        )
    for row in each_layer(table(family, model.config), model.config.n_layer):
        parts = [factors.get(name) for name in row.ours]
        if any(part is not None for part in parts):
            layers: list[Any] = [bare_layer(model, name) for name in row.ours]
            a, b = block_diagonal(parts, [layer.out_features for layer in layers])
            yield f"{row.theirs}.weight", (a, interleave(b, row.interleaved))


def _check(factors: dict[str, Factors], found: dict[str, Factors]) -> None:
    wrong = []
    for name, (a, b) in factors.items():
        delta, again = b @ a, found[name][1] @ found[name][0]
        if not torch.allclose(again, delta, rtol=1e-4, atol=1e-5 * float(delta.abs().max())):
            wrong.append(name)
    if wrong:
        raise SurgeryError(f"what was written does not read back: {', '.join(wrong[:8])}")
