"""What every command that puts text into a model begins with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT


def open_to_talk(path: str, adapters: Mapping[str, Path]) -> tuple[SimpleGPT, Tokenizer]:
    """A model with its tokenizer and named adapters; the first of them takes part alone.

    Raises:
        SurgeryError: one of them does not open, or there is no tokenizer.
    """
    from nanogpt_surgery.data.tokenizer import required_tokenizer
    from nanogpt_surgery.formats.adapter_layout import load_adapter
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.lora.mixing import swap_lora

    model, tokenizer = open_model(path)
    tokenizer = required_tokenizer(tokenizer, path)
    for name, folder in adapters.items():
        load_adapter(model, folder, name=name)
    if adapters:
        swap_lora(model, next(iter(adapters)))
    return model, tokenizer


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
