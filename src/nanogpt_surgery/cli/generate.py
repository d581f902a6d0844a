"""`surgery generate`: continue a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nanogpt_surgery.cli.console import printable
from nanogpt_surgery.cli.options import given, options_of_function
from nanogpt_surgery.errors import SurgeryError

LEFT_OUT = ("model", "ids", "max_new_tokens", "stop_ids")
GENERATE = "nanogpt_surgery.generation.generate:generate"
SamplingOptions: Any = options_of_function(GENERATE, "Sampling", LEFT_OUT)


def generate(
    model: Path,
    *,
    prompt: str = "\n",
    adapter: Path | None = None,
    max_new_tokens: int = 300,
    sampling: SamplingOptions = None,
) -> None:
    """Continue a prompt, on standard output as it is made.

    Parameters
    ----------
    model
        a run or a model folder
    prompt
        the text to continue; - reads it from standard input
    adapter
        an adapter folder, as finetune or peft writes it
    max_new_tokens
        how many tokens at most
    """
    from nanogpt_surgery.formats.adapter_layout import load_adapter
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.generation.generate import generate as continued

    network, tokenizer = open_model(model)
    if tokenizer is None:
        raise SurgeryError(f"{model} has no tokenizer.json, so a prompt cannot become ids")
    if adapter is not None:
        load_adapter(network, adapter)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = continued(network, tokenizer.encode(text), max_new_tokens, **given(sampling))
    clean = printable if sys.stdout.isatty() else str
    sys.stdout.write(clean(text))
    for new in ids:
        sys.stdout.write(clean(tokenizer.decode([new])))
        sys.stdout.flush()
    sys.stdout.write("\n")
