"""What was done to a model, so that it can be taken back.

No operation writes into a tensor: each puts modules in the places of others, changes which adapters
take part, or which parameters can be trained. The journal keeps those differences, and with them
the very objects that were there; taking back is putting them in their places again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.hashing import tensor_hashes, written_to
from nanogpt_surgery.lora.layer import LoRALayer, check_in_rows

CHART = "_surgery_chart"
_TIE = "tie_word_embeddings"


@dataclass
class Entry:
    """One operation: its title, what it changed, and every tensor's hash before it.

    `undone` holds every tensor's hash just before and just after it was undone, for the redo.
    """

    title: str
    changes: list[Change]
    hashes: dict[str, str] | None
    undone: tuple[dict[str, str], dict[str, str]] | None = None


@dataclass
class Chart:
    """What is known of one model: its journal, and what to restore when the last adapter leaves."""

    done: list[Entry] = field(default_factory=list)
    undone: list[Entry] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    thaw: tuple[nn.Parameter, ...] | None = None
    merged: Merge | None = None


@dataclass(frozen=True)
class Merge:
    """The last merge: the layers it replaced, each with what came there, and what it used up.

    `hashes` are those of every tensor after it.
    """

    layers: tuple[tuple[str, nn.Module, nn.Module], ...]
    thaw: tuple[nn.Parameter, ...] | None
    tied: bool | None
    hashes: dict[str, str]

    def check(self, model: nn.Module) -> None:
        """Raise `SurgeryError` unless the model is what the merge left, later adapters apart."""
        changed = [name for name, _, now in self.layers if model.get_submodule(name) is not now]
        if changed:
            raise SurgeryError(
                f"{', '.join(changed[:8])} changed after the merge",
                "undo_lora goes back step by step",
            )
        changed = written_to(self.hashes, tensor_hashes(model))
        if changed:
            raise SurgeryError(
                f"the merge cannot be taken out: {len(changed)} tensors were trained, cast or "
                f"written to since ({', '.join(changed[:8])})",
                "open the original again, or keep the model merged",
            )


def says_tied(model: nn.Module) -> bool | None:
    """What a config says of the tie of head and embedding, None if it says nothing."""
    return getattr(getattr(model, "config", None), _TIE, None)


def say_tied(model: nn.Module, tied: bool | None) -> None:
    """Let a config that has a word on it say so."""
    if says_tied(model) is not None:
        setattr(model.config, _TIE, tied)


def chart_of(model: nn.Module) -> Chart:
    """The model's chart, begun if it has none."""
    chart: Chart | None = model.__dict__.get(CHART)
    if chart is None:
        chart = Chart()
        model.__dict__[CHART] = chart
    return chart


@dataclass(frozen=True)
class Change:
    """One place and what was in it before and after."""

    place: Place
    before: Any
    after: Any

    def put(self, back: bool) -> None:
        """Take the change back, or make it again."""
        self.place.set(self.before if back else self.after)


@dataclass(frozen=True)
class Place:
    """Something that an operation may change: a child of a module, or an attribute of an object."""

    owner: Any
    name: str
    child: bool = False

    def get(self) -> Any:
        """What is there, None if nothing."""
        return self.owner._modules.get(self.name) if self.child else getattr(self.owner, self.name)

    def set(self, value: Any) -> None:
        """Put something there; None takes a child away."""
        if not self.child:
            setattr(self.owner, self.name, value)
        elif value is None:
            del self.owner._modules[self.name]
        else:
            self.owner._modules[self.name] = value


def _places(model: nn.Module) -> dict[tuple[int, str], Place]:
    """Every place of a model that an operation may change."""
    chart = chart_of(model)
    found = [Place(chart, "thaw"), Place(chart, "merged")]
    if says_tied(model) is not None:
        found.append(Place(model.config, _TIE))
    for module in model.modules():
        found += [Place(module, name, child=True) for name in module._modules]
        if isinstance(module, LoRALayer):
            found += [Place(module, name) for name in ("mixture", "enabled", "unties")]
    found += [Place(parameter, "requires_grad") for parameter in model.parameters()]
    return {(id(place.owner), place.name): place for place in found}


@contextmanager
def operation(model: nn.Module, title: str, hashed: bool = True) -> Iterator[dict[Tensor, str]]:
    """Journal what the block does to a model; if it raises, the model is as it was.

    The block is given the hashes, by tensor.

    Args:
        model: what is operated on.
        title: for the log.
        hashed: hash every tensor first. An operation that replaces no tensor does without.

    Raises:
        SurgeryError: each row of a batch has its own adapter for now.
    """
    check_in_rows(model)
    chart = chart_of(model)
    before = {key: (place, place.get()) for key, place in _places(model).items()}
    seen: dict[Tensor, str] = {}
    hashes = tensor_hashes(model, seen) if hashed else None
    try:
        yield seen
    except BaseException:
        put(_differences(model, before), back=True)
        raise
    chart.done.append(Entry(title, _differences(model, before), hashes))
    chart.undone.clear()


def _differences(
    model: nn.Module, before: dict[tuple[int, str], tuple[Place, Any]]
) -> list[Change]:
    """What is elsewhere now, in the places of before and of now.

    Owners that were not there before are new: their contents come and go with them.
    """
    known = {key[0] for key in before}
    changes = [
        Change(place, value, place.get())
        for place, value in before.values()
        if place.get() is not value
    ]
    added = [
        Change(place, None, place.get())
        for key, place in _places(model).items()
        if key not in before and place.child and key[0] in known
    ]
    return changes + added


def put(changes: list[Change], back: bool) -> None:
    """Take changes back, or make them again."""
    for change in changes:
        change.put(back)


def rejoin(module: nn.Module, replaced: nn.Module, device: torch.device) -> None:
    """Bring a module that came back to the model's device, and to the mode of what it replaced."""
    module.to(device).train(replaced.training)


def forget(model: nn.Module) -> None:
    """Let go of everything the journal keeps, so that its memory is freed."""
    chart = chart_of(model)
    chart.forgotten += [entry.title for entry in chart.done]
    chart.done.clear()
    chart.undone.clear()
    chart.merged = None
