"""`surgery merge`: a model with its adapter added in, in place or as a new folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import AllLayers, Json, say, show
from nanogpt_surgery.cli.framework.options import Overwrite, check_out
from nanogpt_surgery.lora.settings import Tied


@Parameter(name="*", group="Merge")
@dataclass(frozen=True)
class MergeOptions:
    """Options of `merge_adapter`, with its defaults."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of all weights to write; by default each keeps the one that it is stored in"""
    tolerance: float = 1e-3
    """largest mean KL divergence, adapted model to merged one, in nats a token"""
    force: bool = False
    """merge whatever was measured, and although the adapter was made for another base"""
    tied: Tied | None = None
    """what to do with weights that layers share; by default what the adapter was made with"""


DEFAULT_MERGE = MergeOptions()


def merge(
    model: str,
    adapter: Path,
    *,
    out: Path | None = None,
    overwrite: Overwrite = False,
    probe: Path | None = None,
    drop_originals: bool = False,
    plan: bool = False,
    options: MergeOptions = DEFAULT_MERGE,
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Add an adapter's ΔW to a model's weights, in place (surgery undo takes it back) or elsewhere.

    Parameters
    ----------
    model
        a run or a model folder; with --out also a GGUF file or a hub name
    adapter
        an adapter folder, as finetune or peft writes it
    out
        the model folder to make; without it the model's own folder changes, in one step
    probe
        a text to measure the merge on, in the model's tokens; without it, random tokens
    drop_originals
        keep nothing of what was there: undo is then impossible
    plan
        say what would be written and how much of ΔW survives, and write nothing
    """
    from nanogpt_surgery.data.text.corpus import read_texts
    from nanogpt_surgery.formats.folders.merging import check_not_itself, merge_adapter, plan_merge

    if out is not None and not plan:
        check_not_itself(model, out)
        check_out(out, overwrite)
    text = read_texts([probe]) if probe else None
    more: dict[str, Any] = {"probe": text, "keep_originals": not drop_originals, **vars(options)}
    if plan:
        show(plan_merge(model, adapter, out, **more), json, all_layers)
        say("the same command without --plan merges it")
        return
    show(merge_adapter(model, adapter, out, **more), json, all_layers)
    if out is not None:
        say(f"wrote {out}, read it again and measured it; {model} is as it was")
    else:
        back = "this cannot be undone" if drop_originals else f"surgery undo {model} takes it back"
        say(f"changed {model}, read it again and measured it; {back}")
