"""`surgery chat`: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path

from nanogpt_surgery.cli.chat.settings import DEFAULT_TALK, ChatSettings, TalkOptions
from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.model_options import (
    DEFAULT_OPENING,
    DEFAULT_SAMPLING,
    Model,
    OpeningOptions,
    SamplingOptions,
    named_adapters,
    say_engine,
)


def chat(
    model: Model,
    *,
    adapter: list[str] | None = None,
    talk: TalkOptions = DEFAULT_TALK,
    opening: OpeningOptions = DEFAULT_OPENING,
    sampling: SamplingOptions = DEFAULT_SAMPLING,
) -> None:
    """Talk with a model; answers appear as they are made, and Ctrl-C stops one.

    Lines that begin with / are commands: /help lists them.

    Parameters
    ----------
    adapter
        NAME=FOLDER, or a folder; may be given several times, the first takes part
    """
    from nanogpt_surgery.cli.chat.session import Session, lines_typed

    settings = ChatSettings(talk.max_new_tokens, **sampling.arguments())
    adapters = named_adapters(adapter or ())
    network, tokenizer = opening.open(model, adapters)
    folders: dict[str, Path | None] = {"": None, **dict(adapters)}
    templates = {name: talk.template_for(tokenizer, place) for name, place in folders.items()}
    first = adapters[0][1] if adapters else None
    session = Session(talk.conversation(network, tokenizer, first), settings, templates)
    if adapters:
        names = [name for name, _ in adapters]
        say(f"adapters: {', '.join(names)}; {names[0]} takes part")
    say_engine(network, settings.engine)
    say("/help lists the commands, /exit leaves; Ctrl-C stops an answer")
    for line in lines_typed():
        if not session.hear(line):
            return
