"""The native folder: `config.json`, `model.safetensors`, `tokenizer.json`, as transformers'.

A model whose axes no family has is saved in the same files under our own `model_type`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.config import FAMILIES, GPTConfig, RopeScaling

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
_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
# Theirs, where a config.json leaves the field out.
_ABSENT: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
    "llama": {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "attention_dropout": 0.0},
    "qwen2": {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "attention_dropout": 0.0},
    "qwen3": {
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "head_dim": 128,
    },
}


def family_of(config: GPTConfig) -> str:
    """The family that has these axes and sizes, or "nanogpt_surgery"."""
    for family, axes in FAMILIES.items():
        if all(getattr(config, axis) in values for axis, values in axes.items()):
            return OWN if family == "gpt2" and not _gpt2_can(config) else family
    return OWN


def _gpt2_can(config: GPTConfig) -> bool:
    return config.n_kv_head == config.n_head and config.n_head * config.head_dim == config.n_embd


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
        "activation_function": _ACTIVATIONS[config.mlp],
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _llama_extras(config: GPTConfig, family: str) -> dict[str, Any]:
    extras: dict[str, Any] = {"hidden_act": "silu", "rope_scaling": None}
    if config.rope_scaling:
        scaling = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
        extras["rope_scaling"] = scaling
        extras["rope_parameters"] = {"rope_theta": config.rope_theta, **scaling}
    if family != "qwen2":
        extras["attention_bias"] = config.bias in ("all", "attention")
    if family == "llama":
        extras["mlp_bias"] = config.bias == "all"
    return extras


def config_from_json(contents: dict[str, Any]) -> GPTConfig:
    """The config that a `config.json` describes.

    Raises:
        SurgeryError: an architecture that we do not have, or an option that would change the
            result and that we do not have (all of them, by name).
    """
    family = contents.get("model_type")
    if family == OWN:
        return _own_config(contents)
    if family not in FAMILIES:
        raise SurgeryError(
            f"the model_type {family!r} is not one we have", f"families: {', '.join(FAMILIES)}"
        )
    contents = _ABSENT[family] | {k: v for k, v in contents.items() if v is not None}
    _refuse_options(contents, family)
    values = {
        ours: contents[theirs] for ours, theirs in _FIELDS[family].items() if theirs in contents
    }
    extras = _gpt2_axes(contents) if family == "gpt2" else _llama_axes(contents, family)
    usual = {axis: choices[0] for axis, choices in FAMILIES[family].items()}
    try:
        return GPTConfig(**(usual | values | extras))
    except TypeError:
        missing = [theirs for ours, theirs in _FIELDS[family].items() if ours not in values]
        raise SurgeryError(f"config.json lacks {', '.join(missing)}") from None


def _own_config(contents: dict[str, Any]) -> GPTConfig:
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    values = {key: value for key, value in contents.items() if key in known}
    unknown = set(contents) - known - {"model_type", "architectures", "dtype"}
    if unknown:
        raise SurgeryError(
            f"config.json holds what is not understood: {', '.join(sorted(unknown))}"
        )
    if values.get("rope_scaling"):
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    return GPTConfig(**values)


def _gpt2_axes(contents: dict[str, Any]) -> dict[str, Any]:
    name = contents.get("activation_function", "gelu_new")
    return {"mlp": {theirs: ours for ours, theirs in _ACTIVATIONS.items()}[name]}


def _llama_axes(contents: dict[str, Any], family: str) -> dict[str, Any]:
    rope = _rope(contents)
    axes: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", 10000.0))}
    if rope.get("rope_type", "default") == "llama3":
        fields = [field.name for field in dataclasses.fields(RopeScaling)]
        axes["rope_scaling"] = RopeScaling(**{name: rope[name] for name in fields})
    if family != "qwen2":
        attention, mlp = contents.get("attention_bias"), contents.get("mlp_bias")
        axes["bias"] = ("all" if mlp else "attention") if attention else "none"
    return axes


def _rope(contents: dict[str, Any]) -> dict[str, Any]:
    """The rotary options, whether they lie where older or newer configs put them."""
    options = dict(contents.get("rope_scaling") or contents.get("rope_parameters") or {})
    options.setdefault("rope_type", options.pop("type", "default"))
    theta = (contents.get("rope_parameters") or {}).get("rope_theta", contents.get("rope_theta"))
    return options | ({"rope_theta": theta} if theta is not None else {})


def _refuse_options(contents: dict[str, Any], family: str) -> None:
    """Collect every option that would change the result and that we do not have."""
    found = []
    if family == "gpt2":
        expected: dict[str, tuple[Any, ...]] = {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False, True),
            "add_cross_attention": (False,),
            "activation_function": tuple(_ACTIVATIONS.values()),
        }
    else:
        expected = {"hidden_act": ("silu",), "use_sliding_window": (False,), "pretraining_tp": (1,)}
        kind = _rope(contents)["rope_type"]
        if kind not in ("default", "llama3"):
            found.append(f"rope_type {kind!r}")
        if contents.get("mlp_bias") and not contents.get("attention_bias"):
            found.append("mlp_bias without attention_bias")
    found += [
        f"{key} {contents[key]!r}"
        for key, values in expected.items()
        if key in contents and contents[key] not in values
    ]
    if found:
        raise SurgeryError(f"this {family} sets options that we do not have: {', '.join(found)}")
