"""Taking operations back and making them again, with the proof that every bit is where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.hashing import UPDATES, combined, tensor_hashes, written_to
from nanogpt_surgery.history.journal import Entry, device_of, history_of, put
from nanogpt_surgery.report import Report

SHOWN = 12  # digits of a hash in a table


def undo_lora(model: nn.Module) -> Report:
    """Takes the last operation back, and compares the hash of every tensor with that before it.

    What an adapter has learned is not taken back: operations are undone, training is not.

    Raises:
        SurgeryError: there is nothing to undo, or a frozen tensor is not what it was before the
            operation (all of them named; the model stays as it is then).
    """
    seen: dict[Tensor, str] = {}
    before = tensor_hashes(model, seen)
    with _moved(model, back=True) as entry:
        after = tensor_hashes(model, seen)
        wanted = entry.hashes or {name: h for name, h in before.items() if name in after}
        _check_written(f"'{entry.title}' cannot be undone", wanted, after, "open the model again")
        entry.undone = before, after
    return _report(f"undone: {entry.title}", before, after, wanted, "before")


def redo_lora(model: nn.Module) -> Report:
    """Makes the operation again that was undone last, and compares with the hashes after it.

    Raises:
        SurgeryError: there is nothing to redo, or a frozen tensor is not what the undo left, or
            would not be what it took away (all of them named; the model stays as it is then).
    """
    seen: dict[Tensor, str] = {}
    before = tensor_hashes(model, seen)
    with _moved(model, back=False) as entry:
        after = tensor_hashes(model, seen)
        assert entry.undone, "no other way leads here"
        wanted, left = entry.undone
        title, hint = f"'{entry.title}' cannot be redone", "call the operation itself again"
        _check_written(title, left, before, hint)
        _check_written(title, wanted, after, hint)
        entry.undone = None
    return _report(f"done again: {entry.title}", before, after, wanted, "after")


def _check_written(title: str, wanted: dict[str, str], now: dict[str, str], hint: str) -> None:
    changed = written_to(wanted, now)
    if changed:
        raise SurgeryError(
            f"{title} to the bit: {len(changed)} frozen tensors were written to since "
            f"({', '.join(changed[:8])})",
            hint,
        )


@contextmanager
def _moved(model: nn.Module, back: bool) -> Iterator[Entry]:
    """Takes the last operation back, or makes it again; if the block raises, nothing moved.

    Raises:
        SurgeryError: there is none, or something else has changed those places since.
    """
    history = history_of(model)
    history.check_open()
    here, there = (history.done, history.undone) if back else (history.undone, history.done)
    if not here:
        because = "; the originals were dropped by a merge" if back and history.dropped else ""
        raise SurgeryError(f"there is no operation to {'undo' if back else 'redo'}{because}")
    entry = here[-1]
    _check_untouched(entry, back)
    children = [change for change in entry.changes if change.place.child]
    replaced, device = [change.place.get() for change in children], device_of(model)
    put(entry.changes, back)
    try:
        yield entry
    except BaseException:
        put(entry.changes, not back)
        raise
    for change, other in zip(children, replaced, strict=True):
        module = change.place.get()
        if module is not None:  # where nothing was, its owner has the mode
            mode = (change.place.owner if other is None else other).training
            module.to(device).train(mode)
    there.append(here.pop())


def _check_untouched(entry: Entry, back: bool) -> None:
    wrong = [
        f"{type(change.place.owner).__name__}.{change.place.name}"
        for change in entry.changes
        if change.place.child
        and change.place.get() is not (change.after if back else change.before)
    ]
    if wrong:
        raise SurgeryError(
            f"the model's modules were changed by other hands since '{entry.title}': "
            + ", ".join(wrong[:8])
        )


def _report(
    title: str, before: dict[str, str], after: dict[str, str], wanted: dict[str, str], side: str
) -> Report:
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name, ""), after.get(name, "")
        rows.append({"tensor": name, "before": was[:SHOWN] or "-", "after": now[:SHOWN] or "-"})
    summary: dict[str, Any] = {"tensors": len(after), "sha256_of_all": combined(after.values())}
    summary[f"as_{side}_the_operation"] = sum(after.get(n) == h for n, h in wanted.items())
    trained = [n for n in wanted if UPDATES in n and after.get(n) not in (None, wanted[n])]
    summary["trained_since"] = len(trained)
    return Report(title, rows, summary)


def lora_log(model: nn.Module) -> Report:
    """The operations done to a model, the oldest first."""
    history = history_of(model)
    rows = [{"operation": title, "state": "done, cannot be undone"} for title in history.dropped]
    rows += [{"operation": entry.title, "state": "done"} for entry in history.done]
    rows += [{"operation": entry.title, "state": "undone"} for entry in reversed(history.undone)]
    summary = {"can_undo": _title(history.done), "can_redo": _title(history.undone)}
    return Report("operations", rows, summary)


def _title(entries: list[Entry]) -> str | None:
    return entries[-1].title if entries else None
