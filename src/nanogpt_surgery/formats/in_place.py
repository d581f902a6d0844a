"""A model written anew into a folder that holds one: what is true of what was there stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanogpt_surgery.files import read_json, write_json
from nanogpt_surgery.formats.huggingface import config_from_json
from nanogpt_surgery.formats.model_file import CONFIG, TENSORS, model_folder


def keep_config(new: Path, place: Path) -> None:
    """Let a new config say what that of `place` says, but for the dtype and the tied head."""
    old, written = read_json(model_folder(place) / CONFIG), read_json(new / CONFIG)
    changed: dict[str, Any] = {}
    if config_from_json(old).tie_head != config_from_json(written).tie_head:
        changed |= {
            key: written[key] for key in ("tie_word_embeddings", "tie_head") if key in written
        }
    changed |= {key: written["dtype"] for key in ("dtype", "torch_dtype") if key in old}
    write_json(new / CONFIG, old | changed)


def leave_away(new: Path, place: Path) -> None:
    """Drop the new files that `place` has already; of configs only one that says the same.

    A run may lack any of them: a kill came before its checkpoint was shown at the top.
    """
    for file in [path for path in new.iterdir() if path.name != TENSORS]:
        there = place / file.name
        if there.is_file() and (file.name != CONFIG or read_json(there) == read_json(file)):
            file.unlink()
