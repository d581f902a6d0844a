"""Lines typed into `surgery chat`: each is said to the model, or is a command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nanogpt_surgery.cli.chat.files import file_named, load_conversation, save_conversation
from nanogpt_surgery.cli.chat.settings import ChatSettings, number
from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.errors import NotFiniteError, SurgeryError, nearest, printable

if TYPE_CHECKING:
    from nanogpt_surgery.generation.conversation import Conversation


class Session:
    """A conversation and its settings, driven by lines.

    A method named `do_…` is the command of that name; its docstring is what /help says.
    """

    def __init__(self, conversation: Conversation, settings: ChatSettings):
        self.conversation, self.model = conversation, conversation.model
        self.settings = settings

    def hear(self, line: str) -> bool:
        """Answer a line or obey it; whether to go on."""
        if line.strip() in ("/exit", "/quit"):
            return False
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._obey(line)
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
        with _asked_to_stop() as asked:
            pieces = talk.ask(
                text,
                self.settings.max_new_tokens,
                self.settings.sampling,
                stop=self.settings.stop,
                seed=self.settings.seed,
            )
            self.settings.next_seed()
            if talk.forgotten > before:
                block = self.model.config.block_size
                say(f"note: the first {talk.forgotten} messages no longer fit the model's "
                    f"block_size of {block:,} tokens; it does not see them any more")  # fmt: skip
            _write(pieces, asked)

    def _obey(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command: Callable[[str], None] | None = getattr(self, f"do_{name}", None)
        if command is None:
            close = nearest(name, commands(), 1)
            guess = f"/{close}? " if "," not in close else ""
            raise SurgeryError(f"there is no command /{name}", f"{guess}/help lists them")
        command(rest.strip())

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
        self._take_part({name: number("weight", weight) if weight else 1.0})

    def do_blend(self, rest: str) -> None:
        """NAME=WEIGHT NAME=WEIGHT …: let several adapters take part, as Σ wᵢ ΔWᵢ."""
        pairs = [word.partition("=") for word in rest.split()]
        if not pairs or not all(equals for _, equals, _ in pairs):
            raise SurgeryError("a blend needs weights", "/blend formal=0.7 brief=0.3")
        self._take_part({name: number(name, weight) for name, _, weight in pairs})

    def _take_part(self, weights: dict[str, float]) -> None:
        from nanogpt_surgery.lora.inject import enable_lora
        from nanogpt_surgery.lora.operations import blend_lora

        blend_lora(self.model, weights)
        enable_lora(self.model)
        self.conversation.weights_changed()
        self.do_adapters("")

    def do_base(self, _rest: str) -> None:
        """The model without any adapter."""
        from nanogpt_surgery.lora.inject import disable_lora

        disable_lora(self.model)
        self.conversation.weights_changed()
        self.do_adapters("")

    def do_adapters(self, _rest: str) -> None:
        """Which adapters there are, and which take part."""
        from nanogpt_surgery.lora.several import adapter_names, has_lora

        if not has_lora(self.model):
            say("there are no adapters: surgery chat MODEL --adapter NAME=FOLDER loads one")
            return
        taking = self._taking_part()
        for name in adapter_names(self.model):
            say(f"  {name}: " + (f"weight {taking[name]:g}" if name in taking else "waits"))

    def _taking_part(self) -> dict[str, float]:
        from nanogpt_surgery.lora.several import (
            WeightedAdapters,
            active_adapters,
            has_lora,
            lora_layers,
        )

        if not has_lora(self.model):
            return {}
        active = active_adapters(self.model)
        assert isinstance(active, WeightedAdapters), "a conversation has one row"
        enabled = all(layer.enabled for layer in lora_layers(self.model).values())
        return dict(active.weights) if enabled else {}

    def do_set(self, rest: str) -> None:
        """NAME VALUE: change a setting of the answers; alone, show them all."""
        if rest:
            name, _, value = rest.replace("=", " ", 1).partition(" ")
            self.settings.change(name.replace("-", "_"), value.strip())
        shown = self.settings.to_dict().items()
        say("\n".join(f"  {name} {'off' if value is None else value}" for name, value in shown))

    def do_save(self, rest: str) -> None:
        """FILE: write the conversation as JSON, a record of instruction data."""
        path = file_named(rest, "/save")
        if not self.conversation.messages:
            raise SurgeryError("nothing has been said that could be saved")
        system = self.conversation.system
        first = [{"role": "system", "content": system}] if system else []
        record = {
            "messages": [*first, *self.conversation.messages],
            "adapters": self._taking_part(),
            "settings": self.settings.to_dict(),
        }
        save_conversation(path, record)
        say(f"wrote {path}")

    def do_load(self, rest: str) -> None:
        """FILE: go on with a conversation that was saved."""
        messages = load_conversation(file_named(rest, "/load"))
        begins = messages[0]["role"] == "system"
        self.conversation.reset()
        self.conversation.system = messages[0]["content"] if begins else ""
        self.conversation.messages = messages[begins:]
        say(f"{len(messages) - begins} messages; the last was:\n{messages[-1]['content']}")


def commands() -> list[str]:
    """The names of the commands that a session obeys."""
    return [name.removeprefix("do_") for name in vars(Session) if name.startswith("do_")]


def _write(pieces: Iterator[str], asked: Callable[[], bool]) -> None:
    try:
        for piece in pieces:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
            if asked():
                say("\nstopped; what was said so far is kept (/undo takes it back)")
                break
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C came since; a second one is a `KeyboardInterrupt`."""
    came: list[int] = []

    def note(number: int, _frame: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
