"""Files of a model folder beside its weights, carried over to a folder written from it.

How to generate, the tokenizer with its padding and its templates, and what `config.json` says to
others: none of it is ours to drop.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.json_files import read_json
from nanogpt_surgery.formats.folders.old_keys import with_current_fields
from nanogpt_surgery.formats.huggingface.model_folder import OWN, config_from_json
from nanogpt_surgery.formats.huggingface.tokenizer_files import TOKENIZER
from nanogpt_surgery.model.config import GPTConfig

CONFIG = "config.json"
_GENERATION = ("generation_config.json",)
_TOKENIZER = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_TEMPLATES = "additional_chat_templates"


def has_tokenizer(source: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((source / name).is_file() for name in (TOKENIZER, "vocab.json", "tokenizer.model"))


def carry_files(source: Path, new: Path) -> None:
    """Copy the files of a model folder that are not of its weights, as they are."""
    for name in (*_GENERATION, *_TOKENIZER):
        if (source / name).is_file():
            shutil.copyfile(source / name, new / name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, new / _TEMPLATES)


def carried_config(source: Path, written: dict[str, Any], config: GPTConfig) -> dict[str, Any]:
    """Returns the `config.json` of `source`, with the dtype and the tied head as written.

    Of another model (other sizes than `config`) nothing is taken over.
    """
    old = read_json(source / CONFIG)
    try:
        theirs = config_from_json(old)
    except SurgeryError:
        return written
    tied = config_from_json(written).tie_head
    if dataclasses.replace(theirs, tie_head=tied, dropout=0.0) != dataclasses.replace(
        config, tie_head=tied, dropout=0.0
    ):
        return written
    changed: dict[str, Any] = {}
    if theirs.tie_head != tied:
        keys = ("tie_word_embeddings", "tie_head")
        changed |= {key: written[key] for key in keys if key in written}
    changed |= {key: written["dtype"] for key in ("dtype", "torch_dtype") if key in old}
    if old["model_type"] == OWN:
        old = with_current_fields(old)
    return old | changed
