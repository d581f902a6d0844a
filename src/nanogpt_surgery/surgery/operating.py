"""How every operation is done: worked out, then planned, or done, checked and measured.

To plan is to work out all that would be made, and to put nothing in place; so a plan's rows are
those of the operation, and the time that it took is most of what it foresees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.model_history import operation, tensor_hash
from nanogpt_surgery.interpret.recording import checked_ids
from nanogpt_surgery.lora.merging import Probe, compare_logits, logits_of, merge_lora
from nanogpt_surgery.lora.stored_adapter import StoredAdapter, attach_adapter
from nanogpt_surgery.memory import available_memory
from nanogpt_surgery.model.loss import cross_entropy
from nanogpt_surgery.model.precision import computing_in_float32
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report

FLOAT32 = 4  # bytes
HASHED_TO_SEE = 1 << 20  # numbers
COMPARING = 40  # bytes for each logit of a probe, while two sets of them are compared in float64


@dataclass(frozen=True)
class Prepared:
    """An operation that is worked out and not yet done."""

    title: str
    rows: list[dict[str, Any]]
    """of the report"""
    change: Callable[[], object]
    """puts what was made in its place"""
    summary: dict[str, Any] = field(default_factory=dict)
    made_bytes: int = 0
    """of what was made"""
    at_work_bytes: int = 0
    """for a while beside it, at most"""


def carry_out(
    model: nn.Module,
    prepare: Callable[[], Prepared],
    probe: Probe | None,
    plan: bool,
    before: Callable[[], Tensor | None] | None = None,
    check: Callable[[Tensor | None, Tensor | None], None] | None = None,
) -> Report:
    """Works an operation out, and does it unless it is to be planned.

    Args:
        model: changed in place, in one step of its journal.
        prepare: works it out.
        probe: ids (B, T), or a function that gives logits.
        plan: do nothing more.
        before: gives the logits that those afterwards are compared with; the model's by default.
        check: of the logits before and after.

    Raises:
        SurgeryError: as `prepare` and `check`, or the probe fails. The model is untouched then.
    """
    start = time.perf_counter()
    ready = prepare()
    worked = time.perf_counter()
    first = measured(model, probe) if before is None else before()
    if plan:
        seconds = worked - start + 2 * (time.perf_counter() - worked)
        return planned(model, ready, seconds, 0 if first is None else first.numel())
    with operation(model, ready.title):
        ready.change()
        after = measured(model, probe)
        if check is not None:
            check(first, after)
        effect = effect_on_logits(first, after, probe)
    return Report(ready.title, ready.rows, ready.summary | effect)


def planned(model: nn.Module, ready: Prepared, seconds: float, logits: int) -> Report:
    """Returns the report of an operation that is worked out and not done.

    Args:
        model: untouched.
        ready: the operation.
        seconds: that working it out took, and measuring it will.
        logits: how many are compared.
    """
    size = ready.made_bytes + max(ready.at_work_bytes, COMPARING * logits)
    foreseen = costs(model, size, seconds + hash_seconds(model))
    return Report(f"planned: {ready.title}", ready.rows, ready.summary | foreseen)


def with_adapter(
    model: nn.Module,
    name: str,
    title: str,
    adapter: StoredAdapter,
    rows: list[dict[str, Any]],
    more: Mapping[str, Any] | None = None,
    merge: bool = False,
) -> Prepared:
    """Returns the operation that puts an adapter on a model, where it takes part alone.

    Args:
        model: to be changed.
        name: of the adapter.
        title: of the operation.
        adapter: that was made.
        rows: for each layer that it changes.
        more: for the summary.
        merge: it into the weights, in the same step.
    """

    def change() -> None:
        attach_adapter(model, adapter, name)
        if merge:
            merge_lora(model)

    numbers = sum(u.A.numel() + u.B.numel() for u in adapter.updates.values())
    numbers += sum(u.bias.numel() for u in adapter.updates.values() if u.bias is not None)
    numbers += sum(tensor.numel() for tensor in adapter.whole.values())
    errors = [row["error"] for row in rows if row.get("error") is not None]
    summary = {
        "layers": len(adapter.updates),
        "adapter_parameters": numbers,
        "adapter_bytes": FLOAT32 * numbers,
        **({"largest_layer_error": max(errors)} if errors else {}),
        **(more or {}),
    }
    products = [u.B.size(0) * u.A.size(1) for u in adapter.updates.values()]
    return Prepared(
        title,
        rows,
        change,
        summary,
        2 * FLOAT32 * numbers,  # a copy becomes the model's
        4 * FLOAT32 * max(products, default=0),
    )


def costs(model: nn.Module, more_bytes: int, seconds: float) -> dict[str, Any]:
    """Returns what an operation takes, for a summary.

    Args:
        model: that is operated on, open.
        more_bytes: of memory, beside the model.
        seconds: of all of it.
    """
    memory = {"memory_bytes": sum(t.nbytes for t in _tensors(model)) + more_bytes}
    available = available_memory()
    room = {} if available is None else {"available_bytes": available}
    return memory | room | {"seconds": seconds}


def hash_seconds(model: nn.Module) -> float:
    """Returns about how long it takes to hash every tensor, which an undo asks for."""
    tensors = _tensors(model)
    some = max(tensors, key=lambda t: t.nbytes).detach().flatten()[:HASHED_TO_SEE]
    start = time.perf_counter()
    tensor_hash(some)
    rate = some.nbytes / max(time.perf_counter() - start, 1e-9)
    total = sum(t.nbytes for t in tensors)
    shared = total / min(torch.get_num_threads(), len(tensors))
    return max(shared, max(t.nbytes for t in tensors)) / rate


def _tensors(model: nn.Module) -> list[Tensor]:
    """Returns each tensor of a model once."""
    return [*model.parameters(), *model.buffers()]


def pass_seconds(model: nn.Module, ids: Tensor, tokens: int) -> float:
    """Returns about how long passes over so many tokens take, measured on ids (B, T)."""
    for _ in range(2):  # the first one may read the weights from a disk
        start = time.perf_counter()
        measured(model, ids.to(next(model.parameters()).device))
    return tokens / ids.numel() * (time.perf_counter() - start)


def random_ids(model: SimpleGPT) -> Tensor:
    """Returns ids (2, T) to compute something on, always the same."""
    draw = torch.Generator().manual_seed(0)
    length = min(16, model.config.block_size)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=draw)
    return ids.to(next(model.parameters()).device)


def measured(model: nn.Module, probe: Probe | None) -> Tensor | None:
    """Returns the probe's logits, if there is a probe; those of ids are computed in float32."""
    if not isinstance(probe, Tensor):
        return None if probe is None else logits_of(model, probe)
    ids = checked_ids(model, probe) if isinstance(model, SimpleGPT) else probe
    with computing_in_float32(model):
        return logits_of(model, ids)


def check_same_bits(before: Tensor | None, after: Tensor | None) -> None:
    """Raises `SurgeryError` unless all logits are the same to the bit."""
    if before is None or after is None or torch.equal(before, after):
        return
    differing = int((before != after).sum())
    raise SurgeryError(
        f"{differing:,} of {before.numel():,} logits are not the same to the bit as before, the "
        f"largest difference is {float((before - after).abs().max()):.3g}"
    )


def effect_on_logits(
    before: Tensor | None, after: Tensor | None, probe: Probe | None
) -> dict[str, float]:
    """Returns how far two sets of logits are apart; with ids, the loss of each, too."""
    if before is None or after is None:
        return {}
    losses = {}
    if isinstance(probe, Tensor) and probe.size(1) > 1:
        losses = {"loss_before": next_loss(before, probe), "loss_after": next_loss(after, probe)}
    return compare_logits(before, after) | losses


def next_loss(logits: Tensor, ids: Tensor) -> float:
    """Returns the cross-entropy of each next id, by logits (B, T, V) after ids (B, T)."""
    return float(cross_entropy(logits[:, :-1], ids[:, 1:].to(logits.device)))
