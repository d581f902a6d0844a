"""Models by their name on the Hugging Face hub, fetched by `huggingface_hub` and kept in its cache.

What is in the cache is used without asking the network. Only weights in safetensors and JSON files
are fetched, never code; a download that was cut off goes on where it stopped.
"""

from __future__ import annotations

import re
from pathlib import Path

from nanogpt_surgery.errors import SurgeryError, nearest
from nanogpt_surgery.formats.huggingface.safetensors_file import stored_tensors

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]


def is_hub_name(name: str) -> bool:
    """Whether it has the form of a name on the hub, owner/model."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def hub_folder(name: str, cache: str | Path | None = None) -> Path:
    """The folder of a model of the hub, fetched if it is not in the cache.

    Args:
        name: owner/model.
        cache: where copies are kept; None: where huggingface_hub keeps them.

    Raises:
        SurgeryError: there is no such model, or it cannot be reached. Where a folder here has the
            owner's name, a path in it was meant.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    cached = _cached(name, cache)
    if cached is not None:
        return cached
    try:
        fetched = snapshot_download(
            name, cache_dir=cache, allow_patterns=_FILES, ignore_patterns=["*/*"]
        )
    except (HfHubHTTPError, OSError) as error:
        _check_local(name)
        reason = str(error).strip().splitlines()[0]
        raise SurgeryError(
            f"{name} is no folder here, and it cannot be fetched from the Hugging Face hub: "
            f"{reason}",
            "check the name and the network, or name a folder or file that is on this machine",
        ) from error
    stored_tensors(Path(fetched))  # raises if the network is off and the copy is incomplete
    return Path(fetched)


def _check_local(name: str) -> None:
    """Raises `SurgeryError` for a name that begins with a folder that is here: it is mistyped."""
    owner, _, _ = name.partition("/")
    if Path(owner).is_dir():
        there = [path.name for path in Path(owner).iterdir() if not path.name.startswith(".")]
        close = nearest(name.rpartition("/")[2], sorted(there)) or "nothing"
        raise SurgeryError(f"there is no {name} here", f"{owner}/ has: {close}")


def _cached(name: str, cache: str | Path | None) -> Path | None:
    """The copy in the cache, if there is a whole one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, cache_dir=cache, local_files_only=True))
        whole = (folder / "config.json").is_file() and bool(stored_tensors(folder))
    except (LocalEntryNotFoundError, SurgeryError):
        return None
    return folder if whole else None
