"""`surgery chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.opening import Dtype, Force, OnTied, named_adapters, open_to_talk
from nanogpt_surgery.cli.sampling_options import AS_USUAL, SamplingOptions

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.chat import ChatTemplate
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer

_PLAIN = (
    "this model has no chat template, so it was probably not taught to converse: messages are "
    'written below "User:" and "Assistant:", and an answer ends where the next "User:" begins'
)
TemplateChoice: TypeAlias = Literal["auto", "chatml", "plain", "none"]
MESSAGES = Parameter(
    help="how messages are written; auto: the model's own, else chatml or plain, as its tokens "
    "allow"
)
_NONE = "what you type is continued as it stands: there are no roles, and answers have no end"


def chat(
    model: str,
    *,
    system: str = "",
    adapter: Annotated[list[str] | None, Parameter(negative="")] = None,
    template: Annotated[TemplateChoice, MESSAGES] = "auto",
    max_new_tokens: int = 512,
    dtype: Dtype = None,
    tied: OnTied = None,
    force: Force = False,
    sampling: SamplingOptions = AS_USUAL,
) -> None:
    """Talk with a model; answers appear as they are made, and Ctrl-C stops one.

    Lines that begin with / are commands: /help lists them.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    system
        what the model is told before the conversation
    adapter
        NAME=FOLDER, or a folder; may be given several times, the first takes part
    max_new_tokens
        how many tokens an answer has at most
    """
    from nanogpt_surgery.cli.chat.session import Session
    from nanogpt_surgery.cli.chat.settings import ChatSettings
    from nanogpt_surgery.generation.conversation import Conversation

    settings = ChatSettings(sampling.settings(), max_new_tokens, sampling.stop, sampling.seed)
    adapters = named_adapters(adapter or ())
    network, tokenizer = open_to_talk(model, adapters, dtype, tied, force)
    conversation = Conversation(network, tokenizer, template_named(tokenizer, template))
    conversation.system = system
    session = Session(conversation, settings)
    _greet(conversation.template, list(adapters))
    for line in _lines():
        if not session.hear(line):
            return


def template_named(tokenizer: Tokenizer, name: TemplateChoice) -> ChatTemplate:
    """The template of this name; for auto the model's own, or the one of ours that it can write."""
    from nanogpt_surgery.data.conversations.chat import template_of
    from nanogpt_surgery.errors import SurgeryError

    found = template_of(tokenizer)
    if name != "auto":
        return replace(found, source=name)
    if found.source == "plain":
        try:
            tokenizer.encode("System:\nUser:\nAssistant:\n")
        except SurgeryError:  # a vocabulary of characters without these
            return replace(found, source="none")
    return found


def say_template(template: ChatTemplate) -> None:
    """A note where a model was probably not taught to converse."""
    note = {"plain": _PLAIN, "none": _NONE}.get(template.source)
    if note:
        say(f"note: {note}")


def _greet(template: ChatTemplate, adapters: list[str]) -> None:
    say_template(template)
    if adapters:
        say(f"adapters: {', '.join(adapters)}; {adapters[0]} takes part")
    say("/help lists the commands, /exit leaves; Ctrl-C stops an answer")


def _lines() -> Iterator[str]:
    """Yields the lines that the user types, up to the end of standard input."""
    if not sys.stdin.isatty():
        yield from _piped()
        return
    import readline  # noqa: F401 - gives input() a history and editing

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\n/exit leaves")
        except EOFError:
            return


def _piped() -> Iterator[str]:
    while True:
        data = sys.stdin.buffer.readline()  # Ctrl-C here leaves: nobody could type /exit
        if not data:
            return
        yield data.decode(errors="replace").rstrip("\r\n")
