"""Several adapters on one model: one alone, a weighted sum, or another one for each row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.journal import history_of, operation
from nanogpt_surgery.lora.layer import active_mixture, lora_layers
from nanogpt_surgery.lora.mixture import Blend, Mixture, Rows
from nanogpt_surgery.lora.operations import check_name
from nanogpt_surgery.lora.rows import watched
from nanogpt_surgery.lora.wrapping import let_train, report_on, set_mixture
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import WEIGHT, raise_all, wrong_values


def swap_lora(model: nn.Module, name: str) -> Report:
    """Let one adapter take part alone; it, and no other, can be trained.

    Raises:
        SurgeryError: the model carries no adapter of this name.
    """
    return _mix(model, f"swap to {name}", Blend({check_name(model, name): 1.0}))


def blend_lora(model: nn.Module, weights: Mapping[str, float]) -> Report:
    """Let several adapters take part, as Σ wᵢ ΔWᵢ.

    Raises:
        SurgeryError: the model carries no adapter of one of the names, or a weight is no number
            (all of them at once).
    """
    if not isinstance(weights, Mapping):
        raise SurgeryError(
            f"{weights!r} stands where the weights of a blend belong",
            "a table by the adapters' names: blend_lora(model, {'poet': 0.7, 'clerk': 0.3})",
        )
    named = {f"the weight of {name!r}": weight for name, weight in weights.items()}
    raise_all("there is no such blend", wrong_values(WEIGHT, named))
    blend = Blend({check_name(model, name): float(weight) for name, weight in weights.items()})
    return _mix(model, f"blend {blend}", blend)


def _mix(model: nn.Module, title: str, mixture: Mixture) -> Report:
    lora_layers(model)
    with operation(model, title, hashed=False):
        set_mixture(model, mixture)
        let_train(model)
    return report_on(model, f"LoRA: {title}")


@contextmanager
def lora_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """For the block, give row b of every batch the adapter `names[b]`, or none where that is None.

    Not an operation, and none is done inside the block: what took part before takes part again
    after it. A layer that is not called on the batch, as `wpe(torch.arange(T))` is not, cannot be
    adapted by row.

    Args:
        model: carries the adapters.
        names: one for each row of the batches to come.

    Raises:
        SurgeryError: the model carries no adapter of one of the names, or the LoRA is disabled;
            from the model's forward, a batch or a layer's input that has not these rows.
    """
    history = history_of(model)
    history.check_open()
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise SurgeryError(
            f"the rows' adapters are {names!r}",
            "lora_rows(model, names) takes a name, or None, for each row of the batch",
        )
    rows = Rows(tuple(name if name is None else check_name(model, name) for name in names))
    layers = lora_layers(model)
    if not all(layer.enabled for layer in layers.values()):
        raise SurgeryError("the LoRA is disabled, so no row would be adapted", "enable_lora(model)")
    before = active_mixture(model)
    set_mixture(model, rows)
    history.closed = SurgeryError(
        "the model is in a block of lora_rows, which gives each row its own adapter",
        "leave the block first",
    )
    try:
        with watched(model, rows):
            yield
    finally:
        history.closed = None
        set_mixture(model, before)
