"""The native folder: `config.json`, `model.safetensors`, `tokenizer.json`, as transformers'.

A model whose axes no family has is saved in the same files under our own `model_type`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.formats.folders.old_keys import with_current_fields
from nanogpt_surgery.formats.huggingface.config_options import (
    ABSENT,
    ACTIVATIONS,
    MODEL_TYPES,
    check_options,
    rope_options,
)
from nanogpt_surgery.model.config import FAMILIES, GPTConfig, RopeScaling
from nanogpt_surgery.values import field_types, wrong_value

OWN = "nanogpt_surgery"

_GPT2_FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
    "block_size": "n_positions",
    "n_inner": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "tie_head": "tie_word_embeddings",
    "dropout": "resid_pdrop",
}
_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "block_size": "max_position_embeddings",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_inner": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_head": "tie_word_embeddings",
    "dropout": "attention_dropout",
}
_FIELDS = {"gpt2": _GPT2_FIELDS, **dict.fromkeys(("llama", "qwen2", "qwen3"), _LLAMA_FIELDS)}
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def family_of(config: GPTConfig) -> str:
    """The family that has these axes and sizes, or "nanogpt_surgery"."""
    for family, axes in FAMILIES.items():
        if all(getattr(config, axis) in values for axis, values in axes.items()):
            return family if _has_sizes(family, config) else OWN
    return OWN


def _has_sizes(family: str, config: GPTConfig) -> bool:
    """Whether transformers' model of the family can have these sizes."""
    if family == "gpt2":
        one_width = config.n_head * config.head_dim == config.n_embd
        return one_width and config.n_kv_head == config.n_head
    return family != "llama" or config.n_embd % config.n_head == 0


def config_to_json(config: GPTConfig, tied: bool, dtype: str) -> dict[str, Any]:
    """The contents of `config.json`.

    Args:
        config: the model's.
        tied: whether the head's matrix is the embedding's, read from the tensors.
        dtype: of the weights, as torch names it ("float32").
    """
    config = dataclasses.replace(config, tie_head=tied)
    family = family_of(config)
    if family == OWN:
        return {
            "model_type": OWN,
            "architectures": ["SimpleGPT"],
            "dtype": dtype,
            **config.to_dict(),
        }
    return {
        "model_type": family,
        "architectures": [_ARCHITECTURES[family]],
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS[family].items()},
        **(_gpt2_extras(config) if family == "gpt2" else _llama_extras(config, family)),
    }


def _gpt2_extras(config: GPTConfig) -> dict[str, Any]:
    return {
        "n_ctx": config.block_size,
        "activation_function": ACTIVATIONS[config.mlp],
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _llama_extras(config: GPTConfig, family: str) -> dict[str, Any]:
    extras: dict[str, Any] = {"hidden_act": "silu", "rope_scaling": None}
    if config.rope_scaling:
        scaling = dataclasses.asdict(config.rope_scaling)
        if config.rope_scaling.rope_type == "linear":
            scaling = {key: scaling[key] for key in ("rope_type", "factor")}
        extras["rope_scaling"] = scaling
        extras["rope_parameters"] = {"rope_theta": config.rope_theta, **scaling}
    if family != "qwen2":
        extras["attention_bias"] = config.bias in ("all", "attention")
    if family == "llama":
        extras["mlp_bias"] = config.bias == "all"
    return extras


def config_from_json(contents: Any) -> GPTConfig:
    """The config that a `config.json` describes.

    Raises:
        SurgeryError: an architecture that we do not have, or an option that would change the
            result and that we do not have (all of them, by name).
    """
    if not isinstance(contents, dict):
        raise SurgeryError(
            f"config.json holds a {type(contents).__name__}, not an object with a model_type"
        )
    name = contents.get("model_type")
    if name == OWN:
        return _own_config(contents)
    if not isinstance(name, str) or name not in MODEL_TYPES:
        raise SurgeryError(
            f"the model_type {quoted(name)} is not one we have",
            f"those are {', '.join(MODEL_TYPES)}",
        )
    family = MODEL_TYPES[name]
    contents = {k: v for k, v in (ABSENT[name] | contents).items() if v is not None}
    check_options(contents, name)
    fields = _FIELDS[family]
    values = {ours: contents[theirs] for ours, theirs in fields.items() if theirs in contents}
    missing = [fields[ours] for ours in _NEEDED if ours not in values]
    if missing:
        raise SurgeryError(f"config.json lacks {', '.join(missing)}")
    _check_types(values, fields)
    extras = _gpt2_axes(contents) if family == "gpt2" else _llama_axes(contents, family)
    usual = {axis: choices[0] for axis, choices in FAMILIES[family].items()}
    return GPTConfig(**(usual | values | extras))


_NEEDED = ("vocab_size", "n_embd", "n_head", "n_layer", "block_size")
_ADDED = {"n_prev_tokens": 0}  # what a folder of an older version does not say


def _check_types(values: dict[str, Any], names: dict[str, str]) -> None:
    """Sizes are integers, other numbers are numbers, and choices are true or false."""
    kinds = field_types(GPTConfig)
    wrong = [
        problem
        for name, value in values.items()
        for problem in wrong_value(names.get(name, name), value, kinds[name])
    ]
    if wrong:
        raise SurgeryError(f"config.json gives values of the wrong kind: {'; '.join(wrong)}")


def _own_config(contents: dict[str, Any]) -> GPTConfig:
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    contents = with_current_fields(contents)
    values = _ADDED | {key: value for key, value in contents.items() if key in known}
    about = {"model_type", "architectures", "dtype", "bos_token_id", "eos_token_id", "auto_map"}
    problems = sorted(set(contents) - known - about)
    problems += [f"no {key}" for key in sorted(known - set(values))]
    if problems:
        raise SurgeryError(f"config.json holds what is not understood: {', '.join(problems)}")
    scaling = values["rope_scaling"]
    if scaling is not None:
        values["rope_scaling"] = _scaling(scaling if isinstance(scaling, dict) else {})
    return GPTConfig(**values)


def _scaling(options: dict[str, Any]) -> RopeScaling:
    if options.get("rope_type") == "linear":
        return RopeScaling(_positive(options, "factor"), rope_type="linear")
    fields = [field.name for field in dataclasses.fields(RopeScaling) if field.name != "rope_type"]
    wrong = [name for name in fields if type(options.get(name)) not in (int, float)]
    if wrong:
        raise SurgeryError(f"the rotary scaling in config.json lacks {', '.join(wrong)}")
    return RopeScaling(**{name: options[name] for name in fields})


def _positive(options: dict[str, Any], name: str) -> float:
    value: Any = options.get(name)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise SurgeryError(f"the rotary scaling in config.json has {quoted(value)} as {name}")
    return float(value)


def _gpt2_axes(contents: dict[str, Any]) -> dict[str, Any]:
    name = contents.get("activation_function", "gelu_new")
    return {"mlp": {theirs: ours for ours, theirs in ACTIVATIONS.items()}[name]}


def _llama_axes(contents: dict[str, Any], family: str) -> dict[str, Any]:
    rope = rope_options(contents)
    theta = rope.get("rope_theta", 10000.0)
    _check_types({"rope_theta": theta}, {})
    axes: dict[str, Any] = {"rope_theta": float(theta)}
    if rope["rope_type"] == "llama3" or (rope["rope_type"] == "linear" and rope.get("factor") != 1):
        axes["rope_scaling"] = _scaling(rope)
    if family != "qwen2":
        attention, mlp = contents.get("attention_bias"), contents.get("mlp_bias")
        both = mlp and family == "llama"
        axes["bias"] = ("all" if both else "attention") if attention else "none"
    return axes
