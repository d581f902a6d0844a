"""Merging: W + ΔW in the place of a layer and its updates, and what that does.

A merge rounds W + ΔW once, to W's own dtype. How much of ΔW arrives is computed in the same pass
over each layer, before anything is touched, and the effect on the logits is measured on a probe:
ids that the model is called on, or a function of no arguments that gives logits (…, V).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, reduce
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.model_history import get_tie_word_embeddings, history_of, operation
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.embedding import TiedEmbeddingUpdate
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.several import active_adapters, adapter_names, lora_layers
from nanogpt_surgery.lora.targets import tied_to
from nanogpt_surgery.lora.variants import BiasUpdate
from nanogpt_surgery.model.loss import eval_mode, kl_divergence
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import check_ids

Probe: TypeAlias = Tensor | Callable[[], Tensor]
K = TypeVar("K")
T = TypeVar("T")
Rounding: TypeAlias = Callable[[Tensor], Tensor]  # rows of a matrix, to fewer bits and back
FLOAT16 = ("float16", "F16")  # as torch and GGUF call it
BLOCK = 32  # weights that share a scale at 4 bits
CHUNK = 1 << 17  # weights worked on at once, few enough for a processor's cache


@check_arguments
def merge_lora(
    model: nn.Module,
    *,
    probe: Probe | None = None,
    tolerance: float = 1e-3,
    force: bool = False,
    keep_originals: bool = True,
) -> Report:
    """Puts W + ΔW, added in float32 (float64 if W is), in the place of every wrapped layer.

    The original tensors are not written to. What takes part is merged; the other adapters leave
    with the wrappers, and come back with `undo_lora`.

    Args:
        model: carries a LoRA, enabled.
        probe: ids (B, T) to call the model on, or a function that gives logits; the effect on
            the logits is measured with it.
        tolerance: largest mean KL divergence from the adapted model's distribution to the merged
            one's, in nats a token, that is let pass.
        force: merge whatever the probe says and the weights become.
        keep_originals: keep the original layers and the updates in memory, for `undo_lora`.

    Raises:
        SurgeryError: the probe shows more than the tolerance, the LoRA is disabled, no adapter
            takes part, no weight would change, one would be NaN or infinite, or a tie would be
            broken that nobody decided to break. The model is untouched then.
    """
    layers = lora_layers(model)
    _check_takes_part(model, layers)
    check_undecided(model, layers)
    changed = with_delta(layers)
    done = dict(zip(changed, in_turn(add_update, changed.values()), strict=True))
    rows = [{"layer": name, **row} for name, (_, row) in done.items()]
    if not force:
        check_weights(rows, layers)
    effect: dict[str, float] = {}
    with operation(model, "merge"):
        before = None if probe is None else logits_of(model, probe)
        merged = {name: weight for name, (weight, _) in done.items()}
        share_equal(layers, merged)
        replace_layers(model, merged)
        if probe is not None and before is not None:
            effect = compare_logits(before, logits_of(model, probe))
            if not force:
                check_effect(effect, tolerance)
    if not keep_originals:
        history_of(model).settle()
    kept = {"originals": "kept" if keep_originals else "dropped"}
    rows = [row | {"original": kept["originals"]} for row in rows]
    return Report("LoRA merged", rows, {"layers": len(rows)} | kept | effect)


def _check_takes_part(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    _check_held(layers)
    if not all(layer.enabled for layer in layers.values()):
        raise SurgeryError(
            "the LoRA is disabled, so a merge would change what the model computes",
            "enable_lora(model) first",
        )
    names = adapter_names(model)
    if not active_adapters(model).names():
        raise SurgeryError(
            f"no adapter takes part, so a merge would only take {', '.join(names)} off",
            f"swap_lora(model, {names[0]!r}) first, or remove_lora(model)",
        )


def _check_held(layers: Mapping[str, LoRALayer]) -> None:
    """Raises `SurgeryError` for weights in a form that holds no sum, such as quantised ones."""
    others = [name for name, layer in layers.items() if "blocks" in layer.original_layer._buffers]
    if others:
        raise SurgeryError(
            f"{len(others)} weights are quantised ({', '.join(others[:4])}), and W + ΔW would not "
            "be: rounded to the same few bits most of ΔW is lost",
            "merge into the model as it was before, and quantise the result",
        )


def check_undecided(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    """Raises `SurgeryError` if merging would break a tie that nobody decided to break."""
    undecided = {}
    holders = Counter(id(module._parameters.get("weight")) for module in model.modules())
    for name, layer in layers.items():
        shared = not layer.unties and holders[id(getattr(layer.original_layer, "weight", None))] > 1
        others = tied_to(model, name) if shared else []
        alone = [other for other in others if not _is_decided(model.get_submodule(other), layer)]
        if alone:
            undecided[name] = alone
    if undecided:
        shown = "; ".join(f"{name} with {', '.join(rest)}" for name, rest in undecided.items())
        raise SurgeryError(
            f"a merge would break the tie of {shown}",
            "remove_lora, and inject_lora again with tied='untie' or tied='both'",
        )


def _is_decided(partner: nn.Module, layer: LoRALayer) -> bool:
    """Whether a layer may part from its partner, or both have one A and B wherever either has."""
    if not isinstance(partner, LoRALayer):
        return False
    names = [n for n in layer.active.names() if n in layer.updates or n in partner.updates]
    return partner.unties or all(
        n in layer.updates
        and n in partner.updates
        and layer.updates[n].lora_A is partner.updates[n].lora_A
        for n in names
    )


def replace_layers(model: nn.Module, merged: Mapping[str, Tensor]) -> None:
    """Puts a plain layer with its W + ΔW, by name, in the place of every wrapped layer.

    Layers that are given one tensor share it; where a tie is broken, a config that says
    `tie_word_embeddings` says no.
    """
    before = history_of(model).trainable_before
    trainable = None if before is None else {id(parameter) for parameter in before}
    parameters: dict[int, nn.Parameter] = {}
    plain_layers: dict[int, nn.Module] = {}
    for name, layer in lora_layers(model).items():
        plain: nn.Module = layer.shown
        if not layer.replaces_whole:
            weight = parameters.setdefault(id(merged[name]), nn.Parameter(merged[name]))
            weight.requires_grad_(trainable is None or id(layer.original_layer.weight) in trainable)
            bias = merged_bias(layer)
            if bias is not None:
                bias.requires_grad_(trainable is None or id(layer.original_layer.bias) in trainable)
            plain = plain_layer(layer.original_layer, weight, bias)
        plain_layers[id(layer)] = plain
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            parent._modules[child] = plain_layers.get(id(module), module)
    restore_requires_grad(model)
    if get_tie_word_embeddings(model) and _is_untied(model):
        config: Any = model.config
        config.tie_word_embeddings = False


def _is_untied(model: nn.Module) -> bool:
    """Whether the embedding and the head that transformers' accessors name have two weights."""
    ends = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    weights = [getattr(end(), "weight", None) for end in ends if end is not None]
    return len(weights) == 2 and weights[0] is not weights[1]


def restore_requires_grad(model: nn.Module) -> None:
    """Lets those parameters train again that could before the first injection."""
    for parameter in history_of(model).trainable_before or ():
        parameter.requires_grad_(True)
    history_of(model).trainable_before = None


def merged_bias(layer: LoRALayer, dtype: torch.dtype | None = None) -> nn.Parameter | None:
    """The bias with what the updates that take part add to it, added in float32 and rounded once.

    None where they add nothing.

    Args:
        layer: with a ΔW.
        dtype: of the sum; by default the bias's own.
    """
    weights = layer.active.weights if isinstance(layer.active, WeightedAdapters) else {}
    parts = [(w, layer.updates[name]) for name, w in weights.items() if name in layer.updates]
    added = [w * update.delta_bias() for w, update in parts if isinstance(update, BiasUpdate)]
    if not added:
        return None
    bias = layer.original_layer.bias
    wide = torch.promote_types(bias.dtype, torch.float32)
    total = reduce(torch.add, added, bias.detach().to(wide)).detach()
    return nn.Parameter(total.to(dtype or bias.dtype), requires_grad=False)


def plain_layer(original: Any, weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Module:
    """A new layer of the original's kind with another weight, and its bias or another one."""
    plain: nn.Linear | nn.Embedding
    if isinstance(original, nn.Embedding):
        plain = nn.Embedding.from_pretrained(
            weight.detach(),
            padding_idx=original.padding_idx,
            scale_grad_by_freq=original.scale_grad_by_freq,
            sparse=original.sparse,
        )
    else:
        plain = nn.Linear(original.in_features, original.out_features, bias=False, device="meta")
        plain.bias = original.bias if bias is None else bias
    plain.weight = weight
    return plain.train(original.training)


def with_delta(layers: Mapping[str, LoRALayer]) -> dict[str, LoRALayer]:
    """Those that are not replaced whole."""
    return {name: layer for name, layer in layers.items() if not layer.replaces_whole}


def in_turn(work: Callable[[K], T], items: Iterable[K]) -> Iterator[T]:
    """The results of some work, in order; at a time as many as PyTorch has threads, at most 8.

    Each is done by one thread: those that PyTorch puts on one operation wait for each other at its
    end, which beside another process takes many times as long as an operation on a few rows.
    """
    threads = torch.get_num_threads()
    workers, results = min(threads, 8), deque[Future[T]]()
    try:
        with ThreadPoolExecutor(workers, "", torch.set_num_threads, (1,)) as pool:
            for item in items:
                results.append(pool.submit(work, item))
                if len(results) > workers:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
    finally:
        torch.set_num_threads(threads)  # of threads that begin after this


def share_equal(layers: Mapping[str, LoRALayer], merged: dict[str, Tensor]) -> None:
    """Gives layers that shared a weight, and whose W + ΔW are equal, one tensor again."""
    made: dict[int, list[str]] = {}
    for name in merged:
        others = made.setdefault(id(layers[name].original_layer.weight), [])
        equal = [other for other in others if torch.equal(merged[other], merged[name])]
        if equal:
            merged[name] = merged[equal[0]]
        others.append(name)


@torch.no_grad()
def add_update(
    layer: LoRALayer,
    dtype: torch.dtype | None = None,
    stored: tuple[str, Rounding] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """W + ΔW, added in float32 (float64 if W is) and rounded once; and what becomes of ΔW.

    It is one pass over some rows at a time, which stay in the processor's cache; sums are float64.

    Args:
        layer: with a ΔW.
        dtype: of the sum; by default W's own.
        stored: what a file will make of the numbers, under a name; by default they are rounded to
            the dtype.

    Returns:
        The sum; and the size of ΔW, the largest error of a weight, the part of the change that is
        kept, and the share of the weights that are other numbers than without ΔW.
    """
    weight = layer.original_layer.weight
    dtype = dtype or weight.dtype
    kind, rounded = stored or (str(dtype).removeprefix("torch."), partial(round_to, dtype=dtype))
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    as_it_is = stored is None and dtype == weight.dtype
    errors, sums = [], []
    for rows, base, delta in _chunks(layer):
        exact = base + delta
        merged[rows] = exact
        after = rounded(exact) if stored else merged[rows].to(exact.dtype)
        before = base if as_it_is else rounded(base)
        errors.append(torch.stack(torch.aminmax(after - exact)))
        changed, lost = torch.count_nonzero(after != before), _squares(after - before - delta)
        sums.append(torch.stack((_squares(base), _squares(delta), lost, changed)))
    size, energy, lost, changed = torch.stack(sums).sum(0)
    return merged, {
        "dtype": kind,
        "ΔW / W": _ratio(energy, size),
        "largest error": float(torch.stack(errors).abs().max()),
        "change kept": _kept(lost, energy),
        "weights changed": float(changed) / weight.numel(),
    }


def _chunks(layer: LoRALayer) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows of a layer at a time: which, W in the dtype that it is added in, and ΔW."""
    weight = layer.original_layer.weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    n_rows = max(1, CHUNK * len(weight) // weight.numel())
    for i, delta in enumerate(_delta_chunks(layer, n_rows)):
        rows = slice(i * n_rows, (i + 1) * n_rows)
        yield rows, weight[rows].to(wide), delta


def _delta_chunks(layer: LoRALayer, n_rows: int) -> Iterator[Tensor]:
    """ΔW in the weight's layout, some rows at a time; in one piece unless all updates are plain."""
    weights = layer.active.weights if isinstance(layer.active, WeightedAdapters) else {}
    updates: list[tuple[Any, float]] = [
        (layer.updates[name], weight) for name, weight in weights.items() if name in layer.updates
    ]
    if not updates or any(type(u) not in (LoRAUpdate, TiedEmbeddingUpdate) for u, _ in updates):
        yield from layer.delta_weight().split(n_rows)
        return
    for start in range(0, len(layer.original_layer.weight), n_rows):
        rows = slice(start, start + n_rows)
        products = ((u.lora_B[rows].float() @ u.lora_A.float(), u, w) for u, w in updates)
        scaled = ((p.mul_(u.scaling), w) for p, u, w in products)
        yield reduce(torch.add, (p if w == 1 else p.mul_(w) for p, w in scaled))


def _squares(numbers: Tensor) -> Tensor:
    """The sum of the squares, added in float64."""
    flat = numbers.double().flatten()
    return flat @ flat


def _ratio(energy: Tensor, of: Tensor) -> float:
    """Of two sums of squares, the ratio of the roots."""
    return float(energy.sqrt() / of.sqrt().clamp_min(1e-30))


def _kept(lost: Tensor, energy: Tensor) -> float:
    """1 − ‖arrived − ΔW‖² / ‖ΔW‖², at least 0: 1 if the change arrives whole, 0 if it drowns."""
    return float((1 - lost / energy).clamp(0, 1)) if energy else 1.0


def logits_of(model: nn.Module, probe: Probe) -> Tensor:
    """The probe's logits, float32, without gradient and in eval mode.

    Raises:
        SurgeryError: ids are of another shape or not in the vocabulary that the config names.
    """
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(probe, Tensor) and isinstance(vocab_size, int):
        probe = check_ids(probe, vocab_size)
    with eval_mode(model), torch.no_grad():
        out: Any = probe() if callable(probe) else model(probe)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits.float()


def compare_logits(before: Tensor, after: Tensor) -> dict[str, float]:
    """How far two sets of logits (…, V) are apart.

    The largest and the mean difference, the mean KL divergence from the first distribution to the
    second in nats, and the share of positions with the same most likely token.
    """
    gap = (after - before).abs()
    return {
        "largest_error": float(gap.max()),
        "mean_error": float(gap.mean()),
        "kl": float(kl_divergence(before, after)),
        "top_token_unchanged": float((before.argmax(-1) == after.argmax(-1)).double().mean()),
    }


def check_effect(effect: Mapping[str, float], tolerance: float) -> None:
    """Raises `SurgeryError` if a KL divergence exceeds the tolerance, or is not a number."""
    if not effect["kl"] <= tolerance:
        raise SurgeryError(
            f"the merged model is not the adapted one: its distribution is {effect['kl']:.3g} nats "
            f"a token away (tolerance {tolerance:g}), the largest logit error "
            f"{effect['largest_error']:.3g}, the top token unchanged at "
            f"{effect['top_token_unchanged']:.1%} of positions",
            "merge into float32 weights, raise the tolerance, or force=True",
        )


def check_weights(
    rows: list[dict[str, Any]],
    layers: Mapping[str, LoRALayer],
    what: str = "the merge",
    wider: str = "merge into float32 weights, or force=True",
) -> None:
    """Raises `SurgeryError` if a merge with these rows makes NaN or infinities, or changes nothing.

    Args:
        rows: from `add_update`, with the name of each layer.
        layers: what is merged.
        what: the merge's name.
        wider: what to do where ΔW does not fit into the dtype: too small or too large for it.
    """
    trained = "train the adapter first, or force=True"
    whole = {name: layer.shown for name, layer in layers.items() if layer.replaces_whole}
    wrong = [row for row in rows if not math.isfinite(row["largest error"])]
    narrow = any(row["dtype"] in FLOAT16 for row in wrong)
    names = [row["layer"] for row in wrong] + [
        name
        for name, copy in whole.items()
        if not all(p.isfinite().all() for p in copy.parameters())
    ]
    if names:
        raise SurgeryError(
            f"{what} would make weights that are NaN or infinite in {len(names)} layers "
            f"({', '.join(names[:8])})"
            + ("; float16 ends at 65,504, bfloat16 and float32 go on" if narrow else ""),
            wider if narrow else trained,
        )
    if whole or any(row["weights changed"] for row in rows):  # a copy is a change, without a ΔW
        return
    if any(merged_bias(layer) is not None for layer in with_delta(layers).values()):
        return
    lost = any(row["ΔW / W"] for row in rows)
    dtypes = " and ".join(sorted({str(row["dtype"]) for row in rows}))
    raise SurgeryError(
        f"{what} would change no weight: ΔW is "
        + (f"lost in the rounding to {dtypes}" if lost else "0")
        + f" in all {len(rows)} layers",
        wider if lost else trained,
    )


@check_arguments
def merge_survival(model: nn.Module) -> Report:
    """The part of the change that each layer keeps after rounding to lower precisions.

    What arrives is round(W + ΔW) − round(W): an adapter whose changes are smaller than the steps of
    the numbers is gone after a merge, whatever it had learned.

    Raises:
        SurgeryError: the model carries no LoRA.
    """
    layers = with_delta(lora_layers(model))
    found = zip(layers, in_turn(survival, layers.values()), strict=True)
    rows: list[dict[str, Any]] = [{"layer": name, **kept} for name, kept in found]
    lowest = {f"lowest_{name}": min(row[name] for row in rows) for name in ROUNDINGS if rows}
    return Report("part of the change kept after rounding", rows, {"layers": len(rows), **lowest})


@torch.no_grad()
def survival(layer: LoRALayer) -> dict[str, float]:
    """The size of ΔW, and the part of the change that each rounding keeps."""
    sums = []
    for _, base, delta in _chunks(layer):
        exact = base + delta
        arrived = [rounded(exact) - rounded(base) for rounded in ROUNDINGS.values()]
        lost = [_squares(part - delta) for part in arrived]
        sums.append(torch.stack((_squares(base), _squares(delta), *lost)))
    size, energy, *losses = torch.stack(sums).sum(0)
    kept = {name: _kept(lost, energy) for name, lost in zip(ROUNDINGS, losses, strict=True)}
    return {"ΔW / W": _ratio(energy, size), **kept}


def round_to(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """To a dtype and back."""
    return weight.to(dtype).to(weight.dtype)


def round_int8(weight: Tensor) -> Tensor:
    """(out, in) to 255 levels a row, symmetric around 0, and back."""
    step = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (weight / step).round() * step


def round_int4(weight: Tensor) -> Tensor:
    """(out, in) to 15 levels a block of 32 weights in a row, symmetric around 0, and back."""
    padding = -weight.size(1) % BLOCK
    blocks = F.pad(weight, (0, padding)).unflatten(1, (-1, BLOCK))  # (out, blocks, 32)
    step = blocks.abs().amax(2, keepdim=True).clamp_min(1e-30) / 7
    rounded: Tensor = (blocks / step).round() * step
    return rounded.flatten(1)[:, : weight.size(1)]


ROUNDINGS: dict[str, Rounding] = {
    "bfloat16": partial(round_to, dtype=torch.bfloat16),
    "float16": partial(round_to, dtype=torch.float16),
    "int8": round_int8,
    "int4": round_int4,
}
