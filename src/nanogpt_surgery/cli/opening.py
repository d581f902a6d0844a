"""What every command that puts text into a model begins with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.cli.console import say
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

OF_THE_WEIGHTS = (
    "of the weights, and so of all that is computed; by default as they are stored, or float32 "
    "where the processor has no bfloat16 arithmetic"
)
Dtype: TypeAlias = Annotated[Literal["float32", "bfloat16"] | None, Parameter(help=OF_THE_WEIGHTS)]
OTHER_BASE = "take an adapter that was made for another base, with a warning"
Force: TypeAlias = Annotated[bool, Parameter(negative="", help=OTHER_BASE)]


def open_to_talk(
    path: str, adapters: Mapping[str, Path], dtype: Dtype = None, force: Force = False
) -> tuple[SimpleGPT, Tokenizer]:
    """A model with its tokenizer and named adapters; the first of them takes part alone.

    Args:
        path: whatever `open_model` opens.
        adapters: folders by name.
        dtype: of the weights; None: as stored, or float32 where bfloat16 would be slow.
        force: warn, instead of refusing, when an adapter was made for another base.

    Raises:
        SurgeryError: one of them does not open, or there is no tokenizer.
    """
    import torch

    from nanogpt_surgery.data.tokenizer import required_tokenizer
    from nanogpt_surgery.formats.adapter_layout import load_adapter
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.lora.mixing import swap_lora

    rounded = bool(adapters) and dtype == "bfloat16"  # adapters know their base as it is stored
    model, found = open_model(path, None if dtype is None or rounded else getattr(torch, dtype))
    tokenizer = required_tokenizer(found, path)
    if dtype is None:
        _leave_slow_bfloat16(model)
    for name, folder in adapters.items():
        load_adapter(model, folder, name=name, force=force)
    if rounded:
        _round_base(model)
    if adapters:
        swap_lora(model, next(iter(adapters)))
    return model, tokenizer


def _round_base(model: SimpleGPT) -> None:
    """Round all but the updates to bfloat16: A and B stay in float32, as on any such base."""
    import torch

    from nanogpt_surgery.lora.update import Update

    updates = [module for module in model.modules() if isinstance(module, Update)]
    kept = {parameter for update in updates for parameter in update.parameters()}
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)


def _leave_slow_bfloat16(model: SimpleGPT) -> None:
    """Make weights in bfloat16 float32 where the processor would multiply them one by one."""
    import torch

    from nanogpt_surgery.training.hardware import cpu_has_bfloat16

    if model.lm_head.weight.dtype != torch.bfloat16 or cpu_has_bfloat16():
        return
    model.float()
    say(
        "note: the weights are bfloat16, which this processor has no arithmetic for: computing in "
        f"float32, with {4 * model.n_parameters / 2**20:,.0f} MiB of weights instead of half of "
        "that; --dtype bfloat16 leaves them"
    )


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
