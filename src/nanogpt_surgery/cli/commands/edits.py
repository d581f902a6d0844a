"""`surgery model edit`: a fact edited, by a change of rank one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import show
from nanogpt_surgery.cli.framework.operation import MADE, Operand, OperationOptions
from nanogpt_surgery.cli.framework.options import Json
from nanogpt_surgery.data.text.corpus import read_texts

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.report import Report


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
        """As `edit` takes them."""
        from nanogpt_surgery.generation.settings import check_seed

        check_seed(self.seed)
        own = read_texts([self.text]) if self.text else None
        near = list(self.neighbour) or None
        return {"layer": self.layer, "text": own, "neighbours": near, "seed": self.seed}


def edit(
    model: Operand,
    *,
    prompt: str,
    subject: str,
    target: str,
    options: EditOptions = EditOptions(),
    operation: OperationOptions = OperationOptions(),
    json: Json = False,
) -> None:
    """Edit a fact (ROME, arXiv:2202.05262): in place, or into an adapter folder with --out.

    The target has to become likelier, or nothing is written. Prompts near it are reported. In place
    it goes into the weights, and surgery undo brings every byte back.

    Args:
        prompt: with {} in the place of the subject: "The capital of {} is"
        subject: whose fact it is: France
        target: how the prompt is to go on, usually with a space first: " Rome"
    """
    from nanogpt_surgery.data.tokenizers.tokenizer import required_tokenizer
    from nanogpt_surgery.surgery import edit as edited

    how = options.arguments() | {"merge": operation.out is None}

    def act(network: SimpleGPT, tokenizer: Tokenizer | None, probe: Any, plan: bool) -> Report:
        own = required_tokenizer(tokenizer, model)
        ids = probe if operation.probe else None  # by default the statistics' own text
        return edited(network, own, prompt, subject, target, MADE, probe=ids, plan=plan, **how)

    show(operation.carry_out(model, act, made=operation.made), json)
