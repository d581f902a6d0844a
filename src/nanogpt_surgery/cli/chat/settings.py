"""How a conversation begins, by flags, and how its answers are made, as /set changes it later."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.errors import SurgeryError, nearest
from nanogpt_surgery.generation.settings import (
    MOST_SEED,
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
    template: Literal["auto", "chatml", "plain", "none"] = "auto"
    """how messages are written; auto: the model's own, else chatml or plain, as its tokens allow"""
    max_new_tokens: int = 512
    """how many tokens an answer has at most"""

    def conversation(self, model: SimpleGPT, tokenizer: Tokenizer) -> Conversation:
        """A conversation of which only the system prompt is there.

        Says it where the model was probably not taught to converse.
        """
        from nanogpt_surgery.generation.conversation import Conversation

        talk = Conversation(model, tokenizer, self._template_for(tokenizer))
        talk.system = self.system
        if note := NOTES.get(talk.template.source):
            say(f"note: {note}")
        return talk

    def _template_for(self, tokenizer: Tokenizer) -> ChatTemplate:
        from nanogpt_surgery.data.conversations.chat import template_of

        found = template_of(tokenizer)
        if self.template != "auto":
            return replace(found, source=self.template)
        if found.source == "plain":
            try:
                tokenizer.encode("System:\nUser:\nAssistant:\n")
            except SurgeryError:  # a vocabulary of characters without these
                return replace(found, source="none")
        return found


AS_USUAL = TalkOptions()


@dataclass(frozen=True)
class ChatSettings:
    """Settings of the answers to come: the arguments of `Conversation.ask`."""

    max_new_tokens: int
    sampling: SamplingSettings
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        check_count(self.max_new_tokens, 1)
        check_seed(self.seed)

    def after_an_answer(self) -> ChatSettings:
        """The settings of the next answer, whose seed is one more."""
        return self if self.seed is None else replace(self, seed=(self.seed + 1) % (MOST_SEED + 1))

    def to_dict(self) -> dict[str, Any]:
        """The settings that `changed` takes, by name."""
        named = [field.name for field in fields(SamplingSettings) if field.name != "logit_bias"]
        found = {name: getattr(self.sampling, name) for name in named}
        return found | {"max_new_tokens": self.max_new_tokens, "seed": self.seed}

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
        own = name in ("max_new_tokens", "seed")
        hint = get_type_hints(ChatSettings if own else SamplingSettings)[name]
        change = {name: parsed(name, text, hint)}
        return replace(self, **change if own else {"sampling": replace(self.sampling, **change)})


def parsed(name: str, text: str, hint: Any = float) -> Any:
    """Returns a finite number from a text, whole or absent if the type says so.

    Raises:
        SurgeryError: it is none.
    """
    if text in ("none", "off") and hint == int | None:
        return None
    try:
        value = float(text)
    except ValueError:
        raise SurgeryError(f"{name} is {text!r}, which is not a number") from None
    if not math.isfinite(value):
        raise SurgeryError(f"{name} is {text}; it must be finite")
    if hint is not float and value != int(value):
        raise SurgeryError(f"{name} is {text}; it must be a whole number")
    return value if hint is float else int(value)
