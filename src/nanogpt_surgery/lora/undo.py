"""Taking operations back and making them again, with the proof that every bit is where it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.hashing import UPDATES, combined, tensor_hashes
from nanogpt_surgery.lora.journal import Entry, chart_of, do_again, take_back
from nanogpt_surgery.lora.report import Report

SHOWN = 12  # digits of a hash in a table


def undo_lora(model: nn.Module) -> Report:
    """Take the last operation back, and compare the hash of every tensor with that before it.

    What an adapter has learned is not taken back: operations are undone, training is not.

    Raises:
        SurgeryError: there is nothing to undo, or a frozen tensor is not what it was before the
            operation (all of them named; the model stays as it is then).
    """
    seen: dict[Tensor, str] = {}
    before = tensor_hashes(model, seen)
    entry = take_back(model)
    after = tensor_hashes(model, seen)
    wanted = entry.hashes or {name: h for name, h in before.items() if name in after}
    changed = [n for n in wanted if UPDATES not in n and after.get(n) != wanted[n]]
    if changed:
        do_again(model)
        raise SurgeryError(
            f"'{entry.title}' cannot be undone to the bit: {len(changed)} frozen tensors were "
            f"written to since ({', '.join(changed[:8])})",
            "open the model again",
        )
    return _report(f"undone: {entry.title}", before, after, wanted)


def redo_lora(model: nn.Module) -> Report:
    """Make the operation again that was undone last.

    Raises:
        SurgeryError: there is nothing to redo.
    """
    seen: dict[Tensor, str] = {}
    before = tensor_hashes(model, seen)
    entry = do_again(model)
    after = tensor_hashes(model, seen)
    return _report(f"done again: {entry.title}", before, after, {})


def _report(
    title: str, before: dict[str, str], after: dict[str, str], wanted: dict[str, str]
) -> Report:
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name, ""), after.get(name, "")
        rows.append({"tensor": name, "before": was[:SHOWN] or "-", "after": now[:SHOWN] or "-"})
    summary: dict[str, Any] = {"tensors": len(after), "sha256_of_all": combined(after.values())}
    if wanted:
        summary["as_before_the_operation"] = sum(after.get(n) == h for n, h in wanted.items())
        trained = [n for n in wanted if UPDATES in n and after.get(n) not in (None, wanted[n])]
        summary["trained_since"] = len(trained)
    return Report(title, rows, summary)


def lora_log(model: nn.Module) -> Report:
    """The operations done to a model, the oldest first."""
    chart = chart_of(model)
    rows = [{"operation": title, "state": "done, cannot be undone"} for title in chart.forgotten]
    rows += [{"operation": entry.title, "state": "done"} for entry in chart.done]
    rows += [{"operation": entry.title, "state": "undone"} for entry in reversed(chart.undone)]
    summary = {"can_undo": _title(chart.done), "can_redo": _title(chart.undone)}
    return Report("operations", rows, summary)


def _title(entries: list[Entry]) -> str | None:
    return entries[-1].title if entries else None
