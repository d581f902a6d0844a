"""A GGUF file as a model: its metadata as a `GPTConfig`, its tensors as ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType, Keys
from torch import Tensor

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError, foreign_file, quoted, warn
from nanogpt_surgery.formats.gguf.file import PLAIN, GGUFFile, read_gguf
from nanogpt_surgery.formats.gguf.tokenizer import tokenizer_of
from nanogpt_surgery.formats.huggingface.name_map import Row, each_layer
from nanogpt_surgery.formats.huggingface.tokenizer_files import check_ids
from nanogpt_surgery.formats.placing import Dtype, StoredTensor, build_model, place
from nanogpt_surgery.model.config import FAMILIES, GPTConfig
from nanogpt_surgery.model.embeddings import rotary_frequencies
from nanogpt_surgery.model.quantized import Quantization
from nanogpt_surgery.model.rope_scaling import RopeScaling, scale_rope_frequencies
from nanogpt_surgery.model.simple_gpt import SimpleGPT

ROPE_FACTORS = "rope_freqs.weight"

# Fields of GPTConfig and the metadata that hold them, after "<architecture>.".
COMMON_FIELDS = {
    "block_size": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
}
FIELDS = {
    "gpt2": COMMON_FIELDS | {"norm_eps": "attention.layer_norm_epsilon"},
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3"),
        COMMON_FIELDS
        | {
            "n_kv_head": "attention.head_count_kv",
            "norm_eps": "attention.layer_norm_rms_epsilon",
            "rope_theta": "rope.freq_base",
            "head_dim": "attention.key_length",
        },
    ),
}

_ATTENTION, _MLP = "layers.*.self_attn.", "layers.*.mlp."
_OUTSIDE = [Row(("embed_tokens",), "token_embd"), Row(("norm",), "output_norm")]
_BLOCK = [
    Row(("layers.*.input_layernorm",), "blk.*.attn_norm"),
    Row(("layers.*.post_attention_layernorm",), "blk.*.ffn_norm"),
    Row((f"{_ATTENTION}o_proj",), "blk.*.attn_output"),
    Row((f"{_MLP}up_proj",), "blk.*.ffn_up"),
    Row((f"{_MLP}down_proj",), "blk.*.ffn_down"),
]
_HEAD = [Row(("lm_head",), "output")]


def table(architecture: str, config: GPTConfig) -> list[Row]:
    """The rows of an architecture, for `placing.place` and for writing.

    llama.cpp rotates neighbouring numbers in a llama's heads, so q and k lie there with their pairs
    side by side; in a qwen's they lie as ours.
    """
    if architecture == "gpt2":
        fused = tuple(f"{_ATTENTION}{part}_proj" for part in "qkv")
        own = [Row(("embed_positions",), "position_embd"), Row(fused, "blk.*.attn_qkv")]
        return [*_OUTSIDE, *own, *_BLOCK, *_HEAD]
    heads, kv_heads = (config.n_head, config.n_kv_head) if architecture == "llama" else (0, 0)
    own = [
        Row((f"{_ATTENTION}q_proj",), "blk.*.attn_q", interleaved=heads),
        Row((f"{_ATTENTION}k_proj",), "blk.*.attn_k", interleaved=kv_heads),
        Row((f"{_ATTENTION}v_proj",), "blk.*.attn_v"),
        Row((f"{_ATTENTION}q_norm",), "blk.*.attn_q_norm"),
        Row((f"{_ATTENTION}k_norm",), "blk.*.attn_k_norm"),
        Row((f"{_MLP}gate_proj",), "blk.*.ffn_gate"),
    ]
    return [*_OUTSIDE, *own, *_BLOCK, *_HEAD]


# Keys that change nothing in these architectures, and those that do so at other values than these.
_IGNORED = frozenset(
    """
    vocab_size tensor_data_layout use_parallel_residual features_length decoder_start_token_id
    expert_used_count rope.scaling.finetuned rope.scaling.original_context_length
    rope.scaling.type rope.scaling.factor rope.scale_linear attention.value_length
    rope.dimension_count attention.sliding_window attention.layer_norm_epsilon
    attention.layer_norm_rms_epsilon rope.freq_base attention.head_count_kv attention.key_length
    """.split()
)
_INERT: dict[str, tuple[Any, ...]] = {
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attention.causal": (True,),
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "expert_weights_scale": (0, 1),
}
# What llama.cpp's list of keys has besides is refused unless it is zero, false or empty.
_LISTED = frozenset(
    key.removeprefix("{arch}.")
    for group in vars(Keys).values()
    if isinstance(group, type)
    for key in vars(group).values()
    if isinstance(key, str) and key.startswith("{arch}.")
)
SCALING_KEY = "nanogpt_surgery.rope_scaling."
SCALING_FIELDS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
)  # fmt: skip


def open_gguf(
    path: str | Path, dtype: Dtype, quantize: Quantization | None = None
) -> tuple[SimpleGPT, Tokenizer | None]:
    """The model and the tokenizer of a GGUF file; see `open_model`."""
    file = read_gguf(path)
    family, config = config_of(file)
    stored = {name: tensor for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
    model = build_model(config, stored, table(family, config), dtype, str(path), quantize)
    try:
        tokenizer = tokenizer_of(file.metadata)
    except SurgeryError as error:
        warn(f"{path} opens without its tokenizer: {error.what}")
        return model, None
    check_ids(tokenizer, config.vocab_size, path)
    return model, tokenizer


def types_in(path: str | Path) -> dict[str, str]:
    """Returns the type that each tensor is stored in, such as "F16" or "Q4_1", by our names."""
    file = read_gguf(path)
    family, config = config_of(file)
    placements = place(file.tensors, each_layer(table(family, config), config.n_layer))
    plain: dict[Any, GGMLQuantizationType] = {dtype: kind for kind, dtype in PLAIN.items()}
    return {
        name: (placement.stored.quantised or plain[placement.stored.dtype]).name
        for placement in placements
        for name in placement.names
    }


def family_of_file(file: GGUFFile) -> str:
    """The family that a file's architecture names.

    Raises:
        SurgeryError: it is not one we have, or the file is no model.
    """
    family = file.metadata.get("general.architecture")
    kind = file.metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise SurgeryError(f"{file.path} holds {quoted(kind)}, not a model")
    if not isinstance(family, str) or family not in FAMILIES:
        raise SurgeryError(
            f"{file.path} is of the architecture {quoted(family)}, which is not one we have",
            f"those are {', '.join(FAMILIES)}",
        )
    return family


def config_of(file: GGUFFile) -> tuple[str, GPTConfig]:
    """The family and the config that a file's metadata and its tensors' names describe.

    Raises:
        SurgeryError: the file is no model or of no family that we have, something is missing or of
            the wrong type, or an option would change the result and is not one we have (all of
            them, by name).
    """
    family = family_of_file(file)
    with foreign_file(file.path, "its metadata"):
        metadata, tensors = file.metadata, file.tensors
        _check_options(file, family)
        values: dict[str, Any] = {}
        for ours, key in FIELDS[family].items():
            value = _scalar(metadata.get(f"{family}.{key}"))
            if value is not None:
                kind = float if ours in ("norm_eps", "rope_theta") else int
                if type(value) not in (int, kind) or not 0 < value < 1 << 48:
                    raise SurgeryError(f"{file.path}: {family}.{key} is {quoted(value)}")
                values[ours] = kind(value)
        needed = [FIELDS[family][name] for name in ("n_embd", "n_layer", "n_head", "block_size")]
        missing = [f"{family}.{key}" for key in needed if f"{family}.{key}" not in metadata]
        if "token_embd.weight" not in tensors:
            missing.append("token_embd.weight")
        if missing:
            raise SurgeryError(f"{file.path} lacks {', '.join(missing)}")
        usual = {axis: choices[0] for axis, choices in FAMILIES[family].items()}
        axes = {
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "tie_head": "output.weight" not in tensors,
            "bias": _bias(tensors, family),
        }
        return family, _with_scaling(GPTConfig(**(usual | values | axes)), file, family)


def _scalar(value: Any) -> Any:
    """The one number of an array that has the same for every layer; others as they are."""
    if isinstance(value, np.ndarray) and value.size and bool((value == value[0]).all()):
        return value[0].item()
    return value


def _bias(tensors: Mapping[str, StoredTensor], family: str) -> str:
    if family in ("gpt2", "qwen2"):
        return str(FAMILIES[family]["bias"][0])
    if "blk.0.ffn_up.bias" in tensors:
        return "all"
    return "attention" if "blk.0.attn_q.bias" in tensors else "none"


def _check_options(file: GGUFFile, family: str) -> None:
    metadata = {
        key.removeprefix(f"{family}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{family}.")
    }
    handled = _IGNORED | set(FIELDS[family].values())
    found = [
        f"{family}.{key} {quoted(value)}"
        for key, value in metadata.items()
        if (key in _LISTED and key not in handled and not _is_inert(key, value))
        or (key in _SCALINGS and not (type(value) in (int, float) and 0 <= value < 1e30))
    ]
    kind = metadata.get("rope.scaling.type", "")
    inert = metadata.get("rope.scaling.factor") == 1  # yarn slows nothing then
    known = ("", "none", "linear", *(["yarn"] if inert else []))
    if not isinstance(kind, str) or kind not in known:
        found.append(f"{family}.rope.scaling.type {quoted(kind)}")
    width, heads = metadata.get("embedding_length"), _scalar(metadata.get("attention.head_count"))
    if type(width) is int and type(heads) is int and heads > 0:
        head = metadata.get("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            value = _scalar(metadata.get(key, head))
            if type(value) is not int or value != head:
                found.append(f"{family}.{key} {quoted(value)} beside heads of {quoted(head)}")
    window, context = metadata.get("attention.sliding_window", 0), metadata.get("context_length", 0)
    numbers = type(window) is type(context) is int
    if not (numbers and (window == 0 or window >= context)):
        found.append(
            f"{family}.attention.sliding_window {quoted(window)} beside a context of "
            f"{quoted(context)}"
        )
    if found:
        raise SurgeryError(f"{file.path} sets options that we do not have: {', '.join(found)}")


_SCALINGS = ("rope.scaling.factor", "rope.scale_linear")


def _is_inert(key: str, value: Any) -> bool:
    """Whether a key of llama.cpp's list changes nothing at a value."""
    if isinstance(value, (np.ndarray, list)):
        return not len(value) or (isinstance(value, np.ndarray) and not value.any())
    return value in _INERT.get(key, (0, ""))


def _linear_factor(metadata: dict[str, Any], family: str) -> float:
    """By how much all positions are slowed: llama.cpp scales linearly where it is told no kind."""
    if metadata.get(f"{family}.rope.scaling.type") == "none":
        return 1.0
    factors = [metadata.get(f"{family}.{key}", 0) for key in _SCALINGS]
    return float(next((factor for factor in factors if factor), 1.0))


def _with_scaling(config: GPTConfig, file: GGUFFile, family: str) -> GPTConfig:
    """The config with a linear factor, or with the scaling whose factors lie in the file.

    The file has a factor for each rotary pair and not what they were computed from; Llama 3's
    values are tried, and those that our own files name.
    """
    stored, linear = file.tensors.get(ROPE_FACTORS), _linear_factor(file.metadata, family)
    if linear != 1.0 and config.positions == "rotary":
        if stored is not None:
            raise SurgeryError(
                f"{file.path} sets options that we do not have: {family}.rope.scaling.factor "
                f"{linear:g} beside {ROPE_FACTORS}"
            )
        return replace(config, rope_scaling=RopeScaling(linear, rope_type="linear"))
    if stored is None:
        return config
    if stored.shape != (config.head_dim // 2,):
        raise SurgeryError(f"{file.path}: {ROPE_FACTORS} has the shape {stored.shape}")
    factors = stored.read().float()
    for scaling in _scalings(file.metadata, float(factors.max())):
        scaled = replace(config, rope_scaling=scaling)
        if torch.allclose(rope_factors(scaled), factors, rtol=1e-3):
            return scaled
    raise SurgeryError(f"{file.path}: {ROPE_FACTORS} is not of Llama 3's rotary scaling")


def _scalings(metadata: dict[str, Any], factor: float) -> list[RopeScaling]:
    found = [RopeScaling(factor, 1.0, 4.0, 8192)] if factor >= 1 else []
    own = [metadata.get(SCALING_KEY + name) for name in SCALING_FIELDS]
    if all(isinstance(value, (int, float)) for value in own):
        found.append(RopeScaling(own[0], own[1], own[2], int(own[3])))  # type: ignore[arg-type]
    return found


def rope_factors(config: GPTConfig) -> Tensor:
    """By how much each rotary pair is slowed, (D/2) float32: what llama.cpp divides by."""
    assert config.rope_scaling is not None
    plain = rotary_frequencies(replace(config, rope_scaling=None))
    return plain / scale_rope_frequencies(plain, config.rope_scaling)
