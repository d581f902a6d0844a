"""`surgery ask`: one question, answered once; or answered by a model with and without adapter."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.chat.settings import DEFAULT_TALK, ChatSettings, TalkOptions
from nanogpt_surgery.cli.framework.console import notes_afterwards, say, write
from nanogpt_surgery.cli.model_options import (
    DEFAULT_OPENING,
    DEFAULT_SAMPLING,
    AdapterFolder,
    Model,
    OpeningOptions,
    SamplingOptions,
    one_adapter,
    say_engine,
)
from nanogpt_surgery.errors import SurgeryError, printable

if TYPE_CHECKING:
    from nanogpt_surgery.generation.conversation import Conversation

TWO_COLUMNS = 100  # characters of a terminal that has room for two answers side by side


def ask(
    model: Model,
    question: str,
    *,
    adapter: AdapterFolder = None,
    compare: bool = False,
    talk: TalkOptions = DEFAULT_TALK,
    opening: OpeningOptions = DEFAULT_OPENING,
    sampling: SamplingOptions = DEFAULT_SAMPLING,
    json: bool = False,
) -> None:
    """Ask a model one question; the answer alone is written on standard output.

    With --compare the model answers twice, without its adapter and with it, by the same seed:
    side by side on a wide terminal, one under the other elsewhere.

    Parameters
    ----------
    question
        what is asked; - reads it from standard input
    compare
        show the answer of the model without the adapter beside that with it
    json
        print a JSON object: question, answer, ended (stop or length), seed, engine (what computed
        it, and why it was not the compiled decoder); with --compare also base_answer and base_ended
    """
    settings = ChatSettings(talk.max_new_tokens, **sampling.arguments())
    if settings.seed is None:  # one that two answers can share
        settings = replace(settings, seed=random.randrange(2**31))
    if compare and adapter is None:
        raise SurgeryError("there is nothing to compare the model with", "add --adapter FOLDER")
    asked = _question(question)
    adapters = one_adapter(adapter)
    opened = opening.open(model, adapters)
    fresh = talk.conversation(*opened, adapters[0][1] if adapters else None)
    answers = [
        _Answer(copy(fresh), asked, settings, of_base)
        for of_base in ((True, False) if compare else (False,))
    ]
    engine = say_engine(opened[0], settings.engine)
    with notes_afterwards():
        if json:
            _print_json(answers, engine)
        elif compare:
            _print_both(answers, ["without adapter", f"with {adapter}"])
        else:
            write(answers[0].pieces())
    for answer in answers:
        answer.say_ending()


def _question(text: str) -> str:
    from nanogpt_surgery.data.text.corpus import read_texts

    found = read_texts(["-"]).replace("\r\n", "\n").removesuffix("\n") if text == "-" else text
    if not found.strip():
        raise SurgeryError("the question is empty", 'surgery ask MODEL "Who are you?"')
    return found


@dataclass
class _Answer:
    """One answer to a question, made when its pieces are taken."""

    talk: Conversation
    question: str
    settings: ChatSettings
    of_base: bool
    """by the model without its adapter"""

    def pieces(self) -> Iterator[str]:
        """Yields the answer, with a line's end."""
        from nanogpt_surgery.lora.inject import disable_lora, enable_lora

        if self.of_base:
            disable_lora(self.talk.model)
        yield from self.talk.ask(self.question, **vars(self.settings))
        yield "\n"
        if self.of_base:
            enable_lora(self.talk.model)

    def to_dict(self) -> dict[str, Any]:
        """The answer and its end, as `generate --json` says it."""
        text = "".join(self.pieces()).removesuffix("\n")
        prefix, ended = "base_" if self.of_base else "", "length" if self.talk.cut_off else "stop"
        return {f"{prefix}answer": text, f"{prefix}ended": ended}

    def say_ending(self) -> None:
        """A note about an answer that is empty or was cut off."""
        name, room = "the base's answer" if self.of_base else "the answer", self.talk.room
        if self.talk.cut_off:
            short = room < self.settings.max_new_tokens
            why = "the model's context is full" if short else "--max-new-tokens"
            say(f"note: {name} was cut off after {room:,} tokens ({why})")
        elif not self.talk.messages[-1]["content"].strip():
            say(
                f"note: {name} is empty: the first thing the model said was the end of its turn; "
                "another --seed or --temperature may give one"
            )


def _print_json(answers: Sequence[_Answer], engine: str) -> None:
    first = answers[0]
    found: dict[str, Any] = {"question": first.question}
    if first.talk.system:
        found["system"] = first.talk.system
    for answer in answers:
        found |= answer.to_dict()
    found |= {"seed": first.settings.seed, "engine": engine}
    print(json.dumps(found, ensure_ascii=False, indent=2))


def _print_both(answers: Sequence[_Answer], headings: Sequence[str]) -> None:
    """Answers under their headings: side by side where there is room."""
    width = shutil.get_terminal_size().columns
    say(f"both answers are drawn by the seed {answers[0].settings.seed}")
    if not sys.stdout.isatty() or width < TWO_COLUMNS:
        for heading, answer in zip(headings, answers, strict=True):
            print(printable(f"--- {heading}"))
            write(answer.pieces())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3), expand=True)
    for _ in headings:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(printable(heading), "bold") for heading in headings))
    texts = ["".join(answer.pieces()).strip("\n") for answer in answers]
    table.add_row(*(Text(printable(text)) for text in texts))
    Console(width=width, highlight=False).print(table)
