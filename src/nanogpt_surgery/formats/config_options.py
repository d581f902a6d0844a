"""What a `config.json` may leave out, and the options in it that we do not have.

Options that transformers reads for these architectures and that would change a logit are refused by
name. Others (how to initialise, what to return, where to pad) are passed over.
"""

from __future__ import annotations

from typing import Any

from nanogpt_surgery.errors import SurgeryError

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
_LLAMA_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
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


def refuse_options(contents: dict[str, Any], model_type: str) -> None:
    """Refuse, all at once and by name, what would change the result and is not ours.

    Args:
        contents: a `config.json` without its nulls, with what was absent filled in.
        model_type: theirs.
    """
    expected = _GPT2_VALUES if model_type == "gpt2" else _LLAMA_VALUES
    found = [
        f"{key} {contents[key]!r}"
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
    if rope["rope_type"] not in ("default", "llama3"):
        return [f"rope_type {rope['rope_type']!r}"]
    found = []
    found += [f"rope {name} {rope[name]!r}" for name in rope if name not in _ROPE_OPTIONS]
    found += [
        f"{key} {contents[key]!r}"
        for key in ("rope_scaling", "rope_parameters")
        if not isinstance(contents.get(key, {}), dict)
    ]
    has_mlp_bias = contents.get("mlp_bias") and model_type == "llama"
    if has_mlp_bias and not contents.get("attention_bias"):
        found.append("mlp_bias without attention_bias")
    layer_types = contents.get("layer_types", [])
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        found.append(f"layer_types {layer_types!r}")
    window, context = contents.get("sliding_window"), contents.get("max_position_embeddings", 0)
    if model_type == "mistral" and window is not None and not _at_least(window, context):
        found.append(f"sliding_window {window!r}, below its context of {context!r}")
    return found


def _at_least(window: Any, context: Any) -> bool:
    return isinstance(window, int) and isinstance(context, int) and window >= context
