"""Which layers a pattern means (the patterns are PEFT's), and which update each of them gets.

All is checked here, before anything is touched.

Several layers may share one weight: mostly a head is tied to the embedding. A LoRA on one of them
is well defined as long as it is beside the weight. Merged, W + ΔW belongs to one of them alone: the
tie is broken, and a reader that trusts the old `tie_word_embeddings` builds another model. So
whoever touches a tied weight says what is meant.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from nanogpt_surgery.errors import SurgeryError, listed, nearest
from nanogpt_surgery.lora.embedding import TiedEmbeddingUpdate
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.settings import LoRASettings, Tied
from nanogpt_surgery.lora.variants import check_row_norms, new_update

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
    calls it, unless it says that it is called as its base is (`called_as_its_base`); nor can what
    PyTorch's own layers read past the forward (pytorch#128413).
    """
    module, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    kind = type(module).__name__
    base = next((base for base in (nn.Linear, nn.Embedding) if isinstance(module, base)), None)
    if base is None:
        return f"a {kind}, neither an nn.Linear nor an nn.Embedding"
    alike = getattr(module, "called_as_its_base", False)
    if type(module).forward is not base.forward and not alike:
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


@dataclass(frozen=True)
class UpdatePlan:
    """The layers that get an update, and its settings.

    Attributes:
        matches: the layers that each target means.
        settings: by the layer's name, in the model's order.
        tied_layers: layers that share a layer's weight and get the same A and B, by its name.
    """

    matches: dict[str, list[str]]
    settings: dict[str, LoRASettings]
    tied_layers: dict[str, list[str]]

    def factories(self) -> dict[str, Callable[[nn.Module], LoRAUpdate]]:
        """For each layer what makes its update from the bare layer."""
        return {path: partial(new_update, settings=s) for path, s in self.settings.items()}


def plan_updates(
    model: nn.Module, targets: str | Iterable[str], settings: LoRASettings
) -> UpdatePlan:
    """Finds the layers that the targets mean, and checks what each of them is to get.

    Raises:
        SurgeryError: a target means no layer, a pattern of the settings matches no target, a target
            is tied, or a layer cannot have such an update.
    """
    matches, layers = find_targets(model, targets), adaptable_layers(model)
    matched = {layer for found in matches.values() for layer in found}
    names = [layer for layer in layers if layer in matched]
    patterns = {**(settings.rank_pattern or {}), **(settings.alpha_pattern or {})}
    if unused := [p for p in patterns if not any(by_pattern({p: True}, n, False) for n in names)]:
        raise SurgeryError(
            f"no target matches {', '.join(map(repr, unused))} of rank_pattern or alpha_pattern",
            f"the targets are {listed(names, 12)}",
        )
    by_layer = {
        layer: replace(
            settings,
            rank=by_pattern(settings.rank_pattern, layer, settings.rank),
            alpha=by_pattern(settings.alpha_pattern, layer, settings.alpha),
        )
        for layer in names
    }
    plan = _with_one_update_a_weight(
        UpdatePlan(matches, by_layer, find_tied(model, names, settings.tied)), layers
    )
    for path, its_settings in plan.settings.items():
        tied = [layers[other] for other in plan.tied_layers.get(path, [])]
        check_settings(path, layers[path], tied, its_settings)
    return plan


def _with_one_update_a_weight(plan: UpdatePlan, layers: Mapping[str, nn.Module]) -> UpdatePlan:
    """The plan with one layer of each tied group in it, a Linear where there is one."""
    settings, tied_layers = dict(plan.settings), dict(plan.tied_layers)
    for name in plan.settings:
        if name not in settings or name not in tied_layers:
            continue
        group = [name, *tied_layers.pop(name)]
        unfit = [other for other in group if other not in layers]
        if unfit:
            raise SurgeryError(
                f"{name} shares its weight with {', '.join(unfit)}, which cannot be wrapped",
                "tied='untie'",
            )
        first = min(group, key=lambda other: isinstance(layers[other], nn.Embedding))
        its_settings = settings[name]
        for other in group:
            settings.pop(other, None)
            tied_layers.pop(other, None)
        settings[first] = its_settings
        tied_layers[first] = [other for other in group if other != first]
    return UpdatePlan(plan.matches, settings, tied_layers)


def check_settings(
    path: str, layer: Any, tied_layers: Iterable[nn.Module], settings: LoRASettings
) -> None:
    """Raises `SurgeryError` unless there is such an update for a layer and those tied to it."""
    directions = min(layer.weight.shape)
    if settings.rank > directions:
        kind = "PiSSA" if settings.pissa else "an update"
        raise SurgeryError(
            f"{kind} with rank {settings.rank} on {path}, a matrix of "
            f"{tuple(layer.weight.shape)}: there are only {directions} directions",
            f"rank={directions} or less, or rank_pattern={{{path!r}: {directions}}}",
        )
    if settings.dora:
        check_row_norms(path, layer)
    plain = isinstance(layer, nn.Linear) and not (settings.dora or settings.pissa)
    for tied in tied_layers:
        _check_tied(tied, plain)


def _check_tied(tied: nn.Module, plain: bool) -> None:
    if isinstance(tied, nn.Embedding) and not plain:
        raise SurgeryError(
            "tied='both' is for plain LoRA and rsLoRA: DoRA's lengths are those of the head's rows "
            "and of the embedding's columns, and PiSSA's initial factors are kept by one layer",
            "tied='untie', or leave dora and pissa out",
        )


def tied_view(update: LoRAUpdate, layer: nn.Module) -> LoRAUpdate:
    """An update of a Linear for the layer that shares its weight: the same A and B, once more.

    Raises:
        SurgeryError: the kind has no such view.
    """
    _check_tied(layer, type(update) is LoRAUpdate)
    return TiedEmbeddingUpdate(update) if isinstance(layer, nn.Embedding) else update


def tied_to(model: nn.Module, name: str) -> list[str]:
    """The names of the other layers that hold the very weight of the layer `name`.

    One module under two names is no tie: it is wrapped, and merged, under both.
    """
    layer = model.get_submodule(name)
    weight = _held(unwrapped(layer))
    found = [
        other.removesuffix(".original_layer")
        for other, module in model.named_modules(remove_duplicate=False)
        if weight is not None and _held(module) is weight
    ]
    return [o for o in dict.fromkeys(found) if model.get_submodule(o) is not layer]


def unwrapped(layer: nn.Module) -> nn.Module:
    """The layer itself, without the wrapper that carries its updates."""
    return layer.original_layer if isinstance(layer, LoRALayer) else layer


def _held(layer: nn.Module) -> Any:
    """Returns the tensor that holds a layer's weight: itself, or its blocks if it is quantised."""
    return layer._parameters.get("weight", layer._buffers.get("blocks"))


def find_tied(model: nn.Module, names: Iterable[str], tied: Tied) -> dict[str, list[str]]:
    """For each target the tied layers that get its update too: none unless `tied` is "both".

    Raises:
        SurgeryError: a target is tied and `tied` is "refuse".
    """
    held = Counter(id(_held(module)) for module in model.modules())  # one walk for all names
    shared = [name for name in names if held[id(_held(unwrapped(model.get_submodule(name))))] > 1]
    ties = {name: others for name in shared if (others := tied_to(model, name))}
    if ties and tied == "refuse":
        shown = "; ".join(f"{name} with {', '.join(others)}" for name, others in ties.items())
        raise SurgeryError(
            f"these layers share one weight: {shown}. Merged, an update of one of them breaks the "
            "tie",
            "tied='untie' lets it: the adapted layer gets a weight of its own when "
            "merged; tied='both' adapts both by the same ΔW, so that they stay tied",
        )
    return ties if tied == "both" else {}
