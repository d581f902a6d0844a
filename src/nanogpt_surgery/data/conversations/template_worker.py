"""Renders chat templates in a process of its own: a script that `chat.py` runs.

A template comes with a model from anywhere, and is a program. It runs in Jinja's immutable sandbox,
which keeps it from Python; the process keeps it from using time, memory and output without end.
This script imports nothing of the package.
"""

from __future__ import annotations

import datetime
import json
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes


class Generation(Extension):
    """The tag `generation`, by which some templates mark answers: its body, in its own scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=line)]  # what it sets ends with it, as in transformers


def environment() -> ImmutableSandboxedEnvironment:
    """Makes the environment that templates expect: transformers' globals and filters."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["dict"] = dict
    made.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' filter writes it: without Jinja's escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)


def limit_memory() -> None:
    """Bound this process's memory, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the caller's patience remains
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def limit_time(seconds: int) -> None:
    """End this process after so much more of its own time; 0 takes the limit away."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


class Template:
    """A template, and limits that hold for each rendering of it.

    Args:
        job: its source, the variables that all renderings have, the longest text and the seconds
            that one may take.
    """

    def __init__(self, job: dict[str, Any]):
        self.job = job
        limit_time(job["seconds"])
        self.generate = environment().from_string(job["template"]).generate

    def render(self, messages: list[Any], ask: bool, variables: dict[str, Any]) -> str:
        """The text of messages; `ask`: up to where an answer begins."""
        limit_time(self.job["seconds"])
        pieces, length = [], 0
        shown = self.job["variables"] | variables
        for piece in self.generate(**shown, messages=messages, add_generation_prompt=ask):
            pieces.append(piece)
            length += len(piece)
            if length > self.job["longest"]:
                raise TemplateError(f"its text is longer than {self.job['longest']:,} characters")
        return "".join(pieces)

    def reply(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The text of a conversation, and where in it answers stand, if that was asked."""
        render = partial(self.render, variables=asked["variables"])
        messages = asked["messages"]
        try:
            if not asked["answers"]:
                return {"text": render(messages, asked["ask"])}
            text, spans = find_answers(render, messages, asked["answers"])
            return {"text": text, "answers": spans}
        except MemoryError:
            return {"error": f"it needs more than {MEMORY:,} bytes"}
        except Exception as error:  # whatever a template does wrong is reported to the caller
            return {"error": f"{type(error).__name__}: {error}"[:1000]}


Render = Callable[[list[Any], bool], str]
Span = tuple[int, int]


class RewritingError(TemplateError):
    """A template does not write a conversation as a continuation of its beginning."""


def find_answers(render: Render, messages: list[Any], answers: list[int]) -> tuple[str, list[Span]]:
    """The text of a conversation, and from where to where each answer with its end stands in it.

    An answer begins where the text of the messages before it asks for one, and ends where the text
    of the messages up to it ends. Such a prefix is rendered once for each text that stands between
    two messages: where the same text comes again, it is divided at the same place. So the work
    grows with the length of the conversation, not with its square.

    Args:
        render: writes messages.
        messages: of the conversation.
        answers: which of them are answers, in order.

    Raises:
        RewritingError: answers cannot be distinguished from questions.
    """
    whole = render(messages, False)
    contents = mark_contents(render, messages, whole) if len(answers) > 1 else {}
    starts: dict[tuple[str, str], int] = {}  # what stands before an answer → its part of it
    ends: dict[tuple[str, str], int] = {}
    spans = []
    for i in answers:
        here, before, after = contents.get(i), contents.get(i - 1), contents.get(i + 1)
        start = end = None
        if here and before and before[1] <= here[0]:
            lead = messages[i - 1]["role"], whole[before[1] : here[0]]
            if lead not in starts:
                starts[lead] = here[0] - answer_start(render, messages, i, whole, here)
            start = here[0] - starts[lead]
        if here and after and here[1] <= after[0]:
            tail = messages[i + 1]["role"], whole[here[1] : after[0]]
            if tail not in ends:
                ends[tail] = answer_end(render, messages, i, whole, here) - here[1]
            end = here[1] + ends[tail]
        start = answer_start(render, messages, i, whole, here) if start is None else start
        end = answer_end(render, messages, i, whole, here) if end is None else end
        spans.append((start, end))
    if any(start > end for start, end in spans) or spans != sorted(spans):
        raise RewritingError("the answers are written in another order")
    return whole, spans


def answer_start(render: Render, messages: list[Any], i: int, whole: str, here: Span | None) -> int:
    """Where the answer that is message i begins."""
    if i == 0 and here:
        return here[0]  # many templates need a message to write anything
    question = render(messages[:i], True)
    if not whole.startswith(question):
        raise RewritingError("it rewrites what came before an answer")
    return len(question)


def answer_end(render: Render, messages: list[Any], i: int, whole: str, here: Span | None) -> int:
    """Where the answer that is message i ends, with what ends it."""
    if i == len(messages) - 1:
        return len(whole)
    text = render(messages[: i + 1], False)
    if whole.startswith(text):
        return len(text)
    alone = mark_contents(render, messages[: i + 1], text).get(i) if here else None
    if here and alone and whole.startswith(text[alone[1] :], here[1]):
        return here[1] + len(text) - alone[1]
    raise RewritingError("it rewrites what came before an answer")


_MARK = re.compile("\ufdd0([0-9]+)([\ufdd1\ufdd2])")  # characters that no text has


def mark_contents(render: Render, messages: list[Any], whole: str) -> dict[int, Span]:
    """Where the contents of messages stand in their text, blanks around them apart.

    A second rendering has marks around each content. It counts if it is the same text without them;
    a content that is not there, or there twice, is left out.
    """
    marked = [_marked(message, i) for i, message in enumerate(messages)]
    try:
        text = render(marked, False)
    except Exception:  # a template that looks into contents
        return {}
    pieces: list[str] = []
    found: dict[int, list[int]] = {}
    length = last = 0
    for mark in _MARK.finditer(text):
        pieces.append(text[last : mark.start()])
        length += len(pieces[-1])
        last = mark.end()
        found.setdefault(int(mark[1]), []).append(length)
    if "".join(pieces) + text[last:] != whole:
        return {}
    return {i: (places[0], places[1]) for i, places in found.items() if len(places) == 2}


def _marked(message: Any, i: int) -> Any:
    content = message.get("content")
    if not isinstance(content, str) or not content.strip() or "\ufdd0" in content:
        return message
    core = content.strip()
    start = content.index(core)
    marked = f"\ufdd0{i}\ufdd1{core}\ufdd0{i}\ufdd2"
    return message | {"content": content[:start] + marked + content[start + len(core) :]}


def main() -> None:
    """Reads a template, then a conversation a line, and writes a reply a line, all as JSON."""
    job = json.loads(sys.stdin.readline())
    limit_memory()
    template, failed = None, {}
    try:
        template = Template(job)
    except Exception as error:
        failed = {"error": f"{type(error).__name__}: {error}"[:1000]}
    for line in sys.stdin:
        reply = template.reply(json.loads(line)) if template else failed
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
        limit_time(0)


if __name__ == "__main__":
    main()
