"""Which layers a pattern means. The patterns are PEFT's."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from nanogpt_surgery.errors import SurgeryError, nearest
from nanogpt_surgery.lora.lora_linear import LoRALinear

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, targets: str | Iterable[str]) -> dict[str, list[str]]:
    """For each pattern the names of the Linears it matches, in the model's order.

    A pattern is a name (`q_proj`, `layers.0.mlp.up_proj`) that equals the layer's or ends it after
    a dot, a regular expression for the whole name, or `all-linear`: all but the output layer.

    Raises:
        SurgeryError: a pattern matches nothing (with the real names and the nearest), or a layer is
            wrapped already.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise SurgeryError("no target was named", f"name layers, or use {ALL_LINEAR!r}")
    names = linear_names(model)
    matches = {pattern: _matching(pattern, names, model) for pattern in patterns}
    empty = [pattern for pattern, found in matches.items() if not found]
    if empty:
        raise _no_match(empty, names)
    return matches


def linear_names(model: nn.Module) -> list[str]:
    """The names of the Linears that can be wrapped, in the model's order."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if wrapped:
        raise SurgeryError(
            f"the model carries a LoRA already, on {len(wrapped)} layers ({wrapped[0]}, …)",
            "merge_lora(model) or remove_lora(model) first",
        )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if name]  # a Linear that is the model itself has no owner


def _matching(pattern: str, names: list[str], model: nn.Module) -> list[str]:
    if pattern == ALL_LINEAR:
        output = _output_layer(model)
        return [name for name in names if name != output]
    exact = [name for name in names if name == pattern or name.endswith("." + pattern)]
    if exact:
        return exact
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise SurgeryError(f"the target {pattern!r} is not a regular expression: {error}") from None
    return [name for name in names if expression.fullmatch(name)]


def _output_layer(model: nn.Module) -> str | None:
    """The layer that makes the logits, by transformers' own accessor or by its usual name."""
    accessor = getattr(model, "get_output_embeddings", None)
    output: nn.Module | None = accessor() if accessor else None
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        if module is output or (output is None and name.rpartition(".")[2] == "lm_head"):
            return name
    return None


def _no_match(patterns: list[str], names: list[str]) -> SurgeryError:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    wrong = ", ".join(repr(pattern) for pattern in patterns)
    close = "; ".join(nearest(pattern.rpartition(".")[2], endings) for pattern in patterns)
    return SurgeryError(
        f"no Linear matches the target {wrong}; the model has {len(names)} Linears with the "
        f"endings {', '.join(endings)} (for example {names[0] if names else 'none'})",
        f"the nearest: {close}",
    )
