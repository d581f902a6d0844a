"""Which layers a pattern means. The patterns are PEFT's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from nanogpt_surgery.errors import SurgeryError, nearest
from nanogpt_surgery.lora.linear import LoRALayer

ALL_LINEAR = "all-linear"
COMPILED = "_orig_mod"  # where torch.compile keeps the model


def find_targets(model: nn.Module, targets: str | Iterable[str]) -> dict[str, list[str]]:
    """For each pattern the names of the Linears and Embeddings it matches, in the model's order.

    A pattern is a name (`q_proj`, `layers.0.mlp.up_proj`) that equals the layer's or ends it after
    a dot, a regular expression for the whole name, or `all-linear`: every Linear but the output
    layer. A layer that carries a LoRA already counts as what it was.

    Raises:
        SurgeryError: a pattern is no text, or matches nothing (with the real names and the
            nearest).
    """
    several = isinstance(targets, Iterable) and not isinstance(targets, str | bytes)
    patterns: list[Any] = list(targets) if several else [targets]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise SurgeryError(
            f"the targets are {targets!r}; they must be text, one or several",
            f"names of layers, such as 'q_proj', or {ALL_LINEAR!r}",
        )
    if not patterns:
        raise SurgeryError("no target was named", f"name layers, or use {ALL_LINEAR!r}")
    layers = adaptable_layers(model)
    matches = {pattern: _matching(pattern, layers, model) for pattern in patterns}
    empty = [pattern for pattern, found in matches.items() if not found]
    if empty:
        raise _no_match(empty, layers, model)
    return matches


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The Linears and Embeddings that can be wrapped, or are, by name, without its update."""
    layers: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and not module.replaces_whole:
            layers[name] = module.original_layer
        elif (
            not name.startswith(tuple(wrapped)) and name and unsupported_reason(model, name) is None
        ):
            layers[name] = module
        if isinstance(module, LoRALayer):
            wrapped.append(f"{name}.")
    return layers


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` made of it, or the model itself."""
    inside = model._modules.get(COMPILED)
    return model if inside is None else inside


def unsupported_reason(model: nn.Module, name: str) -> str | None:
    """Why a module cannot be wrapped, or None if it can.

    A subclass with a forward of its own cannot, since the wrapper would not be called as its owner
    calls it; nor can what PyTorch's own layers read past the forward (pytorch#128413).
    """
    module, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    kind = type(module).__name__
    base = next((base for base in (nn.Linear, nn.Embedding) if isinstance(module, base)), None)
    if base is None:
        return f"a {kind}, neither an nn.Linear nor an nn.Embedding"
    if type(module).forward is not base.forward:
        return f"a {kind}, an nn.{base.__name__} with a forward of its own"
    if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"read by {type(owner).__name__} past its forward, so that a LoRA would do nothing"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an nn.Embedding with max_norm, which rewrites its own weight"
    return _weight_problem(module, f"an nn.{base.__name__}")


def _weight_problem(layer: Any, kind: str) -> str | None:
    """Why nothing can be added to a layer's weight, or None if it can."""
    if isinstance(layer.weight, nn.UninitializedParameter):
        return f"a {type(layer).__name__}, which has no size before its first call"
    if layer.weight.device.type == "meta":
        return f"{kind} on the meta device, without numbers"
    if not layer.weight.is_floating_point():
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        return f"{kind} of {dtype} numbers, and an update is real"
    return None


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that is a layer's name or its ending, as in PEFT.

    Raises:
        SurgeryError: a pattern is no regular expression.
    """
    for pattern, value in (patterns or {}).items():
        where = f"{pattern!r} of rank_pattern or alpha_pattern"
        hint = "a layer's name or its ending, such as q_proj, or .*q_proj"
        if _compiled(rf"^(.*\.)?({pattern})$", where, hint).match(name):
            return value
    return default


def _compiled(pattern: str, where: str, hint: str = "") -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise SurgeryError(f"{where} is not a regular expression: {error}", hint) from None


def _matching(pattern: str, layers: dict[str, nn.Module], model: nn.Module) -> list[str]:
    if pattern == ALL_LINEAR:
        output = output_layer(model)
        return [n for n, layer in layers.items() if isinstance(layer, nn.Linear) and n != output]
    return _named(pattern, layers)


def _named(pattern: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    exact = [name for name in names if name == pattern or name.endswith("." + pattern)]
    if exact:
        return exact
    expression = _compiled(pattern, f"the target {pattern!r}")
    return [name for name in names if expression.fullmatch(name)]


def output_layer(model: nn.Module) -> str | None:
    """The layer that makes the logits, by transformers' own accessor or by its usual name."""
    accessor = getattr(model, "get_output_embeddings", None)
    output: nn.Module | None = accessor() if accessor else None
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        if module is output or (output is None and name.rpartition(".")[2] == "lm_head"):
            return name
    return None


def _no_match(patterns: list[str], layers: dict[str, nn.Module], model: nn.Module) -> SurgeryError:
    wrong = ", ".join(repr(pattern) for pattern in patterns)
    what = f"no Linear or Embedding matches the target {wrong}{_unfit(patterns, model)}; the model "
    if not layers:
        itself = isinstance(model, nn.Linear | nn.Embedding)
        hint = "put it into another module, nn.Sequential(model)" if itself else ""
        return SurgeryError(what + ("has none but itself" if itself else "has none to adapt"), hint)
    names = list(layers)
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    linears = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    meant = "; ".join(_meant(pattern.rpartition(".")[2], endings) for pattern in patterns)
    return SurgeryError(
        f"{what}has {len(linears)} Linears and {len(names) - len(linears)} Embeddings with the "
        f"endings {', '.join(endings)} (for example {(linears or names)[0]})",
        _separated(patterns, names) or f"the nearest: {meant}",
    )


# What families call the same layers; a fused matrix has several of ours.
_SAME = (
    "q_proj query wq q_lin to_q c_attn query_key_value W_pack Wqkv qkv_proj qkv in_proj",
    "k_proj key wk k_lin to_k c_attn query_key_value W_pack Wqkv qkv_proj qkv in_proj",
    "v_proj value wv v_lin to_v c_attn query_key_value W_pack Wqkv qkv_proj qkv in_proj",
    "o_proj out_proj wo out_lin to_out dense c_proj attn_output",
    "gate_proj w1 gate_up_proj linear_1 ffn_gate",
    "up_proj fc1 c_fc w3 gate_up_proj dense_h_to_4h fc_in lin1 ffn_up linear1 intermediate",
    "down_proj fc2 w2 c_proj dense_4h_to_h fc_out lin2 ffn_down linear2",
    "embed_tokens wte word_embeddings tok_embeddings embed_in token_embd embeddings",
    "lm_head embed_out output output_layer unembed head",
)


def _meant(name: str, endings: list[str]) -> str:
    """The layers that a name means, by what other families call them, or else by its letters."""
    if re.sub(r"[\W_]", "", name).lower() in ("alllinear", "alllinears", "alllinearlayers", "all"):
        return repr(ALL_LINEAR)
    groups = [group.split() for group in _SAME]
    meant = [e for group in groups if name in group for e in endings if e in group]
    return ", ".join(dict.fromkeys(meant)) or nearest(name, endings)


def _separated(patterns: list[str], names: list[str]) -> str:
    """Hint for names joined by commas; empty where a part of them is no layer's name or ending."""
    parts = [part.strip() for pattern in patterns for part in pattern.split(",") if part.strip()]
    layers = all(any(f".{name}".endswith(f".{part}") for name in names) for part in parts)
    return f"each name by itself: {' '.join(parts)}" if layers else ""


def _unfit(patterns: list[str], model: nn.Module) -> str:
    """The other modules that carry the names, and why they cannot be wrapped."""
    modules = {n: m for n, m in model.named_modules() if n and not isinstance(m, LoRALayer)}
    found = [_named(pattern, modules)[:1] for pattern in patterns if pattern != ALL_LINEAR]
    if ALL_LINEAR in patterns or not any(found):
        found += [[n for n, m in modules.items() if type(m).__name__ == "Conv1D"][:1]]
    if ALL_LINEAR in patterns:
        linears = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        found += [[n for n in linears if unsupported_reason(model, n)][:1]]
    reasons = [f"{name} is {unsupported_reason(model, name)}" for names in found for name in names]
    if any("Conv1D" in reason for reason in reasons):
        reasons.append("a GPT-2 opened with open_model has Linears: q_proj, k_proj, v_proj, …")
    return f" ({'; '.join(reasons)})" if reasons else ""
