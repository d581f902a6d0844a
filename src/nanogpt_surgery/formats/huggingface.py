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
# What no default stands in for.
_NEEDED = ("vocab_size", "n_embd", "n_head", "n_layer", "block_size")
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
    family = contents.get("model_type") if isinstance(contents, dict) else None
    if family == OWN:
        return _own_config(contents)
    if family not in tuple(FAMILIES):
        raise SurgeryError(
            f"the model_type {family!r} is not one we have", f"families: {', '.join(FAMILIES)}"
        )
    contents = _ABSENT[family] | {k: v for k, v in contents.items() if v is not None}
    fields = _FIELDS[family]
    _raise_if(
        "config.json lacks", [fields[ours] for ours in _NEEDED if fields[ours] not in contents]
    )
    _raise_if(
        f"this {family} sets options that we do not have:", _unknown_options(contents, family)
    )
    usual = {axis: choices[0] for axis, choices in FAMILIES[family].items()}
    values = {ours: contents[theirs] for ours, theirs in fields.items() if theirs in contents}
    extras = _gpt2_axes(contents) if family == "gpt2" else _llama_axes(contents, family)
    return GPTConfig(**(usual | values | extras))


def _own_config(contents: dict[str, Any]) -> GPTConfig:
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    values = {key: value for key, value in contents.items() if key in known}
    problems = sorted(set(contents) - known - {"model_type", "architectures", "dtype"})
    problems += [f"no {key}" for key in sorted(known - set(values))]
    _raise_if("config.json holds what is not understood:", problems)
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = _rope_scaling(values["rope_scaling"])
    return GPTConfig(**values)


def _rope_scaling(options: Any) -> RopeScaling:
    fields = [field.name for field in dataclasses.fields(RopeScaling)]
    given = options if isinstance(options, dict) else {}
    _raise_if("config.json's rope scaling lacks", [name for name in fields if name not in given])
    return RopeScaling(**{name: given[name] for name in fields})


def _gpt2_axes(contents: dict[str, Any]) -> dict[str, Any]:
    name = contents.get("activation_function", "gelu_new")
    return {"mlp": {theirs: ours for ours, theirs in _ACTIVATIONS.items()}[name]}


def _llama_axes(contents: dict[str, Any], family: str) -> dict[str, Any]:
    rope = _rope(contents)
    axes: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "llama3":
        axes["rope_scaling"] = _rope_scaling(rope)
    if family != "qwen2":
        attention, mlp = contents.get("attention_bias"), contents.get("mlp_bias")
        both = mlp and family == "llama"
        axes["bias"] = ("all" if both else "attention") if attention else "none"
    return axes


def _rope(contents: dict[str, Any]) -> dict[str, Any]:
    """The rotary options, whether they lie where older or newer configs put them."""
    written = contents.get("rope_scaling") or contents.get("rope_parameters")
    written = written if isinstance(written, dict) else {}
    return {
        "rope_type": written.get("type", "default"),
        "rope_theta": contents.get("rope_theta", 10000.0),
        "original_max_position_embeddings": contents["max_position_embeddings"],
    } | {name: value for name, value in written.items() if name != "type" and value is not None}


# Options that would change the result, and the values of theirs that we have.
_ANYWHERE: dict[str, tuple[Any, ...]] = {"quantization_config": ()}
_IN_GPT2: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "activation_function": tuple(_ACTIVATIONS.values()),
}
_IN_LLAMA: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
}
_IN_ROPE = {"rope_type", "rope_theta", *(f.name for f in dataclasses.fields(RopeScaling))}


def _unknown_options(contents: dict[str, Any], family: str) -> list[str]:
    known = _ANYWHERE | (_IN_GPT2 if family == "gpt2" else _IN_LLAMA)
    found = [
        f"{key} {contents[key]!r}"
        for key, values in known.items()
        if key in contents and contents[key] not in values
    ]
    return found if family == "gpt2" else found + _unknown_llama_options(contents, family)


def _unknown_llama_options(contents: dict[str, Any], family: str) -> list[str]:
    rope = _rope(contents)
    found = [f"rope {name} {rope[name]!r}" for name in rope if name not in _IN_ROPE]
    if rope["rope_type"] not in ("default", "llama3"):
        found = [f"rope_type {rope['rope_type']!r}"]
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(contents.get(key, {}), dict):
            found.append(f"{key} {contents[key]!r}")
    if not set(contents.get("layer_types", ())) <= {"full_attention"}:
        found.append(f"layer_types {contents['layer_types']!r}")
    if family == "llama" and contents.get("mlp_bias") and not contents.get("attention_bias"):
        found.append("mlp_bias without attention_bias")
    return found


def _raise_if(what: str, names: list[str]) -> None:
    if names:
        raise SurgeryError(f"{what} {', '.join(names)}")
