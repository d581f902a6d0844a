"""An adapter looked at on a text, and on texts of an old and of a new domain.

Legend: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.interpret.lens import Lens, logit_lens
from nanogpt_surgery.interpret.recording import checked_ids
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.model.loss import cross_entropy, eval_mode, kl_divergence
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report


@dataclass(frozen=True)
class Moved:
    """A token whose probability an adapter has changed."""

    row: int
    position: int
    """the token after this one"""
    id: int
    without: float
    """probability, the adapter off"""
    with_it: float
    """probability, the adapter on"""


@dataclass(frozen=True)
class Comparison:
    """A model on one text with its adapters off and on."""

    moved: list[Moved]
    """the tokens whose probability moved most, the largest change first"""
    kl: Tensor
    """divergence of the base's distribution from the adapted one's, nats, (B, T)"""
    lens_without: Lens
    lens_with: Lens
    layers: Report
    """for each adapted layer ‖ΔW x‖ / ‖W x‖ on this text, and the loss without its update"""


@check_arguments
def compare(model: SimpleGPT, ids: Tensor, top: int = 10, left_out: bool = True) -> Comparison:
    """Compares a model with its adapters on and off, on ids (B, T).

    Args:
        model: carries an adapter that takes part; left as it is.
        ids: int64; their next-token loss is in the report of the layers.
        top: how many moved tokens are listed, and likeliest ones kept in the lenses.
        left_out: measure the loss without each layer's update: a forward pass for each.

    Raises:
        SurgeryError: the model carries no LoRA, or it is disabled.
    """
    layers, ids = _active_layers(model), checked_ids(model, ids)
    top = min(top, model.config.vocab_size)
    with eval_mode(model), torch.inference_mode():
        with _sizes(layers) as sizes:
            after = model(ids).float().softmax(-1)  # (B, T, V)
        adapted, loss = logit_lens(model, ids, top), _loss(model, ids)
        with without(layers.values()):
            before, plain = model(ids).float().softmax(-1), logit_lens(model, ids, top)
            base_loss = _loss(model, ids)
        rows = [{"layer": name, **sizes[name]} for name in layers if name in sizes]
        for row in rows if left_out else ():
            with without([layers[row["layer"]]]):
                row["loss without it"] = _loss(model, ids)
    kl = (after * (after.clamp_min(1e-30).log() - before.clamp_min(1e-30).log())).sum(-1)
    summary = {"layers": len(rows), "loss": loss, "loss of the base": base_loss}
    report = Report("what the adapter adds in each layer", rows, summary)
    return Comparison(_moved(before, after, top), kl, plain, adapted, report)


def _active_layers(model: SimpleGPT) -> dict[str, LoRALayer]:
    layers = lora_layers(model)
    if not any(layer.enabled for layer in layers.values()):
        raise SurgeryError("the LoRA is disabled", "enable_lora(model)")
    return layers


@contextmanager
def without(layers: Iterable[LoRALayer]) -> Iterator[None]:
    """Within the block, some layers compute as if they had no update."""
    switched = [layer for layer in layers if layer.enabled]
    for layer in switched:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in switched:
            layer.enabled = True


def _moved(before: Tensor, after: Tensor, top: int) -> list[Moved]:
    changes = (after - before).flatten().abs()
    rows, positions, ids = torch.unravel_index(changes.topk(top).indices, after.shape)
    places = zip(rows.tolist(), positions.tolist(), ids.tolist(), strict=True)
    return [Moved(*at, float(before[at]), float(after[at])) for at in places]


def _loss(model: SimpleGPT, ids: Tensor) -> float | None:
    """Returns the mean next-token loss, nats; None of a single token."""
    if ids.size(1) < 2:
        return None
    return float(cross_entropy(model(ids)[:, :-1], ids[:, 1:].contiguous()))


@contextmanager
def _sizes(layers: dict[str, LoRALayer]) -> Iterator[dict[str, dict[str, Any]]]:
    """Within the block, measures what each layer's updates add beside what its weight gives."""
    found: dict[str, dict[str, Any]] = {}

    def measure(name: str, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            plain = layer.original_layer(*inputs).float()
            added = (output.float() - plain).norm()
            found[name] = {"‖ΔW x‖ / ‖W x‖": float(added / plain.norm().clamp_min(1e-30))}

    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(partial(measure, name))
            stack.callback(hook.remove)
        yield found


@check_arguments
def forgetting(model: SimpleGPT, old: Iterable[Tensor], new: Iterable[Tensor]) -> Report:
    """Compares adapter and base on texts of an old domain and of the new one.

    Args:
        model: carries an adapter that takes part; left as it is.
        old: ids (B, T) of the old domain, some batches of them.
        new: of the domain that the adapter was trained on.

    Returns:
        A report with a row for each domain: tokens, loss without and with the adapter, nats a
        token, and the mean KL divergence of the base from the adapted model.

    Raises:
        SurgeryError: the model carries no LoRA, or it is disabled; or a domain has no batch of two
            tokens or more.
    """
    domains = (("old", old), ("new", new))
    rows = [_domain(model, name, batches) for name, batches in domains]
    risen, fallen = (row["loss with it"] - row["loss without"] for row in rows)
    summary = {"loss gained on the old": risen, "loss gained on the new": fallen}
    return Report("forgetting", rows, summary)


def _domain(model: SimpleGPT, name: str, batches: Iterable[Tensor]) -> dict[str, Any]:
    layers, tokens = _active_layers(model).values(), 0
    sums = torch.zeros(3, dtype=torch.float64)  # loss without, loss with, KL
    with eval_mode(model), torch.inference_mode():
        for batch in batches:
            ids = checked_ids(model, batch)
            targets = ids[:, 1:].contiguous()
            if not targets.numel():
                continue
            adapted = model(ids)[:, :-1]
            with without(layers):
                plain = model(ids)[:, :-1]
            measured = cross_entropy(plain, targets), cross_entropy(adapted, targets)
            sums += targets.numel() * torch.stack([*measured, kl_divergence(adapted, plain)]).cpu()
            tokens += targets.numel()
    if not tokens:
        raise SurgeryError(f"the {name} domain has no batch of at least two tokens")
    before, after, kl = (sums / tokens).tolist()
    return {
        "domain": name,
        "tokens": tokens,
        "loss without": before,
        "loss with it": after,
        "kl divergence": kl,
    }
