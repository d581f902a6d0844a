"""Operations that can be undone and redone, in the order in which they were done.

A journal knows no more of an operation than its words; what undoing means is in
`model_history.py` for a model in memory and in `folder_history.py` for a folder. Both prove with
hashes that every bit is where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Generic, TypeVar

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.report import SHOWN_OF_A_HASH, Report

DONE, UNDONE, AGAIN = "done", "undone", "done again"


@dataclass
class Operation:
    """One operation: what was done, in words, and its number in the journal."""

    operation: str
    _: KW_ONLY
    number: int = 0

    def release(self) -> None:
        """Lets go of what an undo or a redo would need, since neither will come."""


Op = TypeVar("Op", bound=Operation)


@dataclass
class Journal(Generic[Op]):
    """Every operation, by what has become of it.

    Attributes:
        settled: done, and not to be undone any more.
        done: can be undone, the last one first.
        undone: can be done again, the one undone last first.
        lapsed: undone, and followed by something else.
    """

    settled: list[Op] = field(default_factory=list)
    done: list[Op] = field(default_factory=list)
    undone: list[Op] = field(default_factory=list)
    lapsed: list[Op] = field(default_factory=list)

    def next_number(self) -> int:
        """The number of an operation to come; the first is 1."""
        return 1 + sum(map(len, (self.settled, self.done, self.undone, self.lapsed)))

    def add(self, operation: Op) -> None:
        """Adds an operation that was done; what was undone cannot be redone from here on."""
        _move(self.undone, self.lapsed)
        self.done.append(operation)

    def settle(self) -> None:
        """Gives up undoing whatever was done."""
        _move(self.done, self.settled)

    def last(self, back: bool, where: str, hint: str = "") -> Op:
        """The operation to undo, if `back`, or else the one to redo.

        Raises:
            SurgeryError: there is none.
        """
        here, gone = (self.done, self.settled) if back else (self.undone, self.lapsed)
        if here:
            return here[-1]
        last = f"; '{gone[-1].operation}' cannot be taken back" if gone and back else ""
        raise SurgeryError(f"{where} has no operation to {'undo' if back else 'redo'}{last}", hint)

    def turn(self, back: bool) -> Op:
        """Notes that the last operation was undone, if `back`, or else the one undone last redone.

        Raises:
            IndexError: there is none.
        """
        here, there = (self.done, self.undone) if back else (self.undone, self.done)
        there.append(here.pop())
        return there[-1]

    def log(self, title: str, row: Callable[[Op], dict[str, Any]], **summary: Any) -> Report:
        """A row for each operation, with its state, the oldest first."""
        states = {
            "done, cannot be undone": self.settled,
            "done": self.done,
            "undone": self.undone,
            "undone, cannot be redone": self.lapsed,
        }
        stated = [(op, state) for state, operations in states.items() for op in operations]
        rows = [row(op) | {"state": state} for op, state in sorted(stated, key=_number)]
        can = {
            "can_undo": self.done[-1].operation if self.done else None,
            "can_redo": self.undone[-1].operation if self.undone else None,
        }
        return Report(title, rows, can | summary)


def _move(operations: list[Op], to: list[Op]) -> None:
    for operation in operations:
        operation.release()
    to += operations
    operations.clear()


def _number(stated: tuple[Operation, str]) -> int:
    return stated[0].number


def report_turn(
    operation: Operation,
    back: bool,
    kind: str,
    before: Mapping[str, str],
    after: Mapping[str, str],
    summary: dict[str, Any],
) -> Report:
    """The hashes before and after an undo, if `back`, or a redo: a row for each tensor or file."""
    rows = [
        {kind: name, "before": shortened(before.get(name)), "after": shortened(after.get(name))}
        for name in dict.fromkeys([*before, *after])
    ]
    event = UNDONE if back else AGAIN
    return Report(f"{event}: {operation.operation} (sha256 of each {kind})", rows, summary)


def shortened(digest: str | None) -> str:
    """The first digits of a hash, or "-" for none."""
    return (digest or "-")[:SHOWN_OF_A_HASH]
