"""How a conversation begins, by flags, and how its answers are made, as /set changes it later."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.errors import SurgeryError, nearest
from nanogpt_surgery.generation.settings import (
    MOST_SEED,
    Engine,
    SamplingSettings,
    check_count,
    check_seed,
)

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.chat import ChatTemplate
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.generation.conversation import Conversation
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

NOTES = {
    "plain": "this model has no chat template, so it was probably not taught to converse: messages "
    'are written below "User:" and "Assistant:", and an answer ends where the next "User:" begins',
    "none": "what you type is continued as it stands: there are no roles, and answers have no end",
}


@Parameter(name="*")
@dataclass(frozen=True)
class TalkOptions:
    """How a conversation begins, and how long its answers may be."""

    system: str = ""
    """what the model is told before anything is said"""
    template: Literal["auto", "model", "chatml", "plain", "none"] = "auto"
    """how messages are written; auto: as the adapter was trained, else as with model: the model's
    own template, else chatml or plain, as its tokens allow"""
    max_new_tokens: int = 512
    """how many tokens an answer has at most"""

    def conversation(
        self, model: SimpleGPT, tokenizer: Tokenizer, adapter: Path | None = None
    ) -> Conversation:
        """A conversation of which only the system prompt is there.

        Says it where the model was probably not taught to converse.
        """
        from nanogpt_surgery.generation.conversation import Conversation

        talk = Conversation(model, tokenizer, self.template_for(tokenizer, adapter))
        talk.system = self.system
        source = talk.template.source
        taught = source == "plain" and getattr(tokenizer, "chat_template", None) is not None
        if talk.template.owner == "model" and not taught and (note := NOTES.get(source)):
            say(f"note: {note}")
        return talk

    def template_for(self, tokenizer: Tokenizer, adapter: Path | None) -> ChatTemplate:
        """The template that the flag says; with auto, the one that an adapter was trained with."""
        from nanogpt_surgery.data.conversations.chat import named_template, template_of

        if self.template not in ("auto", "model"):
            return named_template(tokenizer, self.template)
        if self.template == "auto" and (stored := stored_template(tokenizer, adapter)):
            return stored
        found = template_of(tokenizer)
        if found.source == "plain":
            try:
                tokenizer.encode("System:\nUser:\nAssistant:\n")
            except SurgeryError:  # a vocabulary of characters without these
                return replace(found, source="none")
        return found


def stored_template(tokenizer: Tokenizer, adapter: Path | None) -> ChatTemplate | None:
    """The template that lies beside an adapter, if one does.

    Raises:
        SurgeryError: its file is damaged, or beyond its limits.
    """
    from nanogpt_surgery.data.conversations.chat import template_from_jinja
    from nanogpt_surgery.formats.huggingface.tokenizer_files import chat_template_in
    from nanogpt_surgery.formats.peft.reading import adapter_folder

    text = None if adapter is None else chat_template_in(adapter_folder(adapter))
    return None if text is None else template_from_jinja(tokenizer, text)


DEFAULT_TALK = TalkOptions()


@dataclass(frozen=True)
class ChatSettings:
    """Settings of the answers to come: the arguments of `Conversation.ask`."""

    max_new_tokens: int
    sampling: SamplingSettings
    stop: tuple[str, ...] = ()
    seed: int | None = None
    engine: Engine = "auto"

    def __post_init__(self) -> None:
        check_count(self.max_new_tokens, 1)
        check_seed(self.seed)

    def after_an_answer(self) -> ChatSettings:
        """The settings of the next answer, whose seed is one more."""
        return self if self.seed is None else replace(self, seed=(self.seed + 1) % (MOST_SEED + 1))

    def to_dict(self) -> dict[str, Any]:
        """The settings that `changed` takes, by name."""
        own = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        return {k: v for k, v in (vars(self.sampling) | own).items() if k != "logit_bias"}

    def changed(self, name: str, text: str) -> ChatSettings:
        """The same with one of them set to what a text says.

        Raises:
            SurgeryError: there is no such setting, or the value is out of its range.
        """
        if name not in self.to_dict():
            close = nearest(name, self.to_dict(), 1)
            raise SurgeryError(f"there is no setting {name!r}", f"{close}? /set lists them")
        if not text:
            raise SurgeryError(f"{name!r} needs a value", f"/set {name} VALUE")
        change = {name: parsed(name, text)}
        if name not in ("max_new_tokens", "seed"):
            change = {"sampling": replace(self.sampling, **change)}
        return replace(self, **change)


def parsed(name: str, text: str) -> Any:
    """Returns the number that a text says, or None for none and off.

    Raises:
        SurgeryError: it is no number.
    """
    if text in ("none", "off"):
        return None
    with suppress(ValueError):
        return int(text)
    try:
        value = float(text)
    except ValueError:
        raise SurgeryError(f"{name} is {text!r}, which is not a number") from None
    return int(value) if value.is_integer() else value
