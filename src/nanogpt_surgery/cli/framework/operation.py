"""How an operation on a folder is done: flags that the commands share, and what they say."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.framework.options import Overwrite, check_out
from nanogpt_surgery.data.text.corpus import read_texts
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.formats.folders.operating import Act
    from nanogpt_surgery.report import Report

MADE = "made"  # the name, on the model, of the adapter that an operation makes
Operand: TypeAlias = Annotated[
    str, Parameter(help="a run or a model folder; with --out also a GGUF file or a hub name")
]


@Parameter(name="*", group="Operation")
@dataclass(frozen=True)
class OperationOptions:
    """How an operation is done to a folder."""

    out: Path | None = None
    """the folder to make; without it, where that can be, the folder itself changes, in one step"""
    overwrite: Overwrite = False
    drop_originals: bool = False
    """keep nothing of what was there: undo is then impossible"""
    probe: Path | None = None
    """a text to measure the effect on, in the model's tokens; without it, random tokens"""
    plan: bool = False
    """say what would change, its sizes, memory and time, and write nothing"""

    @property
    def made(self) -> str | None:
        """The name of the adapter that is made; without --out it goes into the weights."""
        return MADE if self.out else None

    def carry_out(
        self,
        model: str,
        act: Act,
        *,
        adapters: Mapping[str, Path] = MappingProxyType({}),
        made: str | None = None,
        in_place: Path | None = None,
        force: bool = False,
    ) -> Report:
        """Plans an operation, or does it, as `operate_on_folder`; says what can be typed next.

        Without --out it is `in_place` that changes, by default the model's folder.
        """
        from nanogpt_surgery.formats.folders.operating import goal_of, operate_on_folder

        out = self.out or in_place
        if made is not None and out is None:
            raise SurgeryError("--out is missing", "--out FOLDER names the adapter to make")
        goal, changes = goal_of(model, out, adapters, made)
        how = self.arguments(model, changes)
        done = operate_on_folder(model, act, out, adapters=adapters, made=made, force=force, **how)
        self.say(model, goal if changes else None, made)
        return done

    def arguments(self, model: str, changes: bool | None = None) -> dict[str, Any]:
        """As functions on folders take them.

        Args:
            model: the folder that changes without --out.
            changes: whether the folder that is written changes in place; by default as --out says.

        Raises:
            SurgeryError: --out is not to be written over.
        """
        from nanogpt_surgery.formats.folders.operating import goal_of

        if changes is None:
            _, changes = goal_of(model, self.out)
        if self.out is not None and not changes:
            check_out(self.out, self.overwrite or self.plan)  # a plan replaces nothing
        text = read_texts([self.probe]) if self.probe else None
        return {"keep_originals": not self.drop_originals, "probe": text, "plan": self.plan}

    def say(self, model: str, changed: Path | None = None, made: str | None = None) -> None:
        """Says what was done, to a folder that `changed` or a new one, and what to type next."""
        folder = shlex.quote(str(changed or self.out or model))
        if self.plan:
            there = self.out is not None and changed is None and self.out.exists()
            more = ", with --overwrite," if there and not self.overwrite else ""
            say(f"the same command without --plan{more} does it")
        elif self.out is None or changed is not None:
            back = f"surgery undo {folder} takes it back"
            back = "this cannot be undone" if self.drop_originals else back
            say(f"changed {folder}, and read it again; {back}")
        elif made is not None:
            say(f"wrote {folder}, and read it again; surgery merge {shlex.quote(model)} {folder}")
        else:
            say(f"wrote {folder}, and read it again; {model} is as it was")
