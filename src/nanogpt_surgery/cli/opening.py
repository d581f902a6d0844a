"""Opens the model, adapter and tokenizer for commands that put text into a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import Tied

if TYPE_CHECKING:
    import torch

    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

OF_THE_WEIGHTS = (
    "of the weights, and so of all that is computed; by default as they are stored, or float32 "
    "where the processor has no bfloat16 arithmetic"
)
Dtype: TypeAlias = Annotated[Literal["float32", "bfloat16"] | None, Parameter(help=OF_THE_WEIGHTS)]
WITH_ADAPTER = "name its model, and the adapter with --adapter: {base} --adapter {path}"
OTHER_BASE = "take an adapter that was made for another base, with a warning"
Force: TypeAlias = Annotated[bool, Parameter(negative="", help=OTHER_BASE)]
SHARED_WEIGHT = (
    "what to do where an adapter changes a weight that layers share: refuse it, let that layer "
    "have one of its own, or adapt both; by default what the adapter was made with"
)
OnTied: TypeAlias = Annotated[Tied | None, Parameter(help=SHARED_WEIGHT)]


def open_to_talk(
    path: str,
    adapters: Mapping[str, Path],
    dtype: Dtype = None,
    tied: OnTied = None,
    force: Force = False,
) -> tuple[SimpleGPT, Tokenizer]:
    """A model with its tokenizer and named adapters; the first of them takes part alone.

    Args:
        path: whatever `open_model` opens.
        adapters: folders by name.
        dtype: of the weights; None: as stored, or float32 where bfloat16 would be slow.
        tied: what to do with layers that share a weight; None: what the adapter was made with.
        force: warn, instead of refusing, when an adapter was made for another base.

    Raises:
        SurgeryError: one of them does not open, or there is no tokenizer.
    """
    import torch

    from nanogpt_surgery.data.tokenizers.tokenizer import required_tokenizer
    from nanogpt_surgery.formats.model_file import check_adapter, open_model
    from nanogpt_surgery.formats.peft.adapter_layout import load_adapter
    from nanogpt_surgery.lora.operations import swap_lora

    check_adapter(path, WITH_ADAPTER)
    wanted = None if dtype is None else getattr(torch, dtype)
    model, found = open_model(path, "each" if adapters else wanted)  # they know it as it is stored
    tokenizer = required_tokenizer(found, path)
    wanted = wanted or _dtype_here(model)
    if wanted == torch.float32:
        model.float()
    for name, folder in adapters.items():
        load_adapter(model, folder, name=name, tied=tied, force=force)
    _give(model, wanted)
    if adapters:
        swap_lora(model, next(iter(adapters)))
    return model, tokenizer


def _give(model: SimpleGPT, dtype: torch.dtype) -> None:
    """Give all but the updates a dtype: A and B stay in float32."""
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


def one_adapter(folder: Path | str | None) -> dict[str, Path]:
    """The adapter of a command that takes one at most, under the usual name.

    NAME=FOLDER, as chat takes it, is that folder.
    """
    if folder is None:
        return {}
    plain = Path(str(folder).partition("=")[2])
    named = not Path(folder).is_dir() and plain.name and plain.is_dir()
    return {"default": plain if named else Path(folder)}


def named_adapters(written: Sequence[str]) -> dict[str, Path]:
    """Adapters written as NAME=FOLDER, or as a folder that gives its own name.

    A text that names a folder is that folder, also where it has a = in it.

    Raises:
        SurgeryError: two have one name, or a folder's name cannot be an adapter's.
    """
    found: dict[str, Path] = {}
    for text in written:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            name, folder = _own_name(text), text
        if name in found:
            raise SurgeryError(
                f"two adapters have the name {name!r}: {found[name]} and {folder}",
                "--adapter NAME=FOLDER names them",
            )
        found[name] = Path(folder)
    return found


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
