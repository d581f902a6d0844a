"""The defaults of `config.json`, and the options in it that we do not have.

Options that transformers reads for these architectures and that would change a logit are refused by
name. Others (how to initialise, what to return, where to pad) are passed over.
"""

from __future__ import annotations

from typing import Any

from nanogpt_surgery.errors import SurgeryError, quoted

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
    """Refuse, all at once and by name, what would change the result and is not ours.

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
    found = [f"rope {name} {quoted(rope[name])}" for name in rope if name not in known]
    if not inert and rope["rope_type"] not in _ROPE_TYPES:
        found.insert(0, f"rope_type {quoted(rope['rope_type'])}")
    if rope.get("partial_rotary_factor", 1) == 1:
        found = [text for text in found if not text.startswith("rope partial_rotary_factor ")]
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
