"""A command that torchrun started several times: one training by all of them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    pass

TOGETHER = ("train", "finetune")


def is_distributed() -> bool:
    """Whether torchrun started more than one process; others set `WORLD_SIZE` too."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this process is the one that speaks for all."""
    return not is_distributed() or os.environ.get("RANK", "0") == "0"


def joined(command: str) -> AbstractContextManager[object]:
    """The processes of a command, joined where there are several.

    Raises:
        SurgeryError: the command is none that several share, or there are fewer GPUs.
    """
    if not is_distributed():
        return nullcontext()
    if command not in TOGETHER:
        raise SurgeryError(
            f"{os.environ['WORLD_SIZE']} processes were started for surgery {command}, "
            f"and only {' and '.join(TOGETHER)} share their work",
            "run it without torchrun",
        )
    from nanogpt_surgery.training import distributed

    return distributed.joined()
