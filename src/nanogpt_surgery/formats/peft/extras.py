"""`surgery.json`: what PEFT's files have no place for, beside them, where its readers do not look.

The fingerprint of the base, what was chosen for tied weights, and what fused matrices and PiSSA's
updates were put together from. A folder without it is an adapter all the same. (As metadata in the
safetensors file it would not do: its order, and with it the hash, changes from writing to writing.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.files.json_files import read_json
from nanogpt_surgery.formats.folders.old_keys import with_current_modules
from nanogpt_surgery.formats.peft.config import LARGEST_CONFIG
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.lora.stored_adapter import FusedParts, RankAndAlpha, StoredAdapter
from nanogpt_surgery.values import NOT_0, SIZE, TABLE, Kind, wrong_values

EXTRAS = "surgery.json"
# In the file an update's initial rank and alpha are called its birth, fused parts pieces.


def extras_of(adapter: StoredAdapter) -> dict[str, Any]:
    """The contents of the file for an adapter."""
    updates = adapter.updates
    return {
        "fingerprint": adapter.fingerprint,
        "tied": adapter.tied,
        "births": {name: u.initial for name, u in updates.items() if u.initial},
        "pieces": {name: u.fused_parts for name, u in updates.items() if u.fused_parts},
    }


def _is_rank_and_alpha(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and SIZE[1](value[0]) and NOT_0[1](value[1])


def _is_fused_part(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return value is None
    return _is_rank_and_alpha(value[:2]) and (value[2] is None or _is_rank_and_alpha(value[2]))


_TIED = Kind(
    f"null or one of {', '.join(get_args(Tied))}",
    lambda x: x in (None, *get_args(Tied)),
)
_ENTRIES: dict[str, Kind] = {
    "fingerprint": Kind("a sha256", lambda x: isinstance(x, str)),
    "births": Kind("[rank, alpha]", _is_rank_and_alpha),
    "pieces": Kind(
        "a list, each null or [rank, alpha, null or [rank, alpha]]",
        lambda x: isinstance(x, list) and all(_is_fused_part(part) for part in x),
    ),
}


def read_extras(path: Path) -> dict[str, Any]:
    """The contents of the file, or nothing where there is none.

    Raises:
        SurgeryError: a value is not of its kind (all of them at once).
    """
    extras = read_json(path, LARGEST_CONFIG) if path.is_file() else {}
    problems = wrong_values(TABLE, {"the whole": extras})
    if not problems:
        problems = wrong_values(_TIED, {"tied": extras.get("tied")})
        for key, kind in _ENTRIES.items():
            table = extras.get(key)
            problems += wrong_values(TABLE, {key: table}) or wrong_values(
                kind, {f"{key} of {quoted(name)}": value for name, value in (table or {}).items()}
            )
    if problems:
        raise SurgeryError(f"{path} is damaged: {'; '.join(problems[:12])}", f"rm {path}")
    return with_current_modules(extras)


def fused_parts_of(
    extras: dict[str, Any], name: str, rank: int
) -> tuple[RankAndAlpha | None, FusedParts | None]:
    """The initial rank and alpha of a layer's update, and the parts that it was fused from.

    Raises:
        SurgeryError: it does not add up to the rank.
    """
    initial = (extras.get("births") or {}).get(name)
    parts = (extras.get("pieces") or {}).get(name) or []
    found = [part for part in parts if part is not None]
    initials = [(rank, initial), *((whole, one) for whole, _, one in found)]
    adds_up = not parts or sum(whole for whole, _, _ in found) == rank
    if not adds_up or any(one and one[0] >= whole for whole, one in initials):
        raise SurgeryError(
            f"{EXTRAS} and the rank {rank} of {name} do not agree", f"delete that {EXTRAS}"
        )
    read = tuple(part and (*part[:2], _rank_and_alpha(part[2])) for part in parts)
    return _rank_and_alpha(initial), read or None


def _rank_and_alpha(value: list[Any] | None) -> RankAndAlpha | None:
    return None if value is None else (int(value[0]), float(value[1]))
