"""`surgery ask`: one question, answered once; or answered by a model with and without adapter."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.commands.chat import MESSAGES, TemplateChoice, say_template, template_named
from nanogpt_surgery.cli.framework.console import notes_afterwards, say
from nanogpt_surgery.cli.opening import Dtype, Force, OnTied, one_adapter, open_to_talk
from nanogpt_surgery.cli.sampling_options import AS_USUAL, SamplingOptions
from nanogpt_surgery.errors import SurgeryError, printable

if TYPE_CHECKING:
    from nanogpt_surgery.cli.chat.settings import ChatSettings
    from nanogpt_surgery.generation.conversation import Conversation

TWO_COLUMNS = 100  # characters of a terminal that has room for two answers side by side


def ask(
    model: str,
    question: str,
    *,
    adapter: str | None = None,
    compare: Annotated[bool, Parameter(negative="")] = False,
    system: str = "",
    template: Annotated[TemplateChoice, MESSAGES] = "auto",
    max_new_tokens: int = 512,
    dtype: Dtype = None,
    tied: OnTied = None,
    force: Force = False,
    sampling: SamplingOptions = AS_USUAL,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Ask a model one question; the answer alone is written on standard output.

    With --compare the model answers twice, without its adapter and with it, by the same seed:
    side by side on a wide terminal, one under the other elsewhere.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    question
        what is asked; - reads it from standard input
    adapter
        an adapter folder, as finetune or peft writes it
    compare
        show the answer of the model without the adapter beside that with it
    system
        what the model is told before the question
    max_new_tokens
        how many tokens an answer has at most
    json
        print a JSON object: question, answer, ended (stop or length), seed; with --compare also
        base_answer and base_ended
    """
    settings = _settings(sampling, max_new_tokens)
    if compare and adapter is None:
        raise SurgeryError("there is nothing to compare the model with", "add --adapter FOLDER")
    asker = _Asker(_question(question), system, template, settings)
    asker.open(model, adapter, dtype, tied, force)
    with notes_afterwards():
        if json or not compare:
            _print_json(asker, compare) if json else _write(asker.pieces())
        else:
            _print_both(asker, str(adapter))
    asker.say_endings()


def _settings(sampling: SamplingOptions, max_new_tokens: int) -> ChatSettings:
    """As the chat has them, with a seed, which two answers can share."""
    from nanogpt_surgery.cli.chat.settings import ChatSettings

    seed = random.randrange(2**31) if sampling.seed is None else sampling.seed
    return ChatSettings(sampling.settings(), max_new_tokens, sampling.stop, seed)


def _question(text: str) -> str:
    from nanogpt_surgery.data.text.corpus import read_texts

    found = read_texts(["-"]).replace("\r\n", "\n").removesuffix("\n") if text == "-" else text
    if not found.strip():
        raise SurgeryError("the question is empty", 'surgery ask MODEL "Who are you?"')
    return found


@dataclass
class _Asker:
    """One question, and the model that is asked it, as often as needed, each time afresh."""

    question: str
    system: str
    template: TemplateChoice
    settings: ChatSettings

    def open(self, model: str, adapter: str | None, *how: Any) -> None:
        """Open the model and its adapter, and say how messages are written."""
        network, tokenizer = open_to_talk(model, one_adapter(adapter), *how)
        self.network, self.tokenizer = network, tokenizer
        self.written = template_named(tokenizer, self.template)
        self.talks: dict[str, Conversation] = {}
        say_template(self.written)

    def pieces(self, who: str = "answer") -> Iterator[str]:
        """The pieces of an answer: of the base for "base", else with the adapter."""
        from nanogpt_surgery.generation.conversation import Conversation
        from nanogpt_surgery.lora.inject import disable_lora, enable_lora
        from nanogpt_surgery.lora.several import has_lora

        if has_lora(self.network):
            (disable_lora if who == "base" else enable_lora)(self.network)
        talk = self.talks[who] = Conversation(self.network, self.tokenizer, self.written)
        talk.system = self.system
        settings = self.settings
        return talk.ask(
            self.question,
            settings.max_new_tokens,
            settings.sampling,
            stop=settings.stop,
            seed=settings.seed,
        )

    def ended(self, who: str) -> str:
        """Whether an answer came to its end, or was cut off; as `generate --json` says it."""
        return "length" if self.talks[who].cut_off else "stop"

    def say_endings(self) -> None:
        """A note for each answer that is empty or was cut off."""
        for who, talk in self.talks.items():
            name = "the base's answer" if who == "base" else "the answer"
            if talk.cut_off:
                short = talk.room < self.settings.max_new_tokens
                why = "the model's context is full" if short else "--max-new-tokens"
                say(f"note: {name} was cut off after {talk.room:,} tokens ({why})")
            elif not talk.messages[-1]["content"].strip():
                say(
                    f"note: {name} is empty: the first thing the model said was the end of its "
                    "turn; another --seed or --temperature may give one"
                )


def _write(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_json(asker: _Asker, compare: bool) -> None:
    import json

    found: dict[str, Any] = {"question": asker.question}
    if asker.system:
        found["system"] = asker.system
    for who, prefix in (("base", "base_"), ("answer", "")):
        if compare or who == "answer":
            found[f"{prefix}answer"] = "".join(asker.pieces(who))
            found[f"{prefix}ended"] = asker.ended(who)
    found["seed"] = asker.settings.seed
    print(json.dumps(found, ensure_ascii=False, indent=2))


def _print_both(asker: _Asker, adapter: str) -> None:
    """Both answers, under their names."""
    width = shutil.get_terminal_size().columns
    say(f"both answers are drawn by the seed {asker.settings.seed}")
    if sys.stdout.isatty() and width >= TWO_COLUMNS:
        base, adapted = ("".join(asker.pieces(who)) for who in ("base", "answer"))
        _print_columns(base, adapted, adapter, width)
        return
    for heading, who in (("without adapter", "base"), (f"with {adapter}", "answer")):
        print(printable(f"--- {heading}"))
        _write(asker.pieces(who))


def _print_columns(base: str, adapted: str, adapter: str, width: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3), expand=True)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(printable(t), "bold") for t in ("without adapter", f"with {adapter}")))
    table.add_row(*(Text(printable(text.strip("\n"))) for text in (base, adapted)))
    Console(width=width, highlight=False).print(table)
