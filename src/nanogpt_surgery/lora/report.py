"""What an operation did: a table for people, plain values for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


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

    def __str__(self) -> str:
        lines = [self.title, *_table(self.rows)]
        lines += [f"{key.replace('_', ' ')}: {_text(value)}" for key, value in self.summary.items()]
        return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    header = list(rows[0])
    cells = [header] + [[_text(row[key]) for key in header] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    numeric = [isinstance(rows[0][key], (int, float)) for key in header]
    return ["  " + "  ".join(_aligned(line, widths, numeric)).rstrip() for line in cells]


def _aligned(line: list[str], widths: list[int], numeric: list[bool]) -> list[str]:
    return [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(line, widths, numeric, strict=True)
    ]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
