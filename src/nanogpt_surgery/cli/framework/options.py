"""Flags made from dataclasses of settings, and flags that several commands share."""

from __future__ import annotations

import dataclasses
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeAlias,
    get_args,
    get_origin,
    get_type_hints,
)

from cyclopts import Parameter
from docstring_parser import parse_from_object

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.data.text.corpus import read_texts
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.settings import Engine, SamplingSettings, check_seed, check_stop
from nanogpt_surgery.lora.settings import Tied

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.chat import ChatTemplate
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.generation.conversation import Conversation
    from nanogpt_surgery.generation.speculative import Draft
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

CHARACTERS = "characters"
WITH_ADAPTER = "name its model, and the adapter with --adapter: {base} --adapter {path}"
TOKENIZER = "a folder with a tokenizer.json, as surgery tokenizer train makes it; or characters"
REPLACE = "replace, in one step, the folder of ours or the GGUF file that lies at --out"
ALL = Parameter(name="--all", help="show each layer, not one line for all of a kind")
AllLayers: TypeAlias = Annotated[bool, ALL]
Json: TypeAlias = Annotated[bool, Parameter(help="print the report as JSON")]
Overwrite: TypeAlias = Annotated[bool, Parameter(help=REPLACE)]
Model: TypeAlias = Annotated[
    str, Parameter(help="a run, a model folder, a GGUF file or a hub name")
]
AdapterFolder: TypeAlias = Annotated[
    Path | None, Parameter(help="an adapter folder, as finetune or peft writes it")
]


def options_of(
    source: type,
    group: str,
    leave_out: tuple[str, ...] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """A dataclass with the fields of `source`, each None unless given on the command line.

    The help of a flag is the string under its field; the default shown is the field's own, if
    `defaults` has no other.
    """
    hints = get_type_hints(source)
    texts = {one.arg_name: one.description for one in parse_from_object(source).params}
    fields = [
        (
            field.name,
            Annotated[
                hints[field.name] | None,
                Parameter(help=" ".join((texts[field.name] or "").split())),
                _parameter(field, hints[field.name], defaults),
            ],
            dataclasses.field(default=None),
        )
        for field in dataclasses.fields(source)
        if field.name not in leave_out
    ]
    made = dataclasses.make_dataclass(f"{source.__name__}Options", fields, frozen=True)
    made.__module__ = __name__  # else cyclopts takes it for a builtin type
    return Parameter(name="*", group=group)(made) | None  # pydantic, where loaded, sees the default


def _parameter(field: dataclasses.Field[Any], hint: Any, defaults: Mapping[str, Any]) -> Parameter:
    own = "the model's" if field.default is dataclasses.MISSING else field.default
    shown = defaults.get(field.name, own)
    if any(get_origin(kind) is dict for kind in get_args(hint)):
        return Parameter(converter=_pairs, n_tokens=-1, consume_multiple=True)
    opposite = field.metadata.get("opposite", f"no-{field.name.replace('_', '-')}")
    return Parameter(
        show_default=lambda _: shown, negative=f"--{opposite}" if hint is bool else None
    )


def given(options: Any) -> dict[str, Any]:
    """The options that were set, by field name."""
    if options is None:
        return {}
    return {name: value for name, value in vars(options).items() if value is not None}


def _pairs(hint: Any, tokens: Any) -> dict[str, Any]:
    """`v_proj=4 q_proj=2` on the command line, or a table in a config file, as a dict."""
    number = hint.__args__[1]
    pairs = {}
    for token in _tokens(tokens):
        name, _, value = (
            (".".join(token.keys), "", token.value) if token.keys else token.value.rpartition("=")
        )
        try:
            pairs[name] = number(value)
        except ValueError:
            name = ""
        if not name:
            raise SurgeryError(
                f"{token.value!r} is no layer with its number", "for example v_proj=4 q_proj=2"
            )
    return pairs


def _tokens(tokens: Any) -> Iterator[Any]:
    """The tokens in nested dicts and lists."""
    if hasattr(tokens, "value"):
        yield tokens
        return
    for inner in tokens.values() if isinstance(tokens, dict) else tokens:
        yield from _tokens(inner)


@Parameter(name="*", group="LoRA")
@dataclass(frozen=True)
class TargetOptions:
    """Options of `inject_lora`; None: its default."""

    targets: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, show_default=lambda _: "q_proj v_proj"),
    ] = None
    """names of layers or their endings, regular expressions, or all-linear"""


@Parameter(name="*")
@dataclass(frozen=True)
class OpeningOptions:
    """How a model is opened to compute, and adapters on it."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """of the weights, and so of all that is computed; by default as they are stored, or float32
    where the processor has no bfloat16 arithmetic"""
    quantize: Literal["int8", "int4"] | None = None
    """keep the weights in 8 or 4 bits and compute in float32: in a quarter or a sixth of the
    memory, and sooner; blocks of a GGUF file that are no wider are taken as they lie"""
    tied: Tied | None = None
    """what to do where an adapter changes a weight that layers share: refuse it, let that layer
    have one of its own, or adapt both; by default what the adapter was made with"""
    force: bool = False
    """take an adapter that was made for another base, with a warning"""

    def open(self, path: str, adapters: Sequence[tuple[str, Path]]) -> tuple[SimpleGPT, Tokenizer]:
        """Opens a model with its tokenizer and named adapters; the first of them takes part alone.

        Raises:
            SurgeryError: one of them does not open, or there is no tokenizer.
        """
        import torch

        from nanogpt_surgery.formats.model_file import check_adapter
        from nanogpt_surgery.formats.opening import open_with_adapters
        from nanogpt_surgery.training.hardware import cpu_has_bfloat16

        check_adapter(path, WITH_ADAPTER)
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return open_with_adapters(
            path,
            adapters,
            dtype,
            tied=self.tied,
            force=self.force,
            bfloat16=cpu_has_bfloat16(),
            quantize=self.quantize,
        )


def named_adapters(written: Sequence[str]) -> list[tuple[str, Path]]:
    """Adapters written as NAME=FOLDER, or as a folder that gives its own name.

    Raises:
        SurgeryError: two have one name, or a folder's name cannot be an adapter's.
    """
    found: dict[str, str] = {}
    for text in written:
        name, folder = _split(text)
        name = name or _own_name(folder)
        if name in found:
            raise SurgeryError(
                f"two adapters have the name {name!r}: {found[name]} and {folder}",
                "--adapter NAME=FOLDER names them",
            )
        found[name] = folder
    return [(name, Path(folder)) for name, folder in found.items()]


def weighted_folders(
    written: Sequence[str], taken: str = ""
) -> tuple[dict[str, float], dict[str, Path]]:
    """Returns the weight and the folder of each FOLDER=WEIGHT, by names made of the folders'.

    A name is never `taken`; without a weight it is 1.

    Raises:
        SurgeryError: a weight is no number.
    """
    weights, folders = dict[str, float](), dict[str, Path]()
    for text in written:
        folder, weight = path_and_number(text)
        name = plain = re.sub(r"[^A-Za-z0-9_-]", "-", Path(folder).resolve().name)[:60] or "folder"
        while name in weights or name == taken:
            name = f"{plain}-{len(weights) + 1}"
        weights[name], folders[name] = 1.0 if weight is None else weight, Path(folder)
    return weights, folders


def path_and_number(written: str) -> tuple[str, float | None]:
    """PATH=NUMBER, or a PATH; a text that names what is there is a path, = in it or not.

    Raises:
        SurgeryError: what stands behind the = is no number.
    """
    path, equals, number = written.rpartition("=")
    if not equals or Path(written).exists():
        return written, None
    try:
        return path, float(number)
    except ValueError:
        raise SurgeryError(f"{written} is not PATH=NUMBER: {number} is no number") from None


def one_adapter(written: Path | None) -> list[tuple[str, Path]]:
    """The adapter of a command that takes one at most; NAME=FOLDER, as chat takes it, is FOLDER."""
    return [] if written is None else [("default", Path(_split(str(written))[1]))]


def _split(written: str) -> tuple[str, str]:
    """A name, or "", and a folder; a text that names a folder is that folder, = in it or not."""
    name, equals, folder = written.partition("=")
    return (name, folder) if equals and not Path(written).is_dir() else ("", written)


def _own_name(folder: str) -> str:
    name = Path(folder).resolve().name
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    if plain != name:
        raise SurgeryError(
            f"{folder} cannot give its adapter the name {name!r}: a name has letters, digits, - "
            "and _",
            f"name it: --adapter {plain}={folder}",
        )
    return name


@Parameter(name="*", group="Sampling")
@dataclass(frozen=True)
class SamplingOptions:
    """Options of sampling, and of where a text ends."""

    stop: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    """a text that ends an answer and is not shown; may be given several times"""
    logit_bias: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    """ID=BIAS, added to the logit of an id; -inf bans it; may be given several times"""
    seed: int | None = None
    """of the first draw, one more for each next; without it each draws differently"""
    plain: bool = False
    """compute every token by the code as it is read (generation/generate.py), and not by the
    compiled decoder, which is quicker"""
    chosen: options_of(SamplingSettings, "Sampling", ("logit_bias",)) = None  # type: ignore[valid-type]

    def arguments(self) -> dict[str, Any]:
        """As `generate_text` and `Conversation.ask` take them.

        Raises:
            SurgeryError: one of them is out of its range.
        """
        check_seed(self.seed)
        check_stop(self.stop)
        biases = dict(map(_bias, self.logit_bias))
        sampling = SamplingSettings(**given(self.chosen), logit_bias=biases)
        own = {"stop": self.stop, "seed": self.seed, "engine": self.engine}
        return own | {"sampling": sampling}

    @property
    def engine(self) -> Engine:
        """Returns the engine that is asked for."""
        return "plain" if self.plain else "auto"


def say_engine(model: SimpleGPT, engine: Engine) -> str:
    """Returns what computes the tokens, in words; a note where the decoder cannot be used."""
    from nanogpt_surgery.generation.engine import chosen_engine

    choice = chosen_engine(model, engine)
    if engine == "auto" and choice.name == "plain":
        say(f"note: the compiled decoder is not used: {choice.reason}")
    return str(choice)


def _bias(written: str) -> tuple[int, float]:
    index, _, bias = written.partition("=")
    try:
        return int(index), float(bias)
    except ValueError:
        raise SurgeryError(
            f"--logit-bias {written} is not ID=BIAS", "--logit-bias 42=-inf bans the id 42"
        ) from None


@Parameter(name="*", group="Speculation")
@dataclass(frozen=True)
class SpeculationOptions:
    """A draft of the next tokens, of which one pass verifies several."""

    speculate: Literal["lookup"] | None = None
    """lookup: guess what followed the last tokens where they stood before in the text; the answer
    stays the same, and comes sooner where it repeats what was said"""
    draft_model: Annotated[
        str | None, Parameter(help="a smaller model with the same tokenizer that guesses them")
    ] = None
    draft_tokens: int | None = None
    """how many are guessed at once; 10 by lookup, 5 by a model, unless said"""


@Parameter(name="*")
@dataclass(frozen=True)
class SteeringOptions:
    """Directions that a model follows while it computes."""

    steer: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    """FILE or FILE=SCALE: a direction to follow at every token, as surgery model direction makes
    it, or a control vector of llama.cpp; may be given several times"""

    @contextmanager
    def steering(self, model: SimpleGPT) -> Iterator[None]:
        """Within the block, the model follows them.

        Raises:
            SurgeryError: a file cannot be read, or belongs to a model of another width.
        """
        with ExitStack() as stack:
            for written in self.steer:
                from nanogpt_surgery.formats.direction_file import load_direction
                from nanogpt_surgery.surgery import steer

                path, scale = path_and_number(written)
                stack.enter_context(steer(model, load_direction(path), scale))
            yield

    def say_engine(self, model: SimpleGPT, engine: Engine) -> str:
        """The same as `say_engine` for the model that follows them."""
        with warnings.catch_warnings(action="ignore"), self.steering(model):  # no pass is made
            return say_engine(model, engine)


@Parameter(name="*")
@dataclass(frozen=True)
class WritingOptions:
    """How a model is opened, and how it chooses its tokens."""

    opening: OpeningOptions = OpeningOptions()
    sampling: SamplingOptions = SamplingOptions()
    speculation: SpeculationOptions = SpeculationOptions()
    steering: SteeringOptions = SteeringOptions()

    def draft(self, tokenizer: Tokenizer) -> Draft | None:
        """Returns what guesses tokens, or None where nothing is to.

        Raises:
            SurgeryError: both ways are asked for, the model does not open, or it has another
                tokenizer.
        """
        from nanogpt_surgery.data.tokenizers.tokenizer import tokenizer_fingerprint
        from nanogpt_surgery.generation.speculative import DraftModel, PromptLookup

        said, other = self.speculation, self.speculation.draft_model
        count = {} if said.draft_tokens is None else {"num_tokens": said.draft_tokens}
        if said.speculate and other:
            raise SurgeryError("--speculate lookup and --draft-model both guess: name one of them")
        if other is None:
            return PromptLookup(**count) if said.speculate else None
        model, own = self.opening.open(other, [])
        if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
            raise SurgeryError(
                f"{other} has another tokenizer than the model whose tokens it is to guess",
                "a smaller model of the same family has the same",
            )
        return DraftModel(**count, model=model, engine=self.sampling.engine)


def typed_or_read(text: str) -> str:
    """A text, or for - what standard input holds."""
    return read_texts(["-"]).replace("\r\n", "\n") if text == "-" else text


def say_accepted(draft: Draft | None) -> None:
    """A note that says which share of what was guessed was right."""
    if draft is not None:
        share, count = draft.accepted_share, draft.drafted
        say(f"note: {share:.0%} of {count:,} drafted tokens were accepted")


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
        from nanogpt_surgery.formats.opening import template_to_talk

        return template_to_talk(tokenizer, self.template, adapter)


def check_out(out: Path, overwrite: bool, *, is_file: bool = False) -> None:
    """Raises, before any work, if `out` may not be written over; an empty folder may.

    What lies at `--out` is replaced with `--overwrite`, and else refused. A training has another
    rule: it goes on with its run (`--resume`), and nothing replaces one.

    Raises:
        SurgeryError: something lies at `out` that is a run, or another program's, or is not to be
            replaced.
    """
    from nanogpt_surgery.files.atomic import check_own_file, check_own_folder
    from nanogpt_surgery.formats.folders.run_folder import is_run

    if is_run(out):
        raise SurgeryError(f"{out} holds a run, which is not written over", "choose a new --out")
    (check_own_file if is_file else check_own_folder)(out)
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not overwrite:
        raise SurgeryError(
            f"{out} is there already", "add --overwrite to replace it, or choose a new --out"
        )


def next_command(
    model: str | Path, adapter: str | Path | None = None, *, talks: bool = False
) -> str:
    """How to talk with a model that `talks`, or to continue a text with any other."""
    words = shlex.quote(str(model))
    if adapter is not None:
        words += f" --adapter {shlex.quote(str(adapter))}"
    if talks:
        return f"surgery chat {words} talks with it"
    return f"surgery generate {words} --prompt … continues a text with it"
