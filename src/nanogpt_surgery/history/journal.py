"""Operations that can be undone and redone, in the order in which they were done.

A journal knows no more of an operation than its words; what undoing means is in
`model_history.py` for a model in memory and in `folder_history.py` for a folder. Both prove with
hashes that every bit is where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.report import SHOWN_OF_A_HASH, Report

DONE, UNDONE, AGAIN = "done", "undone", "done again"
SETTLED, LAPSED = "done, cannot be undone", "undone, cannot be redone"


@dataclass
class Operation:
    """One operation: what was done, in words."""

    operation: str
    state = DONE  # no field: it follows from the operations and undos after this one

    def release(self) -> None:
        """Lets go of what an undo or a redo would need, since neither will come."""


Op = TypeVar("Op", bound=Operation)


@dataclass
class Journal(Generic[Op]):
    """The operations in the order in which they were first done, each with its state.

    Attributes:
        operations: all but those that were dropped.
        dropped: how many of the oldest are no longer here, nor what their undo would need.
    """

    operations: list[Op] = field(default_factory=list)
    dropped: int = 0

    def in_state(self, state: str) -> list[Op]:
        """Those that are in a state, the oldest first."""
        return [operation for operation in self.operations if operation.state == state]

    @property
    def done(self) -> list[Op]:
        """Those that can be undone, the next one to undo last."""
        return self.in_state(DONE)

    @property
    def undone(self) -> list[Op]:
        """Those that can be done again, the next one to redo last."""
        return self.in_state(UNDONE)[::-1]

    def add(self, operation: Op) -> None:
        """Adds an operation that was done; what was undone cannot be redone from here on."""
        self._give_up(UNDONE, LAPSED)
        self.operations.append(operation)

    def keep(self, most: int) -> None:
        """Drops the oldest operations, until there are no more than so many."""
        gone = max(0, len(self.operations) - most)
        del self.operations[:gone]
        self.dropped += gone

    def settle(self) -> None:
        """Gives up undoing whatever was done."""
        self._give_up(DONE, SETTLED)

    def _give_up(self, state: str, then: str) -> None:
        for operation in self.in_state(state):
            operation.release()
            operation.state = then

    def last(self, back: bool, where: str, hint: str = "") -> Op:
        """The operation to undo, if `back`, or else the one to redo.

        Raises:
            SurgeryError: there is none.
        """
        if here := self.done if back else self.undone:
            return here[-1]
        gone = self.in_state(SETTLED) if back else []
        last = f"; '{gone[-1].operation}' cannot be taken back" if gone else ""
        raise SurgeryError(f"{where} has no operation to {'undo' if back else 'redo'}{last}", hint)

    def turn(self, back: bool) -> Op:
        """Notes that the last operation was undone, if `back`, or else the one undone last redone.

        Raises:
            IndexError: there is none.
        """
        operation = (self.done if back else self.undone)[-1]
        operation.state = UNDONE if back else DONE
        return operation

    def log(self, title: str, row: Callable[[Op], dict[str, Any]], **summary: Any) -> Report:
        """A row for each operation, with its state, the oldest first."""
        rows = [row(operation) | {"state": operation.state} for operation in self.operations]
        can = {"can_undo": self.done, "can_redo": self.undone}
        next_ones = {key: here[-1].operation if here else None for key, here in can.items()}
        return Report(title, rows, next_ones | summary)


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
