"""`surgery generate`: continue a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.options import given, options_of
from nanogpt_surgery.errors import SurgeryError, printable
from nanogpt_surgery.generation.settings import SamplingSettings

SamplingOptions: Any = options_of(SamplingSettings, "Sampling", leave_out=("logit_bias",))


def generate(
    model: str,
    *,
    prompt: str = "\n",
    adapter: Path | None = None,
    max_new_tokens: int = 300,
    stop: Annotated[list[str] | None, Parameter(group="Sampling", negative="")] = None,
    seed: Annotated[int | None, Parameter(group="Sampling")] = None,
    sampling: SamplingOptions = None,
) -> None:
    """Continue a prompt, on standard output as it is made.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    prompt
        the text to continue; - reads it from standard input
    adapter
        an adapter folder, as finetune or peft writes it
    max_new_tokens
        how many tokens at most
    stop
        a text that ends the answer and is not shown; may be given several times
    seed
        of the draw; without it each call draws differently
    """
    from nanogpt_surgery.data.tokenizer import prompt_ids
    from nanogpt_surgery.formats.adapter_layout import load_adapter
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.generation.text import generate_text

    settings = SamplingSettings(**given(sampling))
    network, tokenizer = open_model(model)
    if tokenizer is None:
        raise SurgeryError(f"{model} has no tokenizer, so a prompt cannot become ids")
    if adapter is not None:
        load_adapter(network, adapter)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = prompt_ids(tokenizer, text)
    pieces = generate_text(
        network, tokenizer, ids, max_new_tokens, settings, stop=stop or (), seed=seed
    )
    clean = printable if sys.stdout.isatty() else str
    sys.stdout.write(clean(text))
    for piece in pieces:
        sys.stdout.write(clean(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
