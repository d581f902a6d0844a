"""`surgery model edit`: a fact edited, as an adapter of rank one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.options import Json, Model, Overwrite, check_out
from nanogpt_surgery.errors import SurgeryError


def edit(
    model: Model,
    *,
    prompt: str,
    subject: str,
    target: str,
    out: Path | None = None,
    overwrite: Overwrite = False,
    layer: int | None = None,
    text: Path | None = None,
    neighbour: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    seed: int = 0,
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
    layer
        whose down_proj is changed; by default the one at a quarter of the depth
    text
        a text for the key statistics; by default 2,048 tokens that the model says by itself
    neighbour
        a prompt that should be answered as before; may be given several times; by default the
        prompt about what the model finds likeliest in the subject's place
    seed
        of the model's own text
    plan
        say what would be changed, and write nothing
    """
    from nanogpt_surgery.data.text.corpus import read_texts
    from nanogpt_surgery.formats.folders.editing import edit_model, plan_edit_model

    if plan:
        show(plan_edit_model(model, prompt, subject, target, layer=layer), json)
        say("the same command without --plan does it")
        return
    if out is None:
        raise SurgeryError("no folder to write is named", "add --out FOLDER, or --plan")
    check_out(out, overwrite)
    own = read_texts([text]) if text else None
    near = list(neighbour) or None
    options: dict[str, Any] = {"layer": layer, "text": own, "neighbours": near, "seed": seed}
    show(edit_model(model, prompt, subject, target, out, **options), json)
    words = f"{shlex.quote(model)} {shlex.quote(str(out))}"
    say(f"wrote {out}; surgery merge {words} puts it into the weights")
