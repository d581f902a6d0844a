"""The history of a model in memory: operations on it, undo and redo to the bit.

No operation writes into a tensor: each puts modules in the places of others, changes an attribute
that a module's class lists in `journaled`, or changes which parameters can be trained. The journal
keeps those differences, and with them the very objects that were there; taking back is putting them
in their places again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, listed
from nanogpt_surgery.history.journal import Journal, Operation, report_turn
from nanogpt_surgery.report import Report

UPDATES = ".updates."


@check_arguments
def tensor_hashes(model: nn.Module, seen: dict[Tensor, str] | None = None) -> dict[str, str]:
    """The sha256 of every parameter and buffer, by name; a wrapped layer keeps its plain name.

    A tensor that several layers share appears under each of their names.

    Args:
        model: any module.
        seen: hashes of tensors that nothing can have written to since, which are not hashed again;
            the new ones are added. A tensor's version counter would not do: writing to `.data`, or
            to an array that shares its memory, leaves it as it was.
    """
    seen = {} if seen is None else seen
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    new = list({id(tensor): tensor for tensor in named.values() if tensor not in seen}.values())
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        seen.update(zip(new, pool.map(tensor_hash, new), strict=True))
    return {plain_name(name): seen[tensor] for name, tensor in named.items()}


def plain_name(name: str) -> str:
    """A tensor's name as if its layer were not wrapped."""
    return f".{name}".replace(".original_layer.", ".")[1:]


def tensor_hash(tensor: Tensor) -> str:
    """The sha256 of a tensor's dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    array: Any = flat.numpy()
    digest.update(array)
    return digest.hexdigest()


def combined(hashes: Iterable[str]) -> str:
    """One hash for many, whatever their order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


HISTORY = "_surgery_history"  # the model's attribute
_TIE = "tie_word_embeddings"


@dataclass
class ModelOperation(Operation):
    """An operation: what it changed, and every tensor's hash before it.

    `around_undo` holds every tensor's hash just before and just after its undo, for the redo.
    """

    changes: list[Change]
    hashes: dict[str, str] | None
    around_undo: tuple[dict[str, str], dict[str, str]] | None = None

    def release(self) -> None:
        """Frees the originals."""
        self.changes.clear()

    def put(self, back: bool) -> None:
        """Takes the changes back, or makes them again."""
        for change in self.changes:
            change.put(back)


@dataclass
class History(Journal[ModelOperation]):
    """The operations on one model.

    Attributes:
        trainable_before: parameters that could be trained before the first adapter came.
        closed: why no operation may be done just now.
        begun: whether one is being done: what is done within it is a part of it.
    """

    trainable_before: tuple[nn.Parameter, ...] | None = None
    closed: SurgeryError | None = None
    begun: bool = False

    def check_open(self) -> None:
        """Raises `SurgeryError` where no operation may be done just now."""
        if self.closed is not None:
            raise self.closed


def history_of(model: nn.Module) -> History:
    """The model's history, begun if it has none."""
    return model.__dict__.setdefault(HISTORY, History())


def get_tie_word_embeddings(model: nn.Module) -> bool | None:
    """The config's `tie_word_embeddings`, None if it has none."""
    return getattr(getattr(model, "config", None), _TIE, None)


@dataclass(frozen=True)
class Change:
    """A place and what was in it before and after: a child of a module, or an attribute."""

    owner: Any
    name: str
    child: bool
    before: Any
    after: Any = None

    def now(self) -> Any:
        """Returns what is there, None if nothing."""
        return _there(self.owner, self.name, self.child)

    def put(self, back: bool) -> None:
        """Puts there what was there before, if `back`, or after; None takes a child away."""
        value = self.before if back else self.after
        if not self.child:
            setattr(self.owner, self.name, value)
        elif value is None:
            del self.owner._modules[self.name]
        else:
            self.owner._modules[self.name] = value


def _there(owner: Any, name: str, child: bool) -> Any:
    return owner._modules.get(name) if child else getattr(owner, name)


@contextmanager
def operation(model: nn.Module, title: str, hashed: bool = True) -> Iterator[None]:
    """Journals what the block does to a model; if it raises, the model is as it was.

    Operations within the block are parts of this one: the journal has one line for all.

    Args:
        model: what is operated on.
        title: for the log.
        hashed: hash every tensor first. An operation that replaces no tensor does without.

    Raises:
        SurgeryError: no operation may be done just now.
    """
    history = history_of(model)
    history.check_open()
    before, is_part = _places(model), history.begun
    hashed = hashed and not is_part
    done = ModelOperation(title, [], tensor_hashes(model) if hashed else None)
    history.begun = True
    try:
        yield
    except BaseException:
        done.changes = _differences(before)
        done.put(back=True)
        raise
    finally:
        history.begun = is_part
    if not is_part:
        done.changes = _differences(before)
        history.add(done)


def _places(model: nn.Module) -> dict[tuple[int, str], Change]:
    """Every place of a model that an operation may change, as it is now."""
    names: list[tuple[Any, str, bool]] = [(history_of(model), "trainable_before", False)]
    if get_tie_word_embeddings(model) is not None:
        names.append((model.config, _TIE, False))
    for module in model.modules():
        names += [(module, name, True) for name in module._modules]
        names += [(module, name, False) for name in getattr(type(module), "journaled", ())]
    names += [(parameter, "requires_grad", False) for parameter in model.parameters()]
    return {
        (id(owner), name): Change(owner, name, child, _there(owner, name, child))
        for owner, name, child in names
    }


def _differences(before: dict[tuple[int, str], Change]) -> list[Change]:
    """The places that differ now.

    Owners that were not there before are new: their contents come and go with them. Those that are
    no longer in the model are looked at too, since they come back with what was put into them.
    """
    owners = {id(c.owner): c.owner for c in before.values()}
    changed = [replace(c, after=c.now()) for c in before.values() if c.now() is not c.before]
    added = [
        Change(owner, name, child=True, before=None, after=child)
        for owner in owners.values()
        if isinstance(owner, nn.Module)
        for name, child in owner._modules.items()
        if (id(owner), name) not in before
    ]
    return changed + added


@check_arguments
def undo_lora(model: nn.Module) -> Report:
    """Takes the last operation back, and compares the hash of every tensor with that before it.

    What an adapter has learned is not taken back: operations are undone, training is not.

    Raises:
        SurgeryError: there is nothing to undo, or a frozen tensor is not what it was before the
            operation (all of them named; the model stays as it is then).
    """
    return _turn(model, back=True)


@check_arguments
def redo_lora(model: nn.Module) -> Report:
    """Makes the operation again that was undone last, and compares with the hashes after it.

    Raises:
        SurgeryError: there is nothing to redo, or a frozen tensor is not what the undo left, or
            would not be what it took away (all of them named; the model stays as it is then).
    """
    return _turn(model, back=False)


@check_arguments
def lora_log(model: nn.Module) -> Report:
    """The operations done to a model, the oldest first."""
    return history_of(model).log("operations", lambda done: {"operation": done.operation})


def _turn(model: nn.Module, back: bool) -> Report:
    history = history_of(model)
    history.check_open()
    done = history.last(back, "the model")
    _check_untouched(done, back)
    seen: dict[Tensor, str] = {}
    before = tensor_hashes(model, seen)
    wanted, left = (done.hashes, None) if back else done.around_undo or (None, None)
    _check_written(done, back, left or {}, before)
    device = next(model.parameters()).device
    replaced = [change.now() for change in done.changes]
    done.put(back)
    try:
        after = tensor_hashes(model, seen)
        wanted = wanted or {name: h for name, h in before.items() if name in after}
        _check_written(done, back, wanted, after)
    except BaseException:
        done.put(not back)
        raise
    _adjust(done.changes, replaced, device)
    done.around_undo = (before, after) if back else None
    history.turn(back)
    side = "before" if back else "after"
    trained = [n for n in wanted if UPDATES in n and after.get(n) not in (None, wanted[n])]
    summary = {
        "tensors": len(after),
        "sha256_of_all": combined(after.values()),
        f"as_{side}_the_operation": sum(after.get(n) == h for n, h in wanted.items()),
        "trained_since": len(trained),
        f"not_there_{side}_the_operation": len(after.keys() - wanted.keys()),
    }
    return report_turn(done, back, "tensor", before, after, summary)


def _adjust(changes: list[Change], replaced: list[Any], device: torch.device) -> None:
    """Moves modules that came back to the model's device, in the mode of those they replace."""
    for change, other in zip(changes, replaced, strict=True):
        module = change.now()
        if change.child and module is not None:  # where nothing was, its owner has the mode
            mode = (change.owner if other is None else other).training
            module.to(device).train(mode)


def _check_untouched(done: ModelOperation, back: bool) -> None:
    wrong = [
        f"{type(change.owner).__name__}.{change.name}"
        for change in done.changes
        if change.child and change.now() is not (change.after if back else change.before)
    ]
    if wrong:
        raise SurgeryError(
            f"the model's modules were changed by other hands since '{done.operation}': "
            + listed(wrong)
        )


def _check_written(
    done: ModelOperation, back: bool, wanted: dict[str, str], now: dict[str, str]
) -> None:
    """Raises `SurgeryError` if tensors are not what they should be, those of adapters apart."""
    written = [name for name in wanted if UPDATES not in name and now.get(name) != wanted[name]]
    if written:
        raise SurgeryError(
            f"'{done.operation}' cannot be {'undone' if back else 'redone'} to the bit: "
            f"{len(written)} frozen tensors were written to since ({listed(written)})",
            "open the model again" if back else "call the operation itself again",
        )
