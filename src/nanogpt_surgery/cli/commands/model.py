"""`surgery model prune`, `duplicate`, `combine`, `vocabulary`: operations on a model folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.options import (
    AllLayers,
    Json,
    Overwrite,
    check_out,
    weighted_folders,
)
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.formats.folders.model_surgery import Act, Plan
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.report import Report

Operand: TypeAlias = Annotated[
    str, Parameter(help="a run or a model folder; with --out also a GGUF file or a hub name")
]


@Parameter(name="*", group="Operation")
@dataclass(frozen=True)
class OperationOptions:
    """How an operation is done to a folder."""

    out: Path | None = None
    """the model folder to make; without it the model's own folder changes, in one step"""
    overwrite: Overwrite = False
    drop_originals: bool = False
    """keep nothing of what was there: undo is then impossible"""
    probe: Path | None = None
    """a text to measure the effect on, in the model's tokens"""
    plan: bool = False
    """say what would change and what it would take, and write nothing"""

    def carry_out(self, model: str, plan: Plan, act: Act) -> Report:
        """Plans the operation, or does it, and says what can be typed next."""
        from nanogpt_surgery.data.text.corpus import read_texts
        from nanogpt_surgery.formats.folders.merging import check_not_itself
        from nanogpt_surgery.formats.folders.model_surgery import operate_on_model, plan_on_model

        keep = not self.drop_originals
        if self.plan:
            planned = plan_on_model(model, plan, self.out, keep)
            say("the same command without --plan does it")
            return planned
        if self.out is not None:
            check_not_itself(model, self.out)
            check_out(self.out, self.overwrite)
        text = read_texts([self.probe]) if self.probe else None
        done = operate_on_model(model, act, self.out, keep_originals=keep, probe=text)
        folder = shlex.quote(str(self.out or model))
        if self.out is not None:
            say(f"wrote {folder}, and read it again; {model} is as it was")
        elif keep:
            say(f"changed {folder}, and read it again; surgery undo {folder} takes it back")
        else:
            say(f"changed {folder}, and read it again; this cannot be undone")
        return done


def prune(
    model: Operand,
    *,
    layers: Annotated[list[int], Parameter(consume_multiple=True)],
    operation: OperationOptions = OperationOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Take layers out of a model, and measure what that does to it.

    The config keeps step, with every list in it. The report has the sizes before and after, the KL
    divergence from the model of before, the loss of both, and the share of equal greedy tokens.

    Parameters
    ----------
    layers
        the numbers of those that go, from 0
    """
    from nanogpt_surgery.surgery import plan_prune, prune_layers
    from nanogpt_surgery.surgery.structure import random_ids

    def act(
        network: SimpleGPT, tokenizer: Tokenizer | None, probe: Tensor | None
    ) -> tuple[Tokenizer | None, Report]:
        ids = random_ids(network) if probe is None else probe
        return tokenizer, prune_layers(network, layers, probe=ids)

    report = operation.carry_out(model, lambda network, _: plan_prune(network, layers), act)
    show(report, json, all_layers)


def duplicate(
    model: Operand,
    *,
    layers: Annotated[list[int], Parameter(consume_multiple=True)],
    operation: OperationOptions = OperationOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Put a copy behind each of some layers, which adds nothing until it is trained.

    Every logit keeps its bits, or nothing has happened.

    Parameters
    ----------
    layers
        their numbers, from 0; one that comes twice gives two copies
    """
    from nanogpt_surgery.surgery import duplicate_layers, plan_duplicate

    def act(
        network: SimpleGPT, tokenizer: Tokenizer | None, probe: Tensor | None
    ) -> tuple[Tokenizer | None, Report]:
        return tokenizer, duplicate_layers(network, layers, probe=probe)

    report = operation.carry_out(model, lambda network, _: plan_duplicate(network, layers), act)
    show(report, json, all_layers)


def combine(
    model: Operand,
    tuned: Annotated[list[str], Parameter(help="MODEL or MODEL=WEIGHT, fine-tuned from it")],
    *,
    method: Literal["linear", "slerp", "ties", "dare"] = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    operation: OperationOptions = OperationOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Combine models that were fine-tuned from one base: what each has changed, with its weight.

    A negative weight takes away what a model learned. The effect is measured against the base.

    Parameters
    ----------
    method
        linear, slerp (two models), ties (arXiv:2306.01708) or dare (arXiv:2311.03099)
    rank
        of each matrix's change, by the nearest one of that rank; the report has the error
    density
        the share of entries that ties and dare keep
    seed
        of dare's draws
    """
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.surgery import combine_models, plan_combine_models
    from nanogpt_surgery.surgery.structure import random_ids

    weights, folders = weighted_folders(tuned)
    others = {name: open_model(folder, "each")[0] for name, folder in folders.items()}
    how: dict[str, Any] = {"method": method, "rank": rank, "density": density, "seed": seed}

    def act(
        network: SimpleGPT, tokenizer: Tokenizer | None, probe: Tensor | None
    ) -> tuple[Tokenizer | None, Report]:
        ids = random_ids(network) if probe is None else probe
        return tokenizer, combine_models(network, others, weights, **how, probe=ids)

    def plan(network: SimpleGPT, _: Tokenizer | None) -> Report:
        return plan_combine_models(network, others, weights, **how)

    show(operation.carry_out(model, plan, act), json, all_layers)


def vocabulary(
    model: Operand,
    *,
    add: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    special: bool = False,
    init: Literal["pieces", "mean"] | None = None,
    drop_unused: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    operation: OperationOptions = OperationOptions(),
    json: Json = False,
) -> None:
    """Give a model more tokens, or take those out that some texts do not use.

    Embedding, head, tokenizer and config change together, and the logits of all ids that stay keep
    their bits, or nothing has happened.

    Parameters
    ----------
    add
        tokens, as a text writes them
    special
        the new tokens are control tokens, which transformers can leave out of a decoded text
    init
        what a new row is the mean of: the pieces that the token replaces (by default), or all rows
    drop_unused
        files or folders of text; what they do not use goes, but for bytes and special tokens
    """
    if (add is None) == (drop_unused is None):
        raise SurgeryError("name the tokens to add, or the texts by which to drop", "--add TOKEN")
    chosen = {"special": special or None, "init": init}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if drop_unused is not None and chosen:
        raise SurgeryError(f"--{next(iter(chosen))} is for new tokens, and none is added")
    plan, act = _dropping(drop_unused) if drop_unused else _adding(add or [], chosen)
    show(operation.carry_out(model, plan, act), json)


def _adding(tokens: list[str], chosen: dict[str, Any]) -> tuple[Plan, Act]:
    """Returns how tokens are added to a model, planned and done."""
    from nanogpt_surgery.surgery import add_tokens, plan_add_tokens

    def plan(network: SimpleGPT, tokenizer: Tokenizer | None) -> Report:
        return plan_add_tokens(network, _required(tokenizer), tokens, **chosen)

    def act(
        network: SimpleGPT, tokenizer: Tokenizer | None, probe: Tensor | None
    ) -> tuple[Tokenizer | None, Report]:
        return add_tokens(network, _required(tokenizer), tokens, probe=probe, **chosen)

    return plan, act


def _dropping(paths: list[str]) -> tuple[Plan, Act]:
    """Returns how the tokens that texts do not use are dropped, planned and done."""
    from nanogpt_surgery.data.text.corpus import read_texts
    from nanogpt_surgery.surgery import drop_unused_tokens, plan_drop_unused_tokens

    text = read_texts(paths)

    def plan(network: SimpleGPT, tokenizer: Tokenizer | None) -> Report:
        return plan_drop_unused_tokens(network, _required(tokenizer), text)

    def act(
        network: SimpleGPT, tokenizer: Tokenizer | None, probe: Tensor | None
    ) -> tuple[Tokenizer | None, Report]:
        return drop_unused_tokens(network, _required(tokenizer), text, probe=probe)

    return plan, act


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    from nanogpt_surgery.data.tokenizers.tokenizer import required_tokenizer

    return required_tokenizer(tokenizer, "the model")
