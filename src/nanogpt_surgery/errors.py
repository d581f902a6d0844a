"""What the user can mend, in a sentence with a hint. Anything else is a bug with its traceback."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class SurgeryError(Exception):
    """An error that the user can mend.

    `what` says what happened, where and why; `hint` is the next thing to do or type.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        what, hint = printable(what), printable(hint)
        self.what = what
        self.hint = hint
        super().__init__(f"{what}\n  → {hint}" if hint else what)


class SurgeryWarning(UserWarning):
    """Something the user should know, although the work goes on."""


def printable(text: str) -> str:
    """Text in which nothing can move a terminal's cursor: names in files are written by strangers.

    Control characters, but for tab and newline, and those that turn the direction of writing are
    shown by their number.
    """
    return "".join(
        c if c in "\t\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else _number(c)
        for c in text
    )


def _number(character: str) -> str:
    return f"\\u{ord(character):04x}"


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, as text for a hint; all of them where none is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    return ", ".join(close or known)
