"""Errors that a user can mend, a sentence with a hint each; anything else is a bug."""

from __future__ import annotations

import difflib
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST_QUOTE = 200  # characters


class SurgeryError(Exception):
    """An error that the user can mend.

    `what` says what happened, where and why; `hint` is the next thing to do or type.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        what, hint = printable(what), printable(hint)
        self.what = what
        self.hint = hint
        super().__init__(f"{what}\n  → {hint}" if hint else what)


class NotFiniteError(SurgeryError):
    """A model has computed what is no finite number."""


class SurgeryWarning(UserWarning):
    """Something the user should know, although the work goes on."""


def warn(text: str) -> None:
    """Warns the user; the place that is named is the one that called into this package."""
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    ours = [place for place, name in enumerate(names) if name.startswith(f"{__package__}.")]
    warnings.warn(text, SurgeryWarning, stacklevel=ours[-1] + 3)


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


def quoted(foreign: Any) -> str:
    """A value from a file that a stranger made, as a message shows it.

    It is escaped as `repr` escapes, and cut after 200 characters.
    """
    if isinstance(foreign, str):
        text = repr(foreign[: LONGEST_QUOTE + 1])
    else:
        text = repr(foreign) if _is_small(foreign) else f"a {type(foreign).__name__}"
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 1] + "…"


def _is_small(value: Any) -> bool:
    return not hasattr(value, "__len__") or len(value) <= LONGEST_QUOTE


@contextmanager
def foreign_file(path: str | Path, part: str = "") -> Iterator[None]:
    """The boundary around the reading of a file that a stranger made.

    Whatever a parser raises inside, a panic of a library in Rust too, leaves it as a `SurgeryError`
    that names the file and, where given, the part of it that was being read.

    Raises:
        SurgeryError: anything but an interrupt was raised.
    """
    try:
        yield
    except (SurgeryError, SurgeryWarning):
        raise
    except BaseException as error:
        # A panic in Rust is no `Exception`, and its class can be imported from nowhere.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        where = f"{path}, {part}," if part else str(path)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = f"{type(error).__name__}: {quoted(str(error))}"
        raise SurgeryError(f"{where} cannot be read: {reason}") from error


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in a message: the first few, each cut after 200 characters, and how many there are."""
    names = list(names)
    shown = ", ".join(
        n if len(n) <= LONGEST_QUOTE else f"{n[:LONGEST_QUOTE]}…" for n in names[:most]
    )
    return f"{shown}, … ({len(names):,} in all)" if names[most:] else shown


def first_problems(problems: Sequence[str], most: int = 5) -> str:
    """The first of several problems, and how many more there are."""
    more = f"; {len(problems) - most:,} more" if problems[most:] else ""
    return "; ".join(problems[:most]) + more


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, as text for a hint; all of them where none is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    return ", ".join(close or known)
