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

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.hashing import tensor_hashes
from nanogpt_surgery.lora.lora_layer import LoRALayer, device_of, refuse_in_rows

CHART = "_surgery_chart"
_TIE = "tie_word_embeddings"


@dataclass
class Entry:
    """One operation: its title, what it changed, and every tensor's hash before it."""

    title: str
    changes: list[Change]
    hashes: dict[str, str] | None


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
    """The last merge: the layers it replaced, each with what came there, and what it used up."""

    layers: tuple[tuple[str, nn.Module, nn.Module], ...]
    thaw: tuple[nn.Parameter, ...] | None
    tied: bool | None


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
def operation(model: nn.Module, title: str, hashed: bool = True) -> Iterator[None]:
    """Journal what the block does to a model; if it raises, the model is as it was.

    Args:
        model: what is operated on.
        title: for the log.
        hashed: hash every tensor first. An operation that replaces no tensor does without.

    Raises:
        SurgeryError: each row of a batch has its own adapter for now.
    """
    refuse_in_rows(model)
    chart = chart_of(model)
    before = {key: (place, place.get()) for key, place in _places(model).items()}
    hashes = tensor_hashes(model) if hashed else None
    try:
        yield
    except BaseException:
        _put(_differences(model, before), back=True)
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


def _put(changes: list[Change], back: bool) -> None:
    for change in changes:
        change.put(back)


def _put_among(model: nn.Module, changes: list[Change], back: bool) -> None:
    """Put modules where others are that the model was used with meanwhile; see `join`."""
    there = [change.place.get() if change.place.child else None for change in changes]
    _put(changes, back)
    for change, replaced in zip(changes, there, strict=True):
        module = change.place.get() if change.place.child else None
        if module is not None:  # where nothing was, its owner has the mode
            join(model, module, (change.place.owner if replaced is None else replaced).training)


def join(model: nn.Module, module: nn.Module, training: bool) -> None:
    """Bring a module that came back to the model's device, and to the mode of what it replaced."""
    module.to(device_of(model)).train(training)


def take_back(model: nn.Module) -> Entry:
    """Put everything as it was before the last operation.

    Raises:
        SurgeryError: there is none, or something else has changed those places since.
    """
    refuse_in_rows(model)
    chart = chart_of(model)
    if not chart.done:
        because = "; the originals were dropped by a merge" if chart.forgotten else ""
        raise SurgeryError(f"there is no operation to undo{because}")
    entry = chart.done[-1]
    _check_untouched(entry, "after")
    _put_among(model, entry.changes, back=True)
    chart.done.pop()
    chart.undone.append(entry)
    return entry


def do_again(model: nn.Module) -> Entry:
    """Make the operation again that was undone last.

    Raises:
        SurgeryError: there is none, or something else has changed those places since.
    """
    refuse_in_rows(model)
    chart = chart_of(model)
    if not chart.undone:
        raise SurgeryError("there is no operation to redo")
    entry = chart.undone[-1]
    _check_untouched(entry, "before")
    _put_among(model, entry.changes, back=False)
    chart.undone.pop()
    chart.done.append(entry)
    return entry


def _check_untouched(entry: Entry, expected: str) -> None:
    wrong = [
        f"{type(change.place.owner).__name__}.{change.place.name}"
        for change in entry.changes
        if change.place.child and change.place.get() is not getattr(change, expected)
    ]
    if wrong:
        raise SurgeryError(
            f"the model's modules were changed by other hands since '{entry.title}': "
            + ", ".join(wrong[:8])
        )


def forget(model: nn.Module) -> None:
    """Let go of everything the journal keeps, so that its memory is freed."""
    chart = chart_of(model)
    chart.forgotten += [entry.title for entry in chart.done]
    chart.done.clear()
    chart.undone.clear()
    chart.merged = None
