"""One rule for `--out`: what lies there is replaced with `--overwrite`, and else refused.

A training has another: it goes on with its run (`--resume`), and nothing replaces one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.errors import SurgeryError

REPLACE = "replace, in one step, the folder of ours or the GGUF file that lies at --out"
Overwrite: TypeAlias = Annotated[bool, Parameter(negative="", help=REPLACE)]


def room(memory: int | None, out: Path) -> dict[str, int]:
    """The free bytes that the figures of a plan are compared with: of memory, and of the disk."""
    from nanogpt_surgery.files.disk_errors import free_bytes

    found = {} if memory is None else {"available_bytes": memory}
    return found | {"free_bytes": free_bytes(out)}


def check_out(out: Path, overwrite: bool, *, is_file: bool = False) -> None:
    """Refuse, before any work, what may not be written over; an empty folder is nothing.

    Raises:
        SurgeryError: something lies at `out` that is a run, or another program's, or is not to be
            replaced.
    """
    from nanogpt_surgery.files.manifest import check_own_file, check_own_folder
    from nanogpt_surgery.formats.folders.run_folder import is_run

    if is_run(out):
        raise SurgeryError(f"{out} holds a run, which is not written over", "choose a new --out")
    (check_own_file if is_file else check_own_folder)(out)
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not overwrite:
        raise SurgeryError(
            f"{out} is there already", "add --overwrite to replace it, or choose a new --out"
        )
