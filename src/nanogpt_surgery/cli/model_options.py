"""Flags of the commands that put text into a model, and the command that shows what it learned."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.framework.options import given, options_of
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.settings import (
    Engine,
    SamplingSettings,
    check_seed,
    check_stop,
)
from nanogpt_surgery.lora.settings import Tied

if TYPE_CHECKING:
    import torch

    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

CHARACTERS = "characters"
WITH_ADAPTER = "name its model, and the adapter with --adapter: {base} --adapter {path}"
Model: TypeAlias = Annotated[
    str, Parameter(help="a run, a model folder, a GGUF file or a hub name")
]
AdapterFolder: TypeAlias = Annotated[
    Path | None, Parameter(help="an adapter folder, as finetune or peft writes it")
]


@Parameter(name="*")
@dataclass(frozen=True)
class OpeningOptions:
    """How a model is opened to compute, and adapters on it."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """of the weights, and so of all that is computed; by default as they are stored, or float32
    where the processor has no bfloat16 arithmetic"""
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

        from nanogpt_surgery.data.tokenizers.tokenizer import required_tokenizer
        from nanogpt_surgery.formats.model_file import check_adapter, open_model
        from nanogpt_surgery.formats.peft.reading import load_adapter
        from nanogpt_surgery.lora.operations import swap_lora

        check_adapter(path, WITH_ADAPTER)
        wanted = None if self.dtype is None else getattr(torch, self.dtype)
        # An adapter knows its base by the weights as they are stored.
        model, found = open_model(path, "each" if adapters else wanted)
        tokenizer = required_tokenizer(found, path)
        wanted = wanted or _dtype_here(model)
        if wanted == torch.float32:
            model.float()
        for name, folder in adapters:
            load_adapter(model, folder, name=name, tied=self.tied, force=self.force)
        _cast(model, wanted)
        if adapters:
            swap_lora(model, adapters[0][0])
        return model, tokenizer


def _cast(model: SimpleGPT, dtype: torch.dtype) -> None:
    """Gives all weights a dtype but those of updates: A and B stay in float32."""
    from nanogpt_surgery.lora.linear import LoRAUpdate

    updates = [module for module in model.modules() if isinstance(module, LoRAUpdate)]
    kept = {parameter for update in updates for parameter in update.parameters()}
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)


def _dtype_here(model: SimpleGPT) -> torch.dtype:
    """That of most weights; float32 for bfloat16 where the processor would multiply one by one."""
    import torch

    from nanogpt_surgery.formats.placing import usual_dtype
    from nanogpt_surgery.training.hardware import cpu_has_bfloat16

    usual = usual_dtype((weight.dtype, weight.numel()) for weight in model.parameters())
    if usual != torch.bfloat16 or cpu_has_bfloat16():
        return usual
    say(
        "note: the weights are bfloat16, which this processor has no arithmetic for: computing in "
        f"float32, with {4 * model.n_parameters / 2**20:,.0f} MiB of weights instead of half of "
        "that; --dtype bfloat16 leaves them"
    )
    return torch.float32


def one_adapter(written: Path | None) -> list[tuple[str, Path]]:
    """The adapter of a command that takes one at most; NAME=FOLDER, as chat takes it, is FOLDER."""
    return [] if written is None else [("default", Path(_split(str(written))[1]))]


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


Chosen: Any = options_of(SamplingSettings, "Sampling", leave_out=("logit_bias",))


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
    chosen: Chosen = None

    def arguments(self) -> dict[str, Any]:
        """As `generate_text` and `Conversation.ask` take them.

        Raises:
            SurgeryError: one of them is out of its range.
        """
        check_seed(self.seed)
        check_stop(self.stop)
        sampling = SamplingSettings(**given(self.chosen), logit_bias=_biases(self.logit_bias))
        engine = "plain" if self.plain else "auto"
        return {"sampling": sampling, "stop": self.stop, "seed": self.seed, "engine": engine}


def say_engine(model: SimpleGPT, engine: Engine) -> str:
    """Returns what computes the tokens, in words; a note where the decoder cannot be used."""
    from nanogpt_surgery.generation.engine import chosen_engine

    choice = chosen_engine(model, engine)
    if engine == "auto" and choice.name == "plain":
        say(f"note: the compiled decoder is not used: {choice.reason}")
    return str(choice)


DEFAULT_OPENING, DEFAULT_SAMPLING = OpeningOptions(), SamplingOptions()


def _biases(written: Iterable[str]) -> dict[int, float]:
    biases = {}
    for text in written:
        index, _, bias = text.partition("=")
        try:
            biases[int(index)] = float(bias)
        except ValueError:
            raise SurgeryError(
                f"--logit-bias {text} is not ID=BIAS", "--logit-bias 42=-inf bans the id 42"
            ) from None
    return biases


@dataclass(frozen=True)
class InstructionSettings:
    """Which files are instruction data, and what of them is trained on."""

    data: Literal["auto", "text", "instructions"] = "auto"
    """what the files hold; auto: instructions where all are JSON, JSONL, CSV or TSV"""
    template: Literal["model", "chatml", "plain"] = "model"
    """how conversations are written: as the model's own template does, or as one of ours"""
    answers_only: bool = True
    """train on answers and what ends them, or on every token"""
    pack: bool = False
    """put several conversations in a row; they do not see each other"""


def named_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer in a folder that was named; None for one that is made of characters.

    Raises:
        SurgeryError: there is none in the folder.
    """
    from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer

    if name == CHARACTERS:
        return None
    found = open_tokenizer(name)
    if found is None:
        there = "it holds no tokenizer.json" if Path(name).is_dir() else "there is no such folder"
        raise SurgeryError(
            f"no tokenizer opens from {name}: {there}",
            "surgery tokenizer train TEXT --vocab-size 4096 --out FOLDER makes one",
        )
    return found


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
