"""`surgery model prune`, `duplicate`, `combine`, `vocabulary`: operations on a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import show
from nanogpt_surgery.cli.framework.operation import Operand, OperationOptions
from nanogpt_surgery.cli.framework.options import AllLayers, Json, weighted_folders
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.formats.folders.operating import Act
    from nanogpt_surgery.model.simple_gpt import SimpleGPT


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

    Args:
        layers: the numbers of those that go, from 0
    """
    from nanogpt_surgery.surgery import prune_layers

    report = operation.carry_out(
        model, lambda network, _, **more: prune_layers(network, layers, **more)
    )
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

    Args:
        layers: their numbers, from 0; one that comes twice gives two copies
    """
    from nanogpt_surgery.surgery import duplicate_layers

    report = operation.carry_out(
        model, lambda network, _, **more: duplicate_layers(network, layers, **more)
    )
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

    Args:
        method: linear, slerp (two models), ties (arXiv:2306.01708) or dare (arXiv:2311.03099)
        rank: of each matrix's change, by the nearest one of that rank; the report has the error
        density: the share of entries that ties and dare keep
        seed: of dare's draws
    """
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.surgery import combine_models

    weights, folders = weighted_folders(tuned)
    others = {name: open_model(folder, "each")[0] for name, folder in folders.items()}
    how: dict[str, Any] = {"method": method, "rank": rank, "density": density, "seed": seed}
    report = operation.carry_out(
        model, lambda network, _, **more: combine_models(network, others, weights, **how, **more)
    )
    show(report, json, all_layers)


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

    Args:
        add: tokens, as a text writes them
        special: the new tokens are control tokens, which transformers can leave out of a decoded
            text
        init: what a new row is the mean of: the pieces that the token replaces (by default), or all
            rows
        drop_unused: files or folders of text; what they do not use goes, but for bytes and special
            tokens
    """
    from nanogpt_surgery.data.tokenizers.tokenizer import required_tokenizer

    if (add is None) == (drop_unused is None):
        raise SurgeryError("name the tokens to add, or the texts by which to drop", "--add TOKEN")
    chosen = {"special": special or None, "init": init}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if drop_unused is not None and chosen:
        raise SurgeryError(f"--{next(iter(chosen))} is for new tokens, and none is added")
    act = _dropping(drop_unused) if drop_unused else _adding(add or [], chosen)

    def on_texts(network: SimpleGPT, tokenizer: Tokenizer | None, probe: Any, plan: bool) -> Any:
        ids = probe if operation.probe else None  # by default what is sure to stay
        return act(network, required_tokenizer(tokenizer, "the model"), probe=ids, plan=plan)

    show(operation.carry_out(model, on_texts), json)


def _adding(tokens: list[str], chosen: dict[str, Any]) -> Act:
    from nanogpt_surgery.surgery import add_tokens

    return lambda model, tokenizer, **how: add_tokens(model, tokenizer, tokens, **chosen, **how)


def _dropping(paths: list[str]) -> Act:
    from nanogpt_surgery.data.text.corpus import read_texts
    from nanogpt_surgery.surgery import drop_unused_tokens

    text = read_texts(paths)
    return lambda model, tokenizer, **how: drop_unused_tokens(model, tokenizer, text, **how)
