"""Report: a table for people, folded, fitted to a terminal, with units; plain values for programs.

No number is ever broken or cut: a table that is wider than the terminal leaves out what is the same
in all rows, and then becomes a paragraph for each row.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FOLDED_FROM = 17  # rows; fewer are shown one by one
NAMES = ("layer", "module")  # columns that name a part of a model
SUMMED = ("parameters", "bytes", "tensors")  # of rows that are folded into one
SHARES = (
    *(
        "top token unchanged",
        "probability of the others",
        "energy followed",
        "change kept",
        "weights changed",
        "trained share",
        "utilisation",
    ),
    *("bfloat16", "float16", "int8", "int4"),
    *("lowest bfloat16", "lowest float16", "lowest int8", "lowest int4"),
    *("accuracy", "length normalised accuracy", "accuracy by chance"),
)
KEPT_NOTE = (
    "change kept: the part of the change kept after rounding. What counts is a loss measured after "
    "it, which can be as good where little is kept"
)
CALLED = {
    "activation bytes": "activations",
    "adapter bytes": "adapter file",
    "adapter training bytes": "adapter, its gradients and optimizer state",
    "available bytes": "memory free here",
    "bytes": "size",
    "disk bytes": "on the disk",
    "evaluation bytes": "an evaluation",
    "free bytes": "free on the disk",
    "gradient bytes": "gradients",
    "kept originals bytes": "originals kept",
    "kl": "KL divergence",
    "kl divergence": "KL divergence",
    "largest_error": "largest logit error",
    "mean_error": "mean logit error",
    "memory bytes": "memory, at most",
    "model bytes": "model file",
    "optimizer bytes": "optimizer state",
    "training bytes": "memory in training",
}
FITS_INTO = {  # what of a summary has to fit into what
    "adapter_bytes": "free_bytes",
    "model_bytes": "free_bytes",
    "disk_bytes": "free_bytes",
    "memory_bytes": "available_bytes",
    "training_bytes": "available_bytes",
}
NOT_SHOWN = ("sha256",)  # of files; the journal has them
SHOWN_OF_A_HASH = 12
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_HASH = re.compile(r"[0-9a-f]{64}")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """Rows with the same keys, and a summary. `print(report)` is a table; `to_json()` is JSON."""

    title: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"title": self.title, "rows": self.rows, **self.summary}

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_text(self, width: int | None = None, whole: bool = False, hint: str = "") -> str:
        """The title, the table and the summary.

        Args:
            width: columns of the terminal; None where lines may be of any length.
            whole: show every row; otherwise layers of one kind are folded into one.
            hint: how to see them all, said where some are folded.
        """
        shown = list(self.rows) if whole else folded(self.rows)
        lines = [self.title, *_table(shown, width)]
        if len(shown) < len(self.rows):
            more = f"; {hint}" if hint else ""
            lines.append(f"({len(self.rows):,} lines in {len(shown):,}{more})")
        lines += [
            f"{label(key)}: {' '.join(value_text(key, value).split()) or '(nothing)'}"
            f"{_fits(key, self.summary)}"
            for key, value in self.summary.items()
            if key not in NOT_SHOWN
        ]
        if any("change kept" in row for row in self.rows) or "part of the change" in self.title:
            lines.append(KEPT_NOTE)
        return "\n".join(part for line in lines for part in wrapped(line, width))

    def __str__(self) -> str:
        return self.to_text(whole=True)


def _fits(key: str, summary: Mapping[str, Any]) -> str:
    """Whether what takes room has it, where that is known."""
    room = summary.get(FITS_INTO.get(key, ""))
    if room is None:
        return ""
    free = f"{size(room)} free"
    return f" (fits: {free})" if summary[key] <= room else f" (does not fit: {free})"


def wrapped(line: str, width: int | None) -> list[str]:
    """A line as lines that fit, broken between words alone."""
    if width is None or len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def size(count: float) -> str:
    """Bytes in GiB, MiB or KiB: "1.25 GiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit / 10:
            digits = 2 if count < 10 * unit else 1 if count < 100 * unit else 0
            return f"{count / unit:,.{digits}f} {name}"
    return f"{count:,.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as they are said: "0.35 s", "42 s", "5 min 12 s", "4 h 21 min", "2 d 3 h"."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    parts = []
    left = round(seconds) if seconds < 3570 else 60 * round(seconds / 60)
    for length, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, length)
        parts.append((count, name))
    first = next(i for i, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {name}" for count, name in parts[first : first + 2] if count)


def percent(share: float) -> str:
    """A share as "89.8 %"; 100 % and 0 % only where it is all or nothing."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if 0.999 <= share < 1:
        return f"{math.floor(10_000 * share) / 100:.2f} %"
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1g} %"


def label(key: str) -> str:
    """How a key is called: the unit stands with the value."""
    words = key.replace("_", " ")
    if key in CALLED or words in CALLED:
        return CALLED.get(key) or CALLED[words]
    if key.startswith("stored_as_"):  # and the name of a type: Q8_0
        return f"stored as {key.removeprefix('stored_as_')}"
    if words.endswith(" bytes"):
        return words.removesuffix(" bytes")
    return words.replace("seconds", "time", 1) if words.startswith("seconds") else words


def value_text(key: str, value: Any) -> str:
    """A value in its unit, as its key says."""
    words = key.replace("_", " ")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, int | float):
        if words.endswith("bytes"):
            return size(value)
        if words.startswith("seconds"):
            return duration(value)
        if words in SHARES:
            return percent(value)
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(value_text("", one) for one in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{label(name)} {value_text(name, one)}" for name, one in value.items())
    return str(value)[:SHOWN_OF_A_HASH] if _HASH.fullmatch(str(value)) else str(value)


def folded(rows: Sequence[Row]) -> list[Row]:
    """Rows of layers of one kind as one, where there are many rows."""
    name = next((key for key in NAMES if rows and key in rows[0]), None)
    if name is None or len(rows) < FOLDED_FROM:
        return list(rows)
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(_NUMBER.sub("*", row[name]), []).append(row)
    if len(kinds) == len(rows):
        return list(rows)
    return [
        {
            name: kind if len(alike) > 1 else alike[0][name],
            "layers": len(alike) if len(alike) > 1 else None,
        }
        | {key: _together(key, [row[key] for row in alike]) for key in alike[0] if key != name}
        for kind, alike in kinds.items()
    ]


def _together(key: str, values: list[Any]) -> Any:
    """One value for several rows: their sum, what they have in common, or from where to where."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        if key in SUMMED:
            return sum(numbers)
        if min(numbers) == max(numbers):
            return numbers[0]
        least, most = (_rough(key, edge) for edge in (min(numbers), max(numbers)))
        return least if least == most else f"{least.removesuffix(' %')}–{most}"
    texts = list(dict.fromkeys(value_text(key, value) for value in values))
    return texts[0] if len(texts) == 1 else f"{texts[0]}, … ({len(texts)} kinds)"


def _rough(key: str, value: float) -> str:
    return f"{value:.2g}" if value_text(key, value) == f"{value:.4g}" else value_text(key, value)


def _table(rows: Sequence[Row], width: int | None) -> Iterator[str]:
    """Rows under their headings; each as a paragraph where the terminal is too narrow for that."""
    if not rows:
        return
    keys = list(rows[0])
    cells = [[value_text(key, row[key]) for key in keys] for row in rows]
    columns = [i for i in range(len(keys)) if i == 0 or any(line[i] != "-" for line in cells)]
    if width is not None and _width(keys, cells, columns) > width and len(rows) > 1:
        alike = [i for i in columns[1:] if len({line[i] for line in cells}) == 1]
        columns = [i for i in columns if i not in alike]
        yield from (f"  {label(keys[i])}: {cells[0][i]} in all" for i in alike)
    if width is not None and _width(keys, cells, columns) > width:
        yield from _paragraphs(keys, cells, columns, width)
        return
    heads = [label(key) for key in keys]
    lines = [[line[i] for i in columns] for line in [heads, *cells]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [_numeric(rows, keys[i]) for i in columns]
    for line in lines:
        padded = zip(line, widths, right, strict=True)
        yield "  " + "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in padded).rstrip()


def _numeric(rows: Sequence[Row], key: str) -> bool:
    """Whether a column has numbers alone, or from where to where they go."""
    texts = [str(row[key]) for row in rows if row[key] is not None]
    return all(re.match(r"[-\d.]", text) and "×" not in text for text in texts)


def _width(keys: Sequence[str], cells: list[list[str]], columns: list[int]) -> int:
    return sum(2 + max(len(label(keys[i])), *(len(line[i]) for line in cells)) for i in columns)


def _paragraphs(
    keys: Sequence[str], cells: list[list[str]], columns: list[int], width: int
) -> Iterator[str]:
    """Each row under its name, broken between its values alone."""
    for line in cells:
        yield f"  {line[columns[0]]}"
        items = [f"{label(keys[i])} {line[i]}" for i in columns[1:] if line[i] not in ("", "-")]
        text = ", ".join(item.replace(" ", "\xa0") for item in items)
        for part in wrapped(f"    {text}", width) if text else ():
            yield part.replace("\xa0", " ").rstrip(",")
