"""One training, as `train` and `finetune` make it and a run carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt_surgery.cli.run_options import RunOptions
    from nanogpt_surgery.data.batches import Batches
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.training.settings import FitSettings


@dataclass(frozen=True)
class Job:
    """One training, from its parts to its folder."""

    options: RunOptions
    model: SimpleGPT
    tokenizer: Tokenizer
    dataset: Batches
    validation: Batches
    settings: FitSettings
    description: dict[str, Any]
    """what determines the run, beside settings and data"""
    write_weights: Callable[[Path], None]
    """write the files that others read: a model folder's or an adapter folder's"""
    cache_dir: Path | None = None
    """where hidden states are kept, if not in memory"""
    named: dict[str, Any] = field(default_factory=dict)
    """what was typed for that of which the description has but a hash"""


def job_of_all(
    options: RunOptions,
    model: SimpleGPT,
    tokenizer: Tokenizer,
    data: tuple[Batches, Batches],
    settings: FitSettings,
    known: dict[str, Any],
    base: str | None = None,
) -> Job:
    """The training of all weights of a model; what is `known` of it joins the description.

    What the folder of a `base` holds beside the weights is carried over to the run's.
    """
    from nanogpt_surgery.data.tokenizers.tokenizer import tokenizer_fingerprint
    from nanogpt_surgery.formats.model_file import write_model_files

    description = {
        "kind": "train",
        "model": model.config.to_dict(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    return Job(
        options=options,
        model=model,
        tokenizer=tokenizer,
        dataset=data[0],
        validation=data[1],
        settings=settings,
        description=description | known,
        write_weights=lambda folder: write_model_files(model, folder, tokenizer, base),
    )
