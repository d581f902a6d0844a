"""A model handed on to llama.cpp: one GGUF file, read back and compared before it counts.

Matrices are written in the type asked for; vectors and learned positions stay float32, as
llama.cpp's own converter leaves them. Q8_0 packs rows of 32 numbers: a matrix whose rows are no
multiple of that is written as F16, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import write_file
from nanogpt_surgery.formats.comparison import (
    Written,
    compare,
    effect_on_logits,
    largest_move,
)
from nanogpt_surgery.formats.gguf.file import PLAIN
from nanogpt_surgery.formats.gguf.model import (
    FIELDS,
    ROPE_FACTORS,
    SCALING_FIELDS,
    SCALING_KEY,
    open_gguf,
    rope_factors,
    table,
)
from nanogpt_surgery.formats.gguf.tokenizer_writing import Lost, write_tokenizer
from nanogpt_surgery.formats.huggingface.config import existing_family_of
from nanogpt_surgery.formats.huggingface.name_map import each_layer
from nanogpt_surgery.formats.placing import deinterleave, interleave
from nanogpt_surgery.history.model_history import tensor_hash
from nanogpt_surgery.lora.merging import Rounding, in_turn
from nanogpt_surgery.lora.several import has_lora
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.finite import check_finite_weights
from nanogpt_surgery.model.quantized import check_not_quantized
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report

GGUFType = Literal["F32", "F16", "BF16", "Q8_0"]
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
# The file's name, ours, a tensor of its shape (itself if none of ours is in it), interleaved heads.
Named: TypeAlias = tuple[str, tuple[str, ...], Tensor, int]
_POSITIONS = "position_embd.weight"
_KEPT_FLOAT32 = (_POSITIONS, ROPE_FACTORS)


@check_arguments
def save_gguf(
    model: SimpleGPT, path: str | Path, tokenizer: Tokenizer | None = None, kind: GGUFType = "F16"
) -> Report:
    """Writes a model as a GGUF file, whole or not at all.

    Args:
        model: on a family's axes, each tensor in any dtype ("each" opens it as it is stored).
        path: made, or replaced if it is a GGUF file.
        tokenizer: written beside the weights; llama.cpp takes no text without it.
        kind: of the matrices.

    Returns:
        How far the written file is from the model, measured on the file; see `compare`.

    Raises:
        SurgeryError: llama.cpp has no such model or tokenizer, or what was written does not read
            back as it should. There is no new file then.
    """

    def write(new: Path) -> Report:
        check_finite_weights(model, "the model")
        make = model.state_dict().__getitem__
        written = write_gguf_file(model, new, tokenizer, kind, make)
        again, rows = read_again(new, tokenizer, *written)
        return Report(f"GGUF written: {path}", rows, effect_on_logits(model, again))

    return write_file(path, write)


def write_gguf_file(
    model: SimpleGPT,
    path: Path,
    tokenizer: Tokenizer | None,
    kind: GGUFType,
    make: Callable[[str], Tensor],
) -> tuple[dict[str, Written], set[Lost]]:
    """Writes a file that is being made; see `save_gguf`.

    Of the model's tensors only the shapes count: `make` gives each by its name, once. Returns what
    was written of each, and what of the tokenizer is not carried over.
    """
    if kind not in _FILE_TYPES:
        raise SurgeryError(f"{kind!r} is not one of {', '.join(_FILE_TYPES)}")
    family, lost = _family(model), set[Lost]()
    with closing(GGUFWriter(path, family)) as writer:
        _write_metadata(writer, model.config, family)
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(2)
        if tokenizer is not None:
            lost = write_tokenizer(writer, tokenizer, model.config.vocab_size)
        return _write_tensors(writer, list(_named(model, family)), kind, make), lost


def read_again(
    path: Path, tokenizer: Tokenizer | None, written: dict[str, Written], lost: set[Lost]
) -> tuple[SimpleGPT, list[dict[str, Any]]]:
    """The model that `write_gguf_file` wrote, and how far its tensors are off; see `compare`."""
    again, tokenizer_again = open_gguf(path, "each")
    return again, compare(written, again, tokenizer, tokenizer_again, lost)


def rounding_of(layer: str, weight: Tensor, kind: GGUFType) -> tuple[str, Rounding]:
    """The type that a file of a kind stores a layer's matrix in, and what it makes of numbers."""
    name = _POSITIONS if layer == "embed_positions" else f"{layer}.weight"
    chosen = _kind_of(name, weight, kind)
    return chosen.name, lambda matrix: _unpacked(_packed(matrix, chosen), chosen)


def _family(model: SimpleGPT) -> str:
    check_not_quantized(model, "this way of writing a GGUF file")
    if has_lora(model):
        raise SurgeryError(
            "the model carries a LoRA, which this file has no place for",
            "merge_lora(model) first, or save_lora_gguf(model, path) for the adapter alone",
        )
    config, unknown = model.config, []
    family = existing_family_of(config)
    if family == "gpt2" and config.mlp != "gelu_tanh":
        unknown.append("gpt2 with the exact GELU, mlp gelu (train with mlp='gelu_tanh')")
    if family == "qwen3" and config.bias != "none":
        unknown.append("qwen3 with biases")
    if family == "qwen2" and config.n_head * config.head_dim != config.n_embd:
        unknown.append(f"qwen2 whose heads are not as wide as the model ({config.n_embd})")
    if unknown:
        raise SurgeryError(f"llama.cpp has no {' and no '.join(unknown)}")
    return family


def _write_tensors(
    writer: GGUFWriter, tensors: list[Named], kind: GGUFType, make: Callable[[str], Tensor]
) -> dict[str, Written]:
    """Writes what stands before the tensors, and them; returns what was written of each of ours."""
    for name, _, tensor, _ in tensors:
        chosen = _kind_of(name, tensor, kind)
        block, size = GGML_QUANT_SIZES[chosen]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)  # in bytes
        dtype = np.dtype(np.uint8)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    def pack(named: Named) -> tuple[NDArray[Any], dict[str, Written]]:
        name, ours, tensor, heads = named
        chosen = _kind_of(name, tensor, kind)
        if not ours:
            return _packed(tensor, chosen), {}
        made = [make(one) for one in ours]
        packed = _packed(_joined(made, heads), chosen)
        rows = deinterleave(_unpacked(packed, chosen), heads).split([len(one) for one in made])
        return packed, {
            one: Written(chosen.name, tensor_hash(kept), largest_move(whole, kept))
            for one, whole, kept in zip(ours, made, rows, strict=True)
        }

    written: dict[str, Written] = {}
    for packed, parts in in_turn(pack, tensors):
        writer.write_tensor_data(packed)
        written |= parts
    return written


def _joined(parts: list[Tensor], heads: int) -> Tensor:
    """The parts of a tensor as one, in the file's order of rows."""
    return interleave(torch.cat(parts) if len(parts) > 1 else parts[0], heads)


def _named(model: SimpleGPT, family: str) -> Iterator[Named]:
    """Every tensor of the file."""
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    if model.lm_head.weight is model.embed_tokens.weight:
        del tensors["lm_head.weight"]
    for row in each_layer(table(family, model.config), model.config.n_layer):
        for end in ("weight", "bias"):
            ours = tuple(f"{name}.{end}" for name in row.ours)
            if ours[0] in tensors:
                shape = _joined([tensors[name] for name in ours], row.interleaved)
                yield f"{row.theirs}.{end}", ours, shape, row.interleaved
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.rope_type == "llama3":
        yield ROPE_FACTORS, (), rope_factors(model.config), 0


def _kind_of(name: str, tensor: Tensor, kind: GGUFType) -> GGMLQuantizationType:
    if tensor.dim() == 1 or name in _KEPT_FLOAT32:
        return GGMLQuantizationType.F32
    chosen = GGMLQuantizationType[kind]
    fits = tensor.shape[-1] % GGML_QUANT_SIZES[chosen][0] == 0
    return chosen if fits else GGMLQuantizationType.F16


def _packed(tensor: Tensor, kind: GGMLQuantizationType) -> NDArray[Any]:
    """The bytes of a tensor, as a file of a kind holds them; of plain kinds the numbers."""
    numbers = tensor.detach().float().cpu().contiguous()
    if kind in PLAIN:  # in a third of the time that gguf's own conversion takes
        packed: NDArray[Any] = numbers.to(PLAIN[kind]).view(torch.uint8).numpy()
        return packed
    return quantize(numbers.numpy(), kind)


def _unpacked(packed: NDArray[Any], kind: GGMLQuantizationType) -> Tensor:
    """The numbers, float32, that a reader finds in the bytes."""
    if kind in PLAIN:
        return torch.from_numpy(packed).view(PLAIN[kind]).float()
    return torch.from_numpy(dequantize(packed, kind))


def _write_metadata(writer: GGUFWriter, config: GPTConfig, family: str) -> None:
    """Writes a config under llama.cpp's names."""
    writer.add_type("model")
    writer.add_name("nanogpt-surgery")
    writer.add_uint32(f"{family}.vocab_size", config.vocab_size)
    for ours, key in FIELDS[family].items():
        value = getattr(config, ours)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{family}.{key}", value)
    if config.positions == "rotary":
        for key in ("rope.dimension_count", "attention.value_length"):
            writer.add_uint32(f"{family}.{key}", config.head_dim)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        writer.add_string(f"{family}.rope.scaling.type", "linear")
        writer.add_float32(f"{family}.rope.scaling.factor", config.rope_scaling.factor)
    elif config.rope_scaling is not None:
        for name in SCALING_FIELDS:
            writer.add_float32(SCALING_KEY + name, float(getattr(config.rope_scaling, name)))
