"""Operations on a model's structure: layers taken out, and layers doubled.

    prune       0 1 2 3    without 2         0 1 3
    duplicate   0 1 2 3    2 once more       0 1 2 2' 3     2' adds nothing to the stream

A copy begins as the identity: what its o_proj and down_proj give is 0, so every logit keeps its
bits, and a training can start from there (block expansion, arXiv:2401.02415). The layers that stay
are the very same modules. An adapter that the model carries stays on them under their new numbers;
a copy has none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, listed, quoted
from nanogpt_surgery.history.model_history import UPDATES, history_of, plain_name
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.merging import Probe
from nanogpt_surgery.lora.several import adapter_names
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.quantized import check_not_quantized, is_quantized
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import causal_attention
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.operating import Prepared, carry_out, check_same_bits, random_ids

WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # what a block adds to the stream comes from these


@check_arguments
def prune_layers(
    model: SimpleGPT, layers: Sequence[int], *, probe: Probe | None = None, plan: bool = False
) -> Report:
    """Takes layers out of a model; those after them get the numbers that are free.

    Args:
        model: changed in place.
        layers: the numbers of those that go, from 0.
        probe: ids (B, T), or a function that gives logits: by it the model is compared with what
            it was.
        plan: change nothing, and say what it would be.

    Returns:
        A row for each layer that goes, with its parameters and an adapter's updates on it; the
        sizes before and after; the effect.

    Raises:
        SurgeryError: a layer is not there, all of them or all of an adapter would go, the model
            has hooks, or the modules are not what the config says. The model is untouched then.
    """

    def prepare() -> Prepared:
        order = _without(model, layers)
        stay = [model.layers[i] for i in order]
        return _prepared(model, "prune", layers, order, lambda: _set_layers(model, stay))

    return carry_out(model, prepare, probe, plan)


@check_arguments
def duplicate_layers(
    model: SimpleGPT, layers: Sequence[int], *, probe: Probe | None = None, plan: bool = False
) -> Report:
    """Puts a copy behind each of some layers, which computes nothing until it is trained.

    Args:
        model: changed in place.
        layers: their numbers, from 0; a number that comes twice gives two copies.
        probe: ids (B, T), or a function that gives logits, on which they must stay the same to the
            bit; random ids by default.
        plan: change nothing, and say what it would be.

    Returns:
        A row for each layer that is doubled: its new names, and the parameters that its copies
        add; the sizes before and after; the effect, which is none.

    Raises:
        SurgeryError: a layer is not there, the model has hooks or is quantised, or a logit is not
            the same to the bit. The model is untouched then.
    """
    check_not_quantized(model, "a copy of a layer")

    def prepare() -> Prepared:
        order = _with_copies(model, layers)
        return _prepared(model, "duplicate", layers, order, lambda: _double(model, order))

    probe = random_ids(model) if probe is None else probe
    return carry_out(model, prepare, probe, plan, check=check_same_bits)


def _double(model: SimpleGPT, order: list[int]) -> None:
    there = list(model.layers)
    is_copy = [old in order[:new] for new, old in enumerate(order)]
    pairs = [(there[old], copied) for old, copied in zip(order, is_copy, strict=True)]
    _set_layers(model, [_identity_copy(model, one) if copied else one for one, copied in pairs])


def _numbers(model: SimpleGPT, layers: Sequence[int]) -> list[int]:
    """Returns the numbers of layers.

    Raises:
        SurgeryError: one is no whole number or not there, or there are none.
    """
    count = len(model.layers)
    try:
        numbers = [index(number) for number in layers]
    except TypeError:
        raise SurgeryError(
            f"{quoted(layers)} are no numbers of layers", f"they are 0 to {count - 1}"
        ) from None
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong:
        raise SurgeryError(f"there is no layer {wrong[0]}; they are 0 to {count - 1}")
    if not numbers:
        raise SurgeryError("no layer is named", f"they are 0 to {count - 1}")
    return numbers


def _without(model: SimpleGPT, layers: Sequence[int]) -> list[int]:
    """Returns the numbers of the layers that stay."""
    gone = set(_numbers(model, layers))
    order = [i for i in range(len(model.layers)) if i not in gone]
    if not order:
        raise SurgeryError(f"all {len(gone)} layers would go, and a model needs at least one")
    staying = {name for module in _parts_beside(model, gone) for name in _adapters(module)}
    lost = [name for name in adapter_names(model) if name not in staying]
    if lost:
        raise SurgeryError(
            f"the adapter {lost[0]!r} changes nothing but layers that would go",
            f"remove_lora(model) first, or swap_lora to another one and remove {lost[0]!r}",
        )
    return order


def _parts_beside(model: SimpleGPT, gone: set[int]) -> Iterable[nn.Module]:
    yield from (child for name, child in model.named_children() if name != "layers")
    yield from (layer for i, layer in enumerate(model.layers) if i not in gone)


def _adapters(part: nn.Module) -> Iterable[str]:
    for module in part.modules():
        if isinstance(module, LoRALayer):
            yield from module.updates


def _with_copies(model: SimpleGPT, layers: Sequence[int]) -> list[int]:
    """Returns for each layer of the new model the number of the one that it is or copies."""
    numbers = _numbers(model, layers)
    return sorted([*range(len(model.layers)), *numbers])


def _prepared(
    model: SimpleGPT,
    verb: str,
    layers: Sequence[int],
    order: list[int],
    change: Callable[[], None],
) -> Prepared:
    check_free(model)
    rows = [
        {
            "layer": f"layers.{old}",
            "becomes": ", ".join(f"layers.{new}" for new, of in enumerate(order) if of == old)
            or None,
            "parameters": _count_own(layer) * (order.count(old) - 1),
            "updates": sum(1 for _ in _adapters(layer)),
        }
        for old, layer in enumerate(model.layers)
        if order.count(old) != 1
    ]
    config = replace(model.config, n_layer=len(order))
    summary = {"layers": len(order)} | sizes(model, config)
    made = max(0, summary["model_after_bytes"] - summary["model_before_bytes"])
    title = f"{verb} layers {', '.join(map(str, layers))}"
    return Prepared(title, rows, change, summary, made)


def _count_own(module: nn.Module) -> int:
    """Returns how many parameters a layer has without the updates on it."""
    return sum(p.numel() for name, p in module.named_parameters() if UPDATES not in f".{name}")


def sizes(model: SimpleGPT, config: GPTConfig) -> dict[str, Any]:
    """Returns what a model of another config takes, beside what it takes now."""
    width = next(model.parameters()).element_size()
    now = model.config

    def cache(c: GPTConfig) -> int:
        return 2 * c.n_layer * c.n_kv_head * c.head_dim * width

    return {
        "parameters_before": now.n_parameters,
        "parameters_after": config.n_parameters,
        "model_before_bytes": now.n_parameters * width,
        "model_after_bytes": config.n_parameters * width,
        "flops_per_token_before": now.flops_per_token(),
        "flops_per_token_after": config.flops_per_token(),
        "cache_per_token_before_bytes": cache(now),
        "cache_per_token_after_bytes": cache(config),
    }


def check_free(model: SimpleGPT) -> None:
    """Raises `SurgeryError` if something looks into a model, and would look elsewhere afterwards.

    A hook knows its module, whose number would be another; an attention that was replaced belongs
    to a training or a recording that goes on.
    """
    hooked = [
        name or "the model"
        for name, module in model.named_modules()
        if module._forward_hooks
        or module._forward_pre_hooks
        or getattr(module, "attend", causal_attention) is not causal_attention
    ]
    if hooked:
        raise SurgeryError(
            f"the model is being watched or trained: hooks are on {listed(hooked, 4)}",
            "leave the block of record, patch or lora_rows first, or end the training",
        )


def _set_layers(model: SimpleGPT, layers: list[nn.Module]) -> None:
    stack = nn.ModuleList(layers)
    stack.training = model.layers.training  # of it alone: each layer keeps its own mode
    model.layers = stack
    model.config = replace(model.config, n_layer=len(layers))
    check_in_step(model)


def _identity_copy(model: SimpleGPT, layer: nn.Module) -> nn.Module:
    """Returns a copy of a layer, without adapters, that adds 0 to the stream."""
    twin = copy.deepcopy(layer)
    for parent in list(twin.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, LoRALayer):
                parent._modules[name] = child.original_layer
    with torch.no_grad():
        for path in WRITERS:
            for parameter in twin.get_submodule(path).parameters():
                parameter.zero_()
    trains_like(model, _twins(layer, twin))
    return twin


def _twins(layer: nn.Module, twin: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    originals = {plain_name(name): p for name, p in layer.named_parameters()}
    return [(originals[name], copied) for name, copied in twin.named_parameters()]


def trains_like(model: SimpleGPT, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Lets new parameters train where old ones do, once an adapter has gone as well."""
    history = history_of(model)
    waiting = history.trainable_before
    for old, new in pairs:
        new.requires_grad_(old.requires_grad)
        if waiting is not None and any(old is one for one in waiting):
            history.trainable_before = (*(history.trainable_before or ()), new)


def check_in_step(model: SimpleGPT) -> None:
    """Raises `SurgeryError` unless the modules are those that the config describes."""
    found: dict[str, tuple[int, ...]]
    wanted: dict[str, tuple[int, ...]]
    if is_quantized(model):
        wanted = {"layers": (model.config.n_layer,)}
        found = {"layers": (len(model.layers),)}
    else:
        with torch.device("meta"):
            plain = SimpleGPT.from_config(model.config)
        wanted = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
        state = model.state_dict().items()
        found = {plain_name(n): tuple(t.shape) for n, t in state if UPDATES not in f".{n}"}
    wrong = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if wrong:
        raise SurgeryError(
            f"the model is not what its config says: {wrong[0]} is {found.get(wrong[0])}, by the "
            f"config {wanted.get(wrong[0])}"
        )
