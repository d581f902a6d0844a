"""`surgery model edit`: a fact edited, as an adapter of rank one."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.options import Json, Model, Overwrite, check_out
from nanogpt_surgery.errors import SurgeryError


@Parameter(name="*")
@dataclass(frozen=True)
class EditOptions:
    """Options of an edit; None: its defaults."""

    layer: int | None = None
    """whose down_proj is changed; by default the one at a quarter of the depth"""
    text: Path | None = None
    """a text for the key statistics; by default 2,048 tokens that the model says by itself"""
    neighbour: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    """a prompt that should be answered as before; may be given several times; by default the
    prompt about what the model finds likeliest in the subject's place"""
    seed: int = 0
    """of the model's own text"""

    def arguments(self) -> dict[str, Any]:
        """As `edit_model` takes them."""
        from nanogpt_surgery.data.text.corpus import read_texts
        from nanogpt_surgery.generation.settings import check_seed

        check_seed(self.seed)
        own = read_texts([self.text]) if self.text else None
        near = list(self.neighbour) or None
        return {"layer": self.layer, "text": own, "neighbours": near, "seed": self.seed}


def edit(
    model: Model,
    *,
    prompt: str,
    subject: str,
    target: str,
    out: Path | None = None,
    overwrite: Overwrite = False,
    options: EditOptions = EditOptions(),
    plan: bool = False,
    json: Json = False,
) -> None:
    """Edit a fact (ROME, arXiv:2202.05262) into an adapter folder; the model stays as it is.

    The target has to become likelier, or nothing is written. Prompts near it are reported.

    Parameters
    ----------
    prompt
        with {} in the place of the subject: "The capital of {} is"
    subject
        whose fact it is: France
    target
        how the prompt is to go on, usually with a space first: " Rome"
    out
        the adapter folder to make
    plan
        say what would be changed, and write nothing
    """
    from nanogpt_surgery.formats.folders.editing import edit_model, plan_edit_model

    if plan:
        show(plan_edit_model(model, prompt, subject, target, layer=options.layer), json)
        say("the same command without --plan does it")
        return
    if out is None:
        raise SurgeryError("no folder to write is named", "add --out FOLDER, or --plan")
    check_out(out, overwrite)
    show(edit_model(model, prompt, subject, target, out, **options.arguments()), json)
    words = f"{shlex.quote(model)} {shlex.quote(str(out))}"
    say(f"wrote {out}; surgery merge {words} puts it into the weights")
