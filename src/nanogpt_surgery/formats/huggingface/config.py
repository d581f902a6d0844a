"""`config.json`, as transformers writes and reads it, and a `GPTConfig`.

A model whose axes no family has is saved in the same file under our own `model_type`. Options that
transformers reads for these architectures and that would change a logit are refused by name. Others
(how to initialise, what to return, where to pad) are passed over.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.formats.folders.old_keys import with_current_fields
from nanogpt_surgery.model.config import FAMILIES, GPTConfig
from nanogpt_surgery.model.rope_scaling import RopeScaling
from nanogpt_surgery.values import field_types, wrong_value

CONFIG = "config.json"
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


def existing_family_of(config: GPTConfig) -> str:
    """The family that has these axes and sizes.

    Raises:
        SurgeryError: none has, and so no program but this one has such a model.
    """
    family = family_of(config)
    if family == OWN:
        raise SurgeryError(
            "no family has this model's axes, so no other program can run it or its adapter",
            "GPTConfig.for_family(…) makes models that llama.cpp and transformers can run",
        )
    return family


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


def in_step(old: dict[str, Any], before: GPTConfig, config: GPTConfig) -> dict[str, Any]:
    """A `config.json` for a model that has another number of layers, or another vocabulary.

    A list with an entry for each layer, such as `layer_types`, gets as many as there are now: in
    the models that open here, all its entries are the same. One whose entries differ is left out,
    with what it stands for: it says nothing that the model here depends on.

    Args:
        old: the contents before.
        before: the config that they describe.
        config: what the model is now.
    """
    names = _FIELDS.get(MODEL_TYPES.get(old["model_type"], OWN), {})
    new = dict(old)
    for field in ("n_layer", "vocab_size"):
        if getattr(before, field) != getattr(config, field):
            new[names.get(field, field)] = getattr(config, field)
    if before.n_layer == config.n_layer:
        return new
    for key, value in old.items():
        if "layer" in key and isinstance(value, list) and len(value) == before.n_layer:
            new[key] = value[:1] * config.n_layer
            if value != value[:1] * len(value):
                del new[key]
    window = old.get("max_window_layers")  # those before it have none
    if type(window) is int and window >= before.n_layer:
        new["max_window_layers"] = max(window, config.n_layer)
    return new


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
    if family == "gpt2":
        name = contents.get("activation_function", "gelu_new")
        extras = {"mlp": {theirs: ours for ours, theirs in ACTIVATIONS.items()}[name]}
    else:
        extras = _llama_axes(contents, family)
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
    kind: Any = "linear" if options.get("rope_type") == "linear" else "llama3"
    fields = [field.name for field in dataclasses.fields(RopeScaling) if field.name != "rope_type"]
    names = ["factor"] if kind == "linear" else fields
    missing = [name for name in names if options.get(name) is None]
    if missing:
        raise SurgeryError(f"the rotary scaling in config.json lacks {', '.join(missing)}")
    return RopeScaling(**{name: options[name] for name in names}, rope_type=kind)


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


# Their model_type, and the family of ours that computes the same.
MODEL_TYPES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}

_LLAMA: dict[str, Any] = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
# transformers' values where a config.json leaves the field out.
ABSENT: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 128},
}

_GPT2_VALUES: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),
    "add_cross_attention": (False,),
    "activation_function": tuple(ACTIVATIONS.values()),
}
# What some models of these kinds set, by the values that change nothing.
_SHARED_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("causal", "is_causal"), (True,)),
    **dict.fromkeys(
        """
        attn_logit_softcapping final_logit_softcapping attention_softcap clip_qkv clamp_kqv
        num_experts num_local_experts n_routed_experts num_experts_per_tok use_qk_norm
        parallel_residual use_parallel_residual use_bidirectional_attention alibi
        """.split(),
        (0, False),
    ),
    **dict.fromkeys(
        """
        logit_scale logits_scaling embedding_scale embedding_multiplier residual_scale
        residual_multiplier scale_emb scale_depth
        """.split(),
        (1,),
    ),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
}
_LLAMA_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1, 1.0),
}


_ROPE_OPTIONS = """
    rope_type rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings
""".split()


def rope_options(contents: dict[str, Any]) -> dict[str, Any]:
    """The rotary options, whether they lie where older or newer configs put them.

    `rope_type` is always there; `rope_theta` where the config names it.
    """
    places = [contents.get(key) for key in ("rope_parameters", "rope_scaling")]
    newer, older = (place if isinstance(place, dict) else {} for place in places)
    options = {name: value for name, value in (older or newer).items() if value is not None}
    kind = options.pop("type", "default")
    options.setdefault("rope_type", kind)
    options.setdefault("original_max_position_embeddings", contents.get("max_position_embeddings"))
    theta = newer.get("rope_theta", older.get("rope_theta", contents.get("rope_theta")))
    return options | ({"rope_theta": theta} if theta is not None else {})


def check_options(contents: dict[str, Any], model_type: str) -> None:
    """Raises `SurgeryError`, with all their names, for options of theirs that change the result.

    Args:
        contents: a `config.json` without its nulls, with what was absent filled in.
        model_type: theirs.
    """
    expected = _SHARED_VALUES | (_GPT2_VALUES if model_type == "gpt2" else _LLAMA_VALUES)
    found = [
        f"{key} {quoted(contents[key])}"
        for key, values in expected.items()
        if key in contents and contents[key] not in values
    ]
    if "quantization_config" in contents:
        found.append("quantization_config (its weights are packed)")
    if model_type != "gpt2":
        found += _llama_options(contents, model_type)
    if found:
        raise SurgeryError(
            f"this {model_type} sets options that we do not have: {', '.join(found)}"
        )


def _llama_options(contents: dict[str, Any], model_type: str) -> list[str]:
    rope = rope_options(contents)
    inert = _is_inert_rope(rope, contents.get("max_position_embeddings"))
    known = _ROPE_OPTIONS + (_INERT_OPTIONS if inert else [])
    known += ["partial_rotary_factor"] if rope.get("partial_rotary_factor") == 1 else []
    found = [f"rope {name} {quoted(rope[name])}" for name in rope if name not in known]
    if not inert and rope["rope_type"] not in _ROPE_TYPES:
        found.insert(0, f"rope_type {quoted(rope['rope_type'])}")
    found += [
        f"{key} {quoted(contents[key])}"
        for key in ("rope_scaling", "rope_parameters")
        if not isinstance(contents.get(key, {}), dict)
    ]
    has_mlp_bias = contents.get("mlp_bias") and model_type == "llama"
    if has_mlp_bias and not contents.get("attention_bias"):
        found.append("mlp_bias without attention_bias")
    return found + _window_options(contents, model_type)


_ROPE_TYPES = ("default", "llama3", "linear")
_INERT_OPTIONS = """
    attention_factor beta_fast beta_slow mscale mscale_all_dim truncate short_factor long_factor
""".split()


def _is_inert_rope(rope: dict[str, Any], context: Any) -> bool:
    """Whether a scaling that we do not have changes nothing, at its values or within the context.

    `dynamic` begins where the context ends, which no text of ours passes.
    """
    kind, factor, attention = rope["rope_type"], rope.get("factor"), rope.get("attention_factor")
    if kind == "dynamic":
        return isinstance(factor, (int, float)) and 1 <= factor <= 1000
    if kind == "yarn":
        return factor == 1 and attention in (None, 1)
    original = rope.get("original_max_position_embeddings")
    if kind != "longrope" or type(original) is not int or type(context) is not int or original < 1:
        return False
    used = [rope.get("short_factor")] + ([rope.get("long_factor")] if context > original else [])
    widened: Any = context / original if factor is None else factor
    is_scaled = attention != 1 and not (attention is None and widened <= 1)
    return not is_scaled and all(
        isinstance(factors, list) and all(factor == 1 for factor in factors) for factors in used
    )


def _window_options(contents: dict[str, Any], model_type: str) -> list[str]:
    """Windows that cut a context off: one as long as the context changes nothing."""
    window, context = contents.get("sliding_window"), contents.get("max_position_embeddings", 0)
    if _at_least(window, context):
        return []
    found = []
    layer_types = contents.get("layer_types", [])
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        found.append(f"layer_types {quoted(layer_types)}")
    switch = contents.get("use_sliding_window", False)
    if switch is not False and not layer_types:
        first, n_layer = contents.get("max_window_layers"), contents.get("num_hidden_layers")
        if not _at_least(first, n_layer):
            found.append(f"use_sliding_window {quoted(switch)}")
    if model_type == "mistral" and window is not None and not layer_types:
        found.append(f"sliding_window {quoted(window)}, below its context of {quoted(context)}")
    return found


def _at_least(window: Any, context: Any) -> bool:
    return type(window) is int and type(context) is int and window >= context
