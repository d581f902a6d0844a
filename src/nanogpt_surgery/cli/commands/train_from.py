"""`surgery train --init-from`: all weights of a model that is there learn from more text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.runs.training import Training
    from nanogpt_surgery.training.settings import FitSettings


def check_beside(base: str, asked: dict[str, Any]) -> None:
    """Refuse what the model settles itself; a block_size only cuts windows.

    Args:
        base: the model.
        asked: the flags that shape a new model, by name, None where they were not given.

    Raises:
        SurgeryError: any of them was given (all of them).
    """
    found = [
        f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        for name, value in asked.items()
        if value is not None and name != "block_size"
    ]
    if found:
        raise SurgeryError(
            f"--init-from {base} brings the model and its tokenizer, which settle "
            f"{', '.join(found)}",
            f"leave {'it' if len(found) == 1 else 'them'} out; --block-size alone may stand beside "
            "--init-from, for shorter windows",
        )


def training_from(
    base: str,
    settings: FitSettings,
    text: tuple[str, ...],
    weights: str | None,
    block_size: int | None,
) -> Training:
    """The training of all weights of a model, in float32, from where they are.

    Raises:
        SurgeryError: the model does not open or has no tokenizer, the block_size is longer than
            its context, or the text holds instruction data or cannot be learned from.
    """
    import torch

    from nanogpt_surgery.cli.instruction_data import window
    from nanogpt_surgery.cli.sources import check_no_records, named_sources, say_windows
    from nanogpt_surgery.data.tokenizers.tokenizer import required_tokenizer
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.model.finite import check_finite_weights
    from nanogpt_surgery.runs.training import Training

    check_no_records(text, f"surgery finetune {base}")
    network, found = open_model(base, torch.float32)  # computed in what `fit` chooses
    check_finite_weights(network, base)
    tokenizer = required_tokenizer(found, base)
    length = window(block_size, network.config.block_size)
    dataset, validation = named_sources(text, weights, tokenizer).datasets(length)
    say_windows(dataset, validation)
    say(f"going on from {base}: all of its {network.n_parameters:,} parameters learn")
    named = {"model": base, "text": text, "weights": weights}
    data = dataset, validation
    return Training.of_model(network, tokenizer, data, settings, base, named=named)
