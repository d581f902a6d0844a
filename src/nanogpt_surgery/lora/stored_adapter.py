"""An adapter away from any model, as it lies in a file: extracted from a model, attached to one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError, listed, nearest, quoted
from nanogpt_surgery.history.model_history import operation, plain_name
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.embedding import LoRAEmbeddingUpdate
from nanogpt_surgery.lora.inject import attach_updates
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.lora.several import (
    active_adapters,
    adapter_names,
    check_name,
    lora_layers,
    report_on,
)
from nanogpt_surgery.lora.targets import (
    adaptable_layers,
    find_tied,
    output_layer,
    tied_to,
    unsupported_reason,
)
from nanogpt_surgery.lora.variants import (
    BiasUpdate,
    DoRAUpdate,
    PiSSAUpdate,
    WholeUpdate,
    check_row_norms,
)
from nanogpt_surgery.report import Report

MOST_SHOWN = 12  # of what does not fit

RankAndAlpha: TypeAlias = tuple[int, float]
FusedParts: TypeAlias = tuple[tuple[int, float, RankAndAlpha | None] | None, ...]


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = s · B A for one layer, s = alpha / R, or alpha / √R with rsLoRA; all tensors float32.

    Attributes:
        A: (R, in).
        B: (out, R).
        alpha: the numerator of the scale.
        rslora: the scale's denominator is √R.
        magnitude: DoRA's length for each output, (out), or None.
        bias: added to B A x, and scaled as it is, (out), or None.
        embedding: the layer is an Embedding; its in are ids.
        dropout: on the input, in training.
        initial: PiSSA: how many of the last rows of A and columns of B are the initial update,
            negated, and alpha without them. A reader that does not know it loses nothing but the
            knowledge of what was trained.
        fused_parts: for a fused matrix, rank, alpha and initial of the updates it was
            put together from (None where there was none).
    """

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None
    embedding: bool = False
    dropout: float = 0.0
    initial: RankAndAlpha | None = None
    fused_parts: FusedParts | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.A.size(0)

    @property
    def scaling(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def finite(self) -> bool:
        """Whether each of its tensors is, in every number."""
        tensors = (self.A, self.B, self.magnitude, self.bias)
        return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)

    def adds_bias(self) -> bool:
        """Whether it adds anything to the bias: PEFT writes zeros where it does not."""
        return self.bias is not None and bool(self.bias.any())

    @property
    def delta_weight(self) -> Tensor:
        """The product s · B A, (out, in), float32: ΔW, but for DoRA, which needs the base."""
        return self.scaling * (self.B @ self.A)


def singular_values(updates: Sequence[LowRankUpdate]) -> Tensor:
    """Those of s · B A that can be other than zero, largest first; the product is never built.

    Args:
        updates: of one shape; of any floating-point dtype.

    Returns:
        (N, R) for N updates, float32; NaN for an update that is not finite.
    """
    scales = torch.tensor([abs(update.scaling) for update in updates])
    a = torch.stack([update.A.float().t() for update in updates])  # (N, in, R)
    b = torch.stack([update.B.float() for update in updates])  # (N, out, R)
    (_, r_a), (_, r_b) = torch.linalg.qr(a, mode="r"), torch.linalg.qr(b, mode="r")
    small = r_b @ r_a.mT  # (N, R, R)
    scales[~small.isfinite().all(2).all(1)] = torch.nan
    values: Tensor = torch.linalg.svdvals(small.nan_to_num(0, 0, 0))  # (N, R)
    return scales[:, None] * values


Updates: TypeAlias = dict[str, LowRankUpdate]


@dataclass(frozen=True)
class StoredAdapter:
    """The contents of an adapter folder.

    Attributes:
        updates: by the layer's name.
        whole: whole tensors that replace those of the base, by name (PEFT's modules_to_save).
        base_copies: copies of base tensors that PEFT wrote beside an embedding's update, by name.
        fingerprint: the sha256 of each adapted weight, by the layer's name; empty if unknown.
        tied: what was chosen for targets that share a weight; None if unknown.
    """

    updates: Updates
    whole: dict[str, Tensor] = field(default_factory=dict)
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    tied: str | None = None

    def in_float32(self) -> StoredAdapter:
        """A copy in float32: an adapter that was read is mapped, in the dtypes of its file."""

        def copied(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(torch.float32, copy=True)

        updates = {
            name: replace(
                u,
                A=copied(u.A),
                B=copied(u.B),
                magnitude=copied(u.magnitude),
                bias=copied(u.bias) if u.adds_bias() else None,
            )
            for name, u in self.updates.items()
        }
        whole = {name: copied(tensor) for name, tensor in self.whole.items()}
        copies = {name: copied(tensor) for name, tensor in self.base_copies.items()}
        return replace(self, updates=updates, whole=whole, base_copies=copies)

    def inside(self, module: str) -> StoredAdapter:
        """The same for a model that holds the other under this name."""
        return replace(
            self,
            updates={f"{module}.{name}": update for name, update in self.updates.items()},
            whole={f"{module}.{name}": tensor for name, tensor in self.whole.items()},
            base_copies={f"{module}.{name}": copy for name, copy in self.base_copies.items()},
        )


def alpha_for(scaling: float, rank: int, rslora: bool) -> float:
    """The alpha that makes this scale at this rank."""
    return scaling * (math.sqrt(rank) if rslora else rank)


def store(update: LoRAUpdate, layer: nn.Module, rslora: bool) -> LowRankUpdate:
    """A copy of an update as plain tensors; `rslora` says how its adapter writes scales."""
    plain: Any = update.inner if isinstance(update, DoRAUpdate | BiasUpdate) else update
    a, b = (_copy(factor) for factor in plain.factors())
    initial, alpha = None, update.alpha
    if not math.isclose(alpha_for(update.scaling, update.rank, rslora), alpha, rel_tol=1e-12):
        alpha = alpha_for(update.scaling, update.rank, rslora)  # not how this one was made
    if isinstance(plain, PiSSAUpdate):
        initial, alpha = (update.rank, alpha), alpha_for(update.scaling, a.size(0), rslora)
    return LowRankUpdate(
        a,
        b,
        alpha,
        rslora,
        magnitude=_copy(update.lora_magnitude) if isinstance(update, DoRAUpdate) else None,
        embedding=isinstance(layer, nn.Embedding),
        dropout=update.dropout.p,
        initial=initial,
        bias=_copy(update.lora_bias) if isinstance(update, BiasUpdate) else None,
    )


def is_rslora(update: LoRAUpdate) -> bool:
    """Whether the scale is alpha / √R and not alpha / R, which at rank 1 is the same."""
    return update.rank > 1 and math.isclose(update.scaling, update.alpha / math.sqrt(update.rank))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone().contiguous()


def restore(stored: LowRankUpdate, layer: nn.Module) -> LoRAUpdate:
    """The update as it was stored, ready to take part in a layer and to be trained on."""
    weight: Any = layer.weight
    a, b = stored.A.to(weight.device), stored.B.to(weight.device)
    rank, alpha = stored.rank, stored.alpha
    if stored.initial is not None:
        initial_rank, alpha = stored.initial
        rank -= initial_rank
    kind: Any = LoRAEmbeddingUpdate if stored.embedding else LoRAUpdate
    update: LoRAUpdate = kind(layer, rank, alpha, stored.dropout)
    update.scaling = stored.scaling
    if stored.initial is not None:
        update.lora_A.data, update.lora_B.data = a[rank:].clone(), -b[:, rank:]
        update = PiSSAUpdate(update)
    update.lora_A.data, update.lora_B.data = a[:rank].clone(), b[:, :rank].clone()
    if stored.magnitude is not None:
        update = DoRAUpdate(update, layer)
        update.lora_magnitude.data = stored.magnitude.to(weight.device).clone()
    if stored.bias is not None:
        update = BiasUpdate(update, stored.bias.to(weight.device).clone())
    return update


def same(one: LowRankUpdate, other: LowRankUpdate) -> bool:
    """Whether two stored updates are the same to the bit, dropout aside."""
    factors, vectors = ((one.A, other.A), (one.B, other.B)), (one.magnitude, other.magnitude)
    biases = [update.bias if update.adds_bias() else None for update in (one, other)]
    pairs = [*factors, vectors, (biases[0], biases[1])]
    alike = [a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs]
    facts = [(u.scaling, u.embedding, u.initial, u.fused_parts) for u in (one, other)]
    return all(alike) and facts[0] == facts[1]


def chosen_adapter(model: nn.Module, name: str | None = None) -> str:
    """The adapter that is meant: the named one, the only one, or the one that takes part alone.

    Raises:
        SurgeryError: it is not clear which, there is none, or it is unnamed and takes part at
            another weight than 1, of which the adapter itself knows nothing.
    """
    lora_layers(model)
    if name is not None:
        return check_name(model, name)
    there, active = adapter_names(model), active_adapters(model)
    candidates = (there, active.names())
    chosen = next((names[0] for names in candidates if len(names) == 1 and names[0] in there), "")
    if not chosen:
        raise SurgeryError(
            f"which adapter? The model carries {', '.join(there)}",
            "give its name, or swap_lora first",
        )
    weights = active.weights if isinstance(active, WeightedAdapters) else {}
    if (weight := weights.get(chosen, 1)) != 1:
        raise SurgeryError(
            f"{chosen!r} takes part at {weight:g}, and an adapter's folder has no weight",
            f"swap_lora(model, {chosen!r}) to have all of it take part, or its name to save it as "
            "it is; merge_lora(model) puts the blend into the weights",
        )
    return chosen


def extract_adapter(model: nn.Module, name: str | None = None) -> StoredAdapter:
    """A copy of an adapter: updates, modules replaced whole, and the choice for tied weights.

    The updates all have rsLoRA's scale or none, since a file has room for one choice: it is
    rsLoRA's if any of the scales is.
    """
    name = chosen_adapter(model, name)
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.updates}
    updates: dict[str, Any] = {
        p: layer.updates[name] for p, layer in layers.items() if not layer.replaces_whole
    }
    rslora = any(is_rslora(update) for update in updates.values())
    whole = {
        f"{path}.{key}": _copy(tensor)
        for path, layer in layers.items()
        if layer.replaces_whole
        for key, tensor in layer.updates[name].get_submodule("module").state_dict().items()
    }
    if any(layer.unties for layer in layers.values()):
        tied: Tied | None = "untie"
    else:
        tied = "both" if any(tied_to(model, path) for path in updates) else None
    stored = {p: store(update, layers[p].original_layer, rslora) for p, update in updates.items()}
    return StoredAdapter(stored, whole, tied=tied)


def attach_adapter(
    model: nn.Module,
    adapter: StoredAdapter,
    name: str,
    tied: Tied | None = None,
    hashed: bool = True,
) -> Report:
    """Wraps the layers of a model and gives them the updates of an adapter, which then acts alone.

    Args:
        model: changed in place.
        adapter: with the model's own names; `check_fit` has let it pass.
        name: for the adapter; `check_new_name` has let it pass.
        tied: as in `inject_lora`; what the adapter says by default, or else "refuse".
        hashed: as in `operation`; without, its undo compares nothing.

    Raises:
        SurgeryError: a layer is tied, or DoRA meets a row without a length. The model is untouched
            then.
    """
    _check_dora(model, adapter.updates)
    choice: Any = tied or adapter.tied or "refuse"
    whole: dict[str, dict[str, Tensor]] = {}  # by the name of the module, then by the tensor's own
    for path, tensor in adapter.whole.items():
        module, _, key = path.rpartition(".")
        whole.setdefault(module, {})[key] = tensor
    find_tied(model, whole, "untie" if choice == "untie" else "refuse")
    tied_layers = _check_same_updates(adapter.updates, find_tied(model, adapter.updates, choice))
    others = {name for names in tied_layers.values() for name in names}
    factories: dict[str, Callable[[nn.Module], nn.Module]] = {
        path: partial(restore, update)
        for path, update in adapter.updates.items()
        if path not in others
    }
    factories |= {path: partial(WholeUpdate, tensors=tensors) for path, tensors in whole.items()}
    with operation(model, f"load {name}", hashed):
        attach_updates(model, name, factories, tied_layers, unties=choice == "untie")
    return report_on(model, "LoRA loaded")


def check_fit(
    model: nn.Module,
    adapter: StoredAdapter,
    hint: str,
    if_resized: str,
) -> None:
    """Raises `SurgeryError`, with the first dozen of what does not fit, if an adapter does not.

    Of updates and of modules replaced whole the sizes are looked at, and no number is read.

    Args:
        model: the base, bare or with other adapters.
        adapter: with the model's own names.
        hint: what to do with an adapter for another model.
        if_resized: what to do where the vocabularies differ in size alone.
    """
    found = list(islice(_misfits(model, adapter), MOST_SHOWN + 1))
    if found:
        shown = "; ".join(problem for problem, _ in found[:MOST_SHOWN])
        more = "; …" if found[MOST_SHOWN:] else ""
        resized = any(is_resized for _, is_resized in found)
        raise SurgeryError(
            f"this adapter is for another model: {shown}{more}",
            if_resized if resized else hint,
        )


def _misfits(model: nn.Module, adapter: StoredAdapter) -> Iterator[tuple[str, bool]]:
    """Each thing that does not fit, in words, and whether it would if merged in peft."""
    layers = adaptable_layers(model)
    for name, update in adapter.updates.items():
        kind = nn.Embedding if update.embedding else nn.Linear
        layer: Any = layers.get(name)
        if not isinstance(layer, kind):
            yield f"there is no {kind.__name__} {quoted(name)} ({_instead(model, name)})", False
            continue
        wanted = (update.B.size(0), update.A.size(1))
        wanted = wanted[::-1] if update.embedding else wanted
        if tuple(layer.weight.shape) != wanted:
            actual = tuple(layer.weight.shape)
            yield f"{name} is {actual} in the model and {wanted} in the adapter", False
        elif update.bias is not None and layer.bias is None and update.adds_bias():
            yield f"{name} has no bias, and the adapter changes it (lora_bias)", False
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in adapter.whole.items():
        if name not in state or state[name].shape != tensor.shape:
            resized = _resized(model, name.rpartition(".")[0], tensor)
            shape = tuple(tensor.shape)
            yield resized or f"there is no tensor {listed([name])} of shape {shape}", bool(resized)
    for name, copy in adapter.base_copies.items():
        base = state.get(f"{name}.weight")
        alike = base if base is not None and base.shape == copy.shape else None
        if alike is None or not torch.equal(alike.float().cpu(), copy.float()):
            differs = f"the adapter brings its own {listed([name])}, which differs from the model's"
            yield _resized(model, name, copy) or differs, True


def _resized(model: nn.Module, name: str, weight: Tensor) -> str | None:
    """The words for an embedding's or the output layer's weight that has rows for other ids."""
    layer: Any = adaptable_layers(model).get(name)
    is_vocabulary = isinstance(layer, nn.Embedding) or (layer and name == output_layer(model))
    if not is_vocabulary or layer.weight.shape[1:] != weight.shape[1:]:
        return None
    before, now = len(layer.weight), len(weight)
    return None if before == now else f"the vocabulary was resized from {before} to {now} ({name})"


def _instead(model: nn.Module, name: str) -> str:
    """The reason why no layer can be wrapped at a name, or else the nearest names that can."""
    if name not in dict(model.named_modules()):
        return f"nearest: {nearest(name[:200], adaptable_layers(model))}"
    reason = unsupported_reason(model, name) or "a layer of the other kind"
    if "Conv1D" in reason:
        reason += "; a GPT-2 opened with open_model has Linears"
    return f"it is {reason}"


def _check_dora(model: nn.Module, updates: Updates) -> None:
    """Raises `SurgeryError` where DoRA meets a row of W + ΔW without a length."""
    layers: dict[str, Any] = adaptable_layers(model)
    for path, update in updates.items():
        if update.magnitude is not None:
            change = update.delta_weight.to(layers[path].weight.device)
            hint = "take another base, whose rows are not zero, or another adapter, without DoRA"
            check_row_norms(path, layers[path], change, hint)


def _check_same_updates(
    updates: Updates, tied_layers: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The tied layers that get one update, if the adapter has the same ΔW for all of them."""
    found: dict[str, list[str]] = {}
    for name, others in tied_layers.items():
        if updates[name].embedding:
            continue
        wrong = [
            o for o in others if o not in updates or not _is_same_change(updates[name], updates[o])
        ]
        if wrong:
            raise SurgeryError(
                f"{name} shares its weight with {', '.join(wrong)}, and the adapter changes them "
                "differently",
                "tied='untie'",
            )
        found[name] = others
    return found


def _is_same_change(head: LowRankUpdate, other: LowRankUpdate) -> bool:
    if not other.embedding:
        return torch.equal(head.A, other.A) and torch.equal(head.B, other.B)
    return torch.equal(head.A, other.B.t()) and torch.equal(head.B, other.A.t())
