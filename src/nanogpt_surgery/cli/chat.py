"""A conversation in the terminal: its settings, and its lines, each said or a command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.framework.signals import first_signal
from nanogpt_surgery.errors import NotFiniteError, SurgeryError, nearest, printable
from nanogpt_surgery.files.writing import write_json
from nanogpt_surgery.generation.settings import (
    MOST_SEED,
    Engine,
    SamplingSettings,
    check_count,
    check_seed,
)

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.chat import ChatTemplate
    from nanogpt_surgery.generation.conversation import Conversation
    from nanogpt_surgery.generation.speculative import Draft


@dataclass(frozen=True)
class ChatSettings:
    """Settings of the answers to come: the arguments of `Conversation.ask`."""

    max_new_tokens: int
    sampling: SamplingSettings
    stop: tuple[str, ...] = ()
    seed: int | None = None
    engine: Engine = "auto"
    draft: Draft | None = None

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


class Session:
    """A conversation and its settings, driven by lines.

    A method named `do_…` is the command of that name; its docstring is what /help says.
    """

    def __init__(
        self,
        conversation: Conversation,
        settings: ChatSettings,
        templates: Mapping[str, ChatTemplate] | None = None,
    ):
        self.conversation, self.model = conversation, conversation.model
        self.settings, self.templates = settings, dict(templates or {})

    def hear(self, line: str) -> bool:
        """Answers a line or obeys it; returns whether to go on."""
        if line.strip() in ("/exit", "/quit"):
            return False
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._run_command(line)
            elif line.strip():
                self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except (SurgeryError, OSError) as error:
            if isinstance(error, NotFiniteError) and not sys.stdin.isatty():
                raise  # nobody is there who could choose another adapter
            say(str(error))
        except KeyboardInterrupt:
            self.conversation.weights_changed()  # it may have come in the middle of a layer
            say("stopped at once")
        return True

    def _ask(self, text: str) -> None:
        talk, before = self.conversation, self.conversation.forgotten
        came: list[int] = []  # Ctrl-C, after which another one is a KeyboardInterrupt
        with first_signal(came.append, signal.SIGINT):
            pieces = talk.ask(text, **vars(self.settings))
            self.settings = self.settings.after_an_answer()
            if talk.forgotten > before:
                block = self.model.config.block_size
                say(
                    f"note: the first {talk.forgotten} messages no longer fit the model's "
                    f"block_size of {block:,} tokens; it does not see them any more"
                )
            try:
                for piece in pieces:
                    sys.stdout.write(printable(piece))
                    sys.stdout.flush()
                    if came:
                        say("\nstopped; what was said so far is kept (/undo takes it back)")
                        break
            finally:
                sys.stdout.write("\n")
                sys.stdout.flush()

    def _run_command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in commands():
            close = nearest(name, commands(), 1)
            guess = f"/{close}? " if "," not in close else ""
            raise SurgeryError(f"there is no command /{name}", f"{guess}/help lists them")
        getattr(self, f"do_{name}")(rest.strip())

    def do_help(self, _rest: str) -> None:
        """This list."""
        for name in commands():
            say(f"  /{name:10}{getattr(Session, f'do_{name}').__doc__}")
        say("  /exit      Leave.\n  //…        Say something that begins with /.")

    def do_system(self, rest: str) -> None:
        """TEXT: what the model is told before the conversation."""
        self.conversation.system = rest
        say(f"the system prompt is: {rest}" if rest else "there is no system prompt")

    def do_reset(self, _rest: str) -> None:
        """Begin anew; the system prompt stays."""
        self.conversation.reset()
        say("nothing has been said")

    def do_undo(self, _rest: str) -> None:
        """Take the last exchange back."""
        say(f"taken back: {self.conversation.undo()}")

    def do_retry(self, _rest: str) -> None:
        """Another answer to the last message."""
        before = self.conversation.messages
        said = self.conversation.undo()
        left = self.conversation.messages
        try:
            self._ask(said)
        finally:
            if self.conversation.messages is left:  # there was no new attempt
                self.conversation.messages = before

    def do_adapter(self, rest: str) -> None:
        """NAME [WEIGHT]: let one adapter take part alone."""
        name, _, weight = rest.partition(" ")
        self._take_part({name: parsed("weight", weight) if weight else 1.0})

    def do_blend(self, rest: str) -> None:
        """NAME=WEIGHT NAME=WEIGHT …: let several adapters take part, as Σ wᵢ ΔWᵢ."""
        pairs = [word.partition("=") for word in rest.split()]
        if not pairs or not all(equals for _, equals, _ in pairs):
            raise SurgeryError("a blend needs weights", "/blend formal=0.7 brief=0.3")
        self._take_part({name: parsed(name, weight) for name, _, weight in pairs})

    def _take_part(self, weights: dict[str, float]) -> None:
        from nanogpt_surgery.lora.operations import blend_lora, enable_lora

        blend_lora(self.model, weights)
        enable_lora(self.model)
        self.conversation.weights_changed()
        self._use_template_of(max(weights, key=lambda name: abs(weights[name])))
        self.do_adapters("")

    def _use_template_of(self, adapter: str) -> None:
        """Writes messages as an adapter was trained; "" is the model without any."""
        self.conversation.template = self.templates.get(adapter, self.conversation.template)

    def do_base(self, _rest: str) -> None:
        """The model without any adapter."""
        from nanogpt_surgery.lora.operations import disable_lora

        disable_lora(self.model)
        self.conversation.weights_changed()
        self._use_template_of("")
        self.do_adapters("")

    def do_adapters(self, _rest: str) -> None:
        """Which adapters there are, and which take part."""
        from nanogpt_surgery.lora.several import adapter_weights

        weights = adapter_weights(self.model)
        if not weights:
            say("there are no adapters: surgery chat MODEL --adapter NAME=FOLDER loads one")
        for name, weight in weights.items():
            say(f"  {name}: " + ("waits" if weight is None else f"weight {weight:g}"))

    def do_set(self, rest: str) -> None:
        """NAME VALUE: change a setting of the answers; alone, show them all."""
        if rest:
            name, _, value = rest.replace("=", " ", 1).partition(" ")
            self.settings = self.settings.changed(name.replace("-", "_"), value.strip())
        shown = self.settings.to_dict().items()
        say("\n".join(f"  {name} {'off' if value is None else value}" for name, value in shown))

    def do_save(self, rest: str) -> None:
        """FILE: write the conversation as JSON, a record of instruction data."""
        from nanogpt_surgery.lora.several import adapter_weights

        path = _file_named(rest, "/save")
        if not self.conversation.messages:
            raise SurgeryError("nothing has been said that could be saved")
        if path.exists():
            raise SurgeryError(f"{path} exists", "choose a new name")
        system = self.conversation.system
        first = [{"role": "system", "content": system}] if system else []
        record = {
            "messages": [*first, *self.conversation.messages],
            "adapters": {n: w for n, w in adapter_weights(self.model).items() if w is not None},
            "settings": self.settings.to_dict(),
        }
        write_json(path, [record])
        say(f"wrote {path}")

    def do_load(self, rest: str) -> None:
        """FILE: go on with a conversation that was saved."""
        from nanogpt_surgery.data.conversations.instructions import read_conversation

        messages = read_conversation(_file_named(rest, "/load"))
        begins = messages[0]["role"] == "system"
        self.conversation.reset()
        self.conversation.system = messages[0]["content"] if begins else ""
        self.conversation.messages = messages[begins:]
        last = messages[-1]
        calls = ", ".join(call["function"]["name"] for call in last.get("tool_calls", ()))
        said = f"(no text, a call of {calls})" if last["content"] is None else last["content"]
        say(f"{len(messages) - begins} messages; the last was:\n{said}")


def commands() -> list[str]:
    """The names of the commands that a session obeys."""
    return [name.removeprefix("do_") for name in vars(Session) if name.startswith("do_")]


def lines_typed() -> Iterator[str]:
    """Yields the lines that the user types, up to the end of standard input."""
    if not sys.stdin.isatty():
        while data := sys.stdin.buffer.readline():  # Ctrl-C here leaves: nobody could type /exit
            yield data.decode(errors="replace").rstrip("\r\n")
        return
    import readline  # noqa: F401 - gives input() a history and editing

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\n/exit leaves")
        except EOFError:
            return


def _file_named(rest: str, command: str) -> Path:
    if not rest:
        raise SurgeryError(f"{command} needs a file", f"{command} talk.json")
    return Path(rest).expanduser()
