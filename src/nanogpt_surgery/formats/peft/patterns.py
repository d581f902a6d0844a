"""PEFT's patterns from an adapter that a stranger made, matched in bounded time.

A pattern is a regular expression for a layer's name or its ending, and some expressions keep a
backtracking matcher busy for ever. Names, escaped or not, are looked up in a table; any other
expression becomes an automaton (Thompson, 1968), which reads each character of a name once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from nanogpt_surgery.errors import SurgeryError, quoted

LONGEST_PATTERN = 1_000  # characters
_MOST_INSTRUCTIONS = 2_000  # of one automaton
_MOST_EXPRESSIONS = 500  # beside the names
_MOST_WORK = 1_000_000  # steps for all patterns of a file: about a second

# (the one character that is read, first jump, second jump): jumps are relative, None where not used
Instruction: TypeAlias = tuple[str | None, int | None, int | None]
Layout: TypeAlias = tuple[int, tuple[int, ...], bool]  # length, wildcards, only for whole names


class Patterns:
    """The values of a table of patterns; the first pattern that matches counts, as in PEFT.

    Raises:
        SurgeryError: a pattern is no regular expression, or one that we do not read.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = list(values.values())
        self._work = _MOST_WORK
        self._plain: dict[Layout, dict[str, int]] = {}
        self._layouts: dict[int, list[Layout]] = {}  # by length
        self._expressions: list[tuple[int, _Automaton]] = []
        for order, pattern in enumerate(values):
            plain = _plain(pattern)
            if plain is not None:
                self._add(order, *plain)
                continue
            self._expressions.append((order, _Automaton(pattern)))
            if len(self._expressions) > _MOST_EXPRESSIONS:
                raise SurgeryError(f"more than {_MOST_EXPRESSIONS} patterns are no plain names")

    def _add(self, order: int, text: str, layout: Layout) -> None:
        if layout not in self._plain:
            self._plain[layout] = {}
            self._layouts.setdefault(len(text), []).append(layout)
        self._plain[layout].setdefault(text, order)

    def value(self, name: str, default: Any) -> Any:
        """The value of the first pattern that is a layer's name or its ending.

        Raises:
            SurgeryError: the patterns of the table take too long.
        """
        if not self._values:
            return default
        found = min(self._named(name), default=len(self._values))
        for order, automaton in self._expressions:
            if order > found:
                break
            self._spend(len(name) // 16)
            if automaton.matches(name, self._spend):
                found = order
                break
        return self._values[found] if found < len(self._values) else default

    def _named(self, name: str) -> Iterator[int]:
        """The places of those patterns without operators that match."""
        for start in _starts(name):
            ending = name[start:]
            layouts = self._layouts.get(len(ending), ())
            self._spend(len(layouts))
            for layout in layouts:
                _, wildcards, whole = layout
                if start == 0 or not whole:
                    masked = list(ending)
                    for place in wildcards:
                        masked[place] = "."
                    order = self._plain[layout].get("".join(masked))
                    if order is not None:
                        yield order

    def _spend(self, steps: int) -> None:
        self._work -= steps
        if self._work < 0:
            raise SurgeryError("its patterns take too long to match with its layers' names")


def _starts(name: str) -> list[int]:
    """Where an ending of a name begins: at the first character, and after every dot."""
    return [0, *(place + 1 for place, character in enumerate(name) if character == ".")]


_OPERATOR = re.compile(r"[\\^$*+?{}\[\]|()]")


def _plain(pattern: str) -> tuple[str, Layout] | None:
    """A pattern without operators but for ^ at the beginning and dots, each any character."""
    if not _OPERATOR.search(pattern):
        dots = tuple(found.start() for found in re.finditer(r"\.", pattern))
        return pattern, (len(pattern), dots, False)
    whole = pattern.startswith("^")
    rest = iter(pattern[1:] if whole else pattern)
    text, wildcards = "", []
    for character in rest:
        if character == "\\":
            character = next(rest, "a")
            if character.isalnum():
                return None
        elif character == ".":
            wildcards.append(len(text))
        elif _OPERATOR.match(character):
            return None
        text += character
    return text, (len(text), tuple(wildcards), whole)


class _Automaton:
    """A regular expression without look-around and back-references, for whole endings of a name."""

    def __init__(self, pattern: str):
        if len(pattern) > LONGEST_PATTERN:
            raise SurgeryError(
                f"the pattern {quoted(pattern)} has {len(pattern):,} characters; the limit is "
                f"{LONGEST_PATTERN:,}"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # sets that a later Python may read otherwise
                re.compile(f"^(.*\\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise SurgeryError(
                f"the pattern {quoted(pattern)} is not a regular expression: {error}"
            ) from None
        reader = _Reader(pattern)
        self.program: list[Instruction] = [*reader.choice(), (None, None, None)]
        if reader.place < len(pattern):
            raise reader.unread()
        self._next: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._reads: dict[tuple[str, str], bool] = {}

    def matches(self, name: str, spend: Any) -> bool:
        """Whether an ending of a name matches; each step is reported to `spend`."""
        fresh = self._closure([0], spend)
        states = self._closure([0], spend, _BEGINNING)
        for character in name:
            key = states, character
            if key not in self._next:
                moved = [
                    state + 1 for state in states if self._is(self.program[state][0], character)
                ]
                after = self._closure(moved, spend)
                self._next[key] = after | fresh if character == "." else after
            states = self._next[key]
        return len(self.program) - 1 in self._closure(states, spend, _END)

    def _is(self, one: str | None, character: str) -> bool:
        if one in (None, _BEGINNING, _END):
            return False
        key = str(one), character
        if key not in self._reads:
            self._reads[key] = re.fullmatch(str(one), character) is not None
        return self._reads[key]

    def _closure(self, states: Iterable[int], spend: Any, where: str = "") -> frozenset[int]:
        """All states that are reached without reading a character, at one end of the name."""
        found, waiting = set[int](), list(states)
        while waiting:
            state = waiting.pop()
            if state in found:
                continue
            found.add(state)
            one, *jumps = self.program[state]
            if one in (_BEGINNING, _END):
                waiting += [state + 1] * (one == where)
            elif one is None:
                waiting += [state + jump for jump in jumps if jump is not None]
        spend(len(found))
        return frozenset(found)


_BEGINNING, _END = "^", "$"  # in the place of a character: only there in a name
_REPEATED = re.compile(r"([*+?]|\{\d+\}|\{\d*,\d*\})(\??)")
_ONE = re.compile(
    r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dDwWsS]|\\[^a-zA-Z0-9]|[^\\^$*+?()|\[]", re.DOTALL
)
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")


class _Reader:
    """Reads an expression from left to right into a program of relative jumps."""

    def __init__(self, pattern: str):
        self.pattern, self.place = pattern, 0

    def unread(self) -> SurgeryError:
        """The error for what stands at the place that was reached."""
        return SurgeryError(
            f"the pattern {quoted(self.pattern)} has {quoted(self.pattern[self.place :][:8])} in "
            "it, which is not matched in bounded time and is not supported"
        )

    def _take(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        found = expression.match(self.pattern, self.place)
        if found is not None:
            self.place = found.end()
        return found

    def choice(self) -> list[Instruction]:
        """One sequence or several, of which one is taken."""
        program = self._sequence()
        if self.pattern[self.place : self.place + 1] == "|":
            self.place += 1
            other = self.choice()
            jump: Instruction = (None, len(other) + 1, None)
            program = [(None, 1, len(program) + 2), *program, jump, *other]
        return self._checked(program)

    def _sequence(self) -> list[Instruction]:
        program: list[Instruction] = []
        while self.place < len(self.pattern) and self.pattern[self.place] not in "|)":
            program += self._repeated()
        return program

    def _repeated(self) -> list[Instruction]:
        if (end := self.pattern[self.place]) in (_BEGINNING, _END):
            self.place += 1
            return [(end, None, None)]
        part = self._one()
        how = self._take(_REPEATED)
        if how is None:
            return part
        if self.pattern[self.place : self.place + 1] == "+":
            raise self.unread()
        least, most = _bounds(how[1])
        if (least + (most or 0)) * len(part) > _MOST_INSTRUCTIONS:
            raise self._too_large()
        if most is not None:
            optional: list[Instruction] = [(None, 1, len(part) + 1), *part]
            return self._checked(part * least + optional * (most - least))
        back: Instruction = (None, -len(part) - 1, None)
        return self._checked([*part * least, (None, 1, len(part) + 2), *part, back])

    def _one(self) -> list[Instruction]:
        """One character, or a group."""
        if self._take(_GROUP):
            program = self.choice()
            self.place += 1  # the parenthesis: `re` has seen that it is there
            return program
        found = self._take(_ONE)
        if found is None:
            raise self.unread()
        return [(found[0], None, None)]

    def _checked(self, program: list[Instruction]) -> list[Instruction]:
        if len(program) > _MOST_INSTRUCTIONS:
            raise self._too_large()
        return program

    def _too_large(self) -> SurgeryError:
        return SurgeryError(f"the pattern {quoted(self.pattern)} repeats too much to be matched")


def _bounds(how: str) -> tuple[int, int | None]:
    """How often a part comes: at least, and at most if there is a limit."""
    if how in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[how]
    least, comma, most = how[1:-1].partition(",")
    if not comma:
        return int(least), int(least)
    return int(least or 0), int(most) if most else None
