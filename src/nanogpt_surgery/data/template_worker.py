"""Renders chat templates in a process of its own: a script that `chat.py` runs.

A template comes with a model from anywhere, and is a program. It runs in Jinja's immutable sandbox,
which keeps it from Python; the process keeps it from using time, memory and output without end.
This script imports nothing of the package.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes


class Generation(Extension):
    """The tag `generation`, by which some templates mark answers: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `endgeneration`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: transformers' globals and filters, its treatment of space."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return made


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def limit(seconds: int) -> None:
    """Bound this process's memory and time, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the caller's timeout remains
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def render_all(job: dict[str, Any]) -> list[str]:
    """The texts of a job: one template, several sets of variables, and the longest output."""
    template = environment().from_string(job["template"])
    return [_render(template.generate, variables, job["longest"]) for variables in job["renders"]]


def _render(generate: Callable[..., Any], variables: dict[str, Any], longest: int) -> str:
    pieces, length = [], 0
    for piece in generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > longest:
            raise TemplateError(f"its text is longer than {longest:,} characters")
    return "".join(pieces)


def main() -> None:
    """Read a job as JSON, write the texts or the error as JSON."""
    job = json.load(sys.stdin)
    limit(job["seconds"])
    try:
        answer: dict[str, Any] = {"texts": render_all(job)}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY:,} bytes"}
    except Exception as error:  # whatever a template does wrong is told to the caller
        answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
