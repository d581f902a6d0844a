"""The journal of a model: every operation on it, so that it can be undone.

No operation writes into a tensor: each puts modules in the places of others, changes an attribute
that a module's class lists in `journaled`, or changes which parameters can be trained. The journal
keeps those differences, and with them the very objects that were there; taking back is putting them
in their places again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.hashing import tensor_hashes

HISTORY = "_surgery_history"  # the model's attribute
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
class History:
    """The operations on one model.

    Attributes:
        done: operations that can be undone, the oldest first.
        undone: operations that can be done again, the one undone last at the end.
        dropped: titles of operations that can no longer be undone.
        trainable_before: parameters that could be trained before the first adapter came.
        closed: why no operation may be done just now.
    """

    done: list[Entry] = field(default_factory=list)
    undone: list[Entry] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    trainable_before: tuple[nn.Parameter, ...] | None = None
    closed: SurgeryError | None = None

    def check_open(self) -> None:
        """Raises `SurgeryError` where no operation may be done just now."""
        if self.closed is not None:
            raise self.closed

    def drop_originals(self) -> None:
        """Drops everything that an undo would need, so that its memory is freed."""
        self.dropped += [entry.title for entry in self.done]
        self.done.clear()
        self.undone.clear()


def history_of(model: nn.Module) -> History:
    """The model's history, begun if it has none."""
    history: History = model.__dict__.setdefault(HISTORY, History())
    return history


def get_tie_word_embeddings(model: nn.Module) -> bool | None:
    """The config's `tie_word_embeddings`, None if it has none."""
    return getattr(getattr(model, "config", None), _TIE, None)


def set_tie_word_embeddings(model: nn.Module, tied: bool | None) -> None:
    """Sets the config's `tie_word_embeddings`, if it has one."""
    if get_tie_word_embeddings(model) is not None:
        setattr(model.config, _TIE, tied)


@dataclass(frozen=True)
class Place:
    """Something that an operation may change: a child of a module, or an attribute of an object."""

    owner: Any
    name: str
    child: bool = False

    def get(self) -> Any:
        """Returns what is there, None if nothing."""
        return self.owner._modules.get(self.name) if self.child else getattr(self.owner, self.name)

    def set(self, value: Any) -> None:
        """Puts something there; None takes a child away."""
        if not self.child:
            setattr(self.owner, self.name, value)
        elif value is None:
            del self.owner._modules[self.name]
        else:
            self.owner._modules[self.name] = value


@dataclass(frozen=True)
class Change:
    """One place and what was in it before and after."""

    place: Place
    before: Any
    after: Any


def put(changes: list[Change], back: bool) -> None:
    """Takes changes back, or makes them again."""
    for change in changes:
        change.place.set(change.before if back else change.after)


@contextmanager
def operation(model: nn.Module, title: str, hashed: bool = True) -> Iterator[None]:
    """Journals what the block does to a model; if it raises, the model is as it was.

    Args:
        model: what is operated on.
        title: for the log.
        hashed: hash every tensor first. An operation that replaces no tensor does without.

    Raises:
        SurgeryError: no operation may be done just now.
    """
    history = history_of(model)
    history.check_open()
    before = {key: (place, place.get()) for key, place in _places(model).items()}
    hashes = tensor_hashes(model) if hashed else None
    try:
        yield
    except BaseException:
        put(_differences(model, before), back=True)
        raise
    history.done.append(Entry(title, _differences(model, before), hashes))
    history.undone.clear()


def _places(model: nn.Module) -> dict[tuple[int, str], Place]:
    """Every place of a model that an operation may change."""
    found = [Place(history_of(model), "trainable_before")]
    if get_tie_word_embeddings(model) is not None:
        found.append(Place(model.config, _TIE))
    for module in model.modules():
        found += [Place(module, name, child=True) for name in module._modules]
        found += [Place(module, name) for name in getattr(type(module), "journaled", ())]
    found += [Place(parameter, "requires_grad") for parameter in model.parameters()]
    return {(id(place.owner), place.name): place for place in found}


def _differences(
    model: nn.Module, before: dict[tuple[int, str], tuple[Place, Any]]
) -> list[Change]:
    """Returns the places that differ, as they were before and as they are now.

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


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first tensor."""
    return next(model.parameters()).device
