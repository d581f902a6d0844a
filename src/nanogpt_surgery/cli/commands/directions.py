"""`surgery model direction`: a direction between two kinds of prompts, to steer by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.options import (
    AdapterFolder,
    Json,
    Model,
    OpeningOptions,
    Overwrite,
    one_adapter,
)
from nanogpt_surgery.data.conversations.record_files import read_prompts
from nanogpt_surgery.data.text.corpus import read_texts
from nanogpt_surgery.errors import SurgeryError

PROBE_TOKENS = 256


@Parameter(name="*")
@dataclass(frozen=True)
class DirectionOptions:
    """Where a direction is looked for, and what is done with it."""

    point: Literal["residual", "residual_before", "residual_between"] = "residual"
    """where in the block: behind it (which a control vector needs), before it, or between its
    halves"""
    position: int | Literal["mean"] = -1
    """of the token in each prompt, -1 the last; or mean, of all of them"""
    operation: Literal["add", "project_out"] = "add"
    """what --steer will do with it: add it, or take out what points along it"""
    scale: float = 1.0
    """of what is added, a negative one leads the other way; of what is taken out, the share"""

    def arguments(self) -> dict[str, Any]:
        """As `mean_difference` takes them."""
        position = None if self.position == "mean" else self.position
        return {"position": position, "operation": self.operation, "scale": self.scale}


def direction(
    model: Model,
    *,
    positive: Path,
    negative: Path,
    layer: tuple[int, ...],
    out: Path | None = None,
    overwrite: Overwrite = False,
    chosen: DirectionOptions = DirectionOptions(),
    adapter: AdapterFolder = None,
    probe: Path | None = None,
    plan: bool = False,
    opening: OpeningOptions = OpeningOptions(),
    json: Json = False,
) -> None:
    """Find the direction from prompts of one kind to prompts of another, to follow with --steer.

    Args:
        positive: a file of prompts that it leads to: a line each, or JSON, JSONL, CSV or TSV with
            prompt
        negative: a file of prompts that it leads away from
        layer: the block, from 0; may be given several times
        out: the file to make: safetensors; a name that ends in .gguf is a control vector of
            llama.cpp
        probe: a text to compare the steered model on; the negative prompts by default
        plan: say what it will take, and write nothing
    """
    import torch

    from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
    from nanogpt_surgery.formats.direction_file import save_direction
    from nanogpt_surgery.formats.huggingface.config import family_of
    from nanogpt_surgery.surgery import mean_difference, plan_direction

    goal = _goal(out, overwrite, plan)
    network, tokenizer = opening.open(model, one_adapter(adapter))
    ids_of = partial(prompt_ids, tokenizer)
    to, away = ([ids_of(text) for text in read_prompts(path)] for path in (positive, negative))
    points = [f"layers.{number}.{chosen.point}" for number in layer]
    if goal is None:
        show(plan_direction(network, to, away, points), json, True)
        say("the same command without --plan finds it")
        return
    length = min(PROBE_TOKENS, network.config.block_size)
    ids = torch.tensor([ids_of(read_texts([probe or negative]))[:length]])  # (1, T)
    found, report = mean_difference(network, to, away, points, probe=ids, **chosen.arguments())
    save_direction(found, goal, family=family_of(network.config))
    show(report, json, True)
    say(f'wrote {goal}, read it again; surgery generate {model} --prompt "…" --steer {goal}=1')


def _goal(out: Path | None, overwrite: bool, plan: bool) -> Path | None:
    """The file to make; None for a plan."""
    if plan:
        return None
    if out is None:
        raise SurgeryError("no file to write is named", "add --out FILE, or --plan")
    if out.exists() and not overwrite:
        raise SurgeryError(
            f"{out} is there already", "add --overwrite to replace it, or choose a new --out"
        )
    return out
