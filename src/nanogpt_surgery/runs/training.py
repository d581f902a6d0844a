"""Everything that a run needs to know of a training, and how many steps it has."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
from nanogpt_surgery.data.gpt_dataset import Batches
from nanogpt_surgery.data.text.mixture import Mixture, rows_in_epoch
from nanogpt_surgery.data.tokenizers.tokenizer import (
    Tokenizer,
    required_tokenizer,
    tokenizer_fingerprint,
)
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.formats.model_file import open_model, write_model_files
from nanogpt_surgery.formats.peft.writing import write_adapter_files
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.model.finite import check_finite_weights
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.training.settings import FitSettings


@dataclass(frozen=True)
class Training:
    """A model, the data that it learns from, and how; `of_model` and `of_adapter` make one."""

    model: SimpleGPT
    tokenizer: Tokenizer
    dataset: Batches
    validation: Batches
    settings: FitSettings
    description: dict[str, Any]
    """what determines the run, beside settings and data"""
    write_weights: Callable[[Path], None]
    """writes the files that others read: a model folder's or an adapter folder's"""
    cache_dir: Path | None = None
    """where hidden states are kept, if not in memory"""
    named: dict[str, Any] = field(default_factory=dict)
    """under what names model and data were given, where the description has but a hash"""
    patience: int = 0
    """evaluations in a row without improvement after which the training stops (0: never)"""
    save_every: str = "10m"
    """steps ("500") or time ("90s", "10m", "2h") from one checkpoint to the next"""
    sample_every: int | None = None
    """steps from one sample answer to the next; None: at evaluations, 0: none"""

    @classmethod
    def of_model(
        cls,
        model: SimpleGPT,
        tokenizer: Tokenizer,
        data: tuple[Batches, Batches],
        settings: FitSettings,
        base: str | Path | None = None,
        **more: Any,
    ) -> Training:
        """The training of all weights of a model, new, or opened from `base`.

        Args:
            model: what is trained.
            tokenizer: saved beside the weights.
            data: what to learn from, and what is held out.
            settings: of the training.
            base: what its folder holds beside the weights is carried over to the run's.
            **more: other fields of `Training`; entries of `description` join it.
        """
        known = {
            "kind": "train",
            "model": model.config.to_dict(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        if base is not None:
            known["base"] = fingerprint(model.state_dict().values())
        return cls(
            model,
            tokenizer,
            *data,
            settings,
            description=known | more.pop("description", {}),
            write_weights=lambda folder: write_model_files(model, folder, tokenizer, base),
            **more,
        )

    @classmethod
    def of_adapter(
        cls,
        model: SimpleGPT,
        tokenizer: Tokenizer,
        data: tuple[Batches, Batches],
        settings: FitSettings,
        injected: Report,
        adapter: LoRASettings,
        base: str,
        base_hash: str,
        chat_template: str | None = None,
        **more: Any,
    ) -> Training:
        """The training of a LoRA.

        Args:
            model: carries it.
            tokenizer: for sample answers.
            data: what to learn from, and what is held out.
            settings: see `FitSettings`.
            injected: what `inject_lora` reported.
            adapter: the settings that it was injected with.
            base: what the model was opened from; the adapter's config names it.
            base_hash: the `fingerprint` of its weights before the injection.
            chat_template: in Jinja, that conversations are written with; lies beside the adapter.
            **more: other fields of `Training`; entries of `description` join it.
        """
        known = {
            "kind": "finetune",
            "base": base_hash,
            "lora": injected.to_dict(),
            "adapter": adapter.to_dict(),
        }
        return cls(
            model,
            tokenizer,
            *data,
            settings,
            description=known | more.pop("description", {}),
            write_weights=lambda folder: write_adapter_files(
                model, folder, base, chat_template=chat_template
            ),
            **more,
        )

    def describe(self, environment: dict[str, Any], typed: Any = None) -> dict[str, Any]:
        """Returns everything that determines the run, for a resumed one to be compared with.

        Args:
            environment: the machine that it begins on.
            typed: the command that was typed, if one was.
        """
        return {
            **self.description,
            "typed": typed,
            "environment": environment,
            "named": self.named,
            "settings": self.settings.to_dict(),
            "block_size": self.dataset.block_size,
            "train_ids": _data_fingerprint(self.dataset),
            "validation_ids": _data_fingerprint(self.validation),
        }


def open_base(path: str) -> tuple[SimpleGPT, Tokenizer]:
    """Opens a model to train it further: in float32, and computed in what `fit` chooses.

    Raises:
        SurgeryError: it does not open, has weights that are not finite, or has no tokenizer.
    """
    model, tokenizer = open_model(path, torch.float32)
    check_finite_weights(model, path)
    return model, required_tokenizer(tokenizer, path)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """The sha256 of tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _data_fingerprint(data: Batches) -> Any:
    """A hash that is known already of files, or those of a mixture's sources."""
    if isinstance(data, Mixture):
        return {"rows": data.counts, "sources": [_data_fingerprint(s) for s in data.sources]}
    known = getattr(data, "fingerprint", None)
    return known or fingerprint(tensor for batch in data.iter_all(1024) for tensor in batch)


EPOCHS = 3.0  # of instruction data, where nothing is asked for
_SECONDS = {"s": 1, "m": 60, "h": 3600}
EVALUATIONS = 8  # in a run whose length follows from its data


def check_epochs(epochs: float | None, max_steps: int | None) -> None:
    """Raises `SurgeryError` for epochs out of range, or given together with a number of steps."""
    if epochs is None:
        return
    if not (math.isfinite(epochs) and epochs > 0):
        raise SurgeryError(f"epochs is {epochs}; it must be above 0 and finite")
    if max_steps is not None:
        raise SurgeryError(
            f"epochs {epochs:g} and max_steps {max_steps} both say how long to train",
            "leave one of them out",
        )


def with_length(
    settings: FitSettings,
    dataset: Batches,
    epochs: float | None = None,
    patience: int = 0,
    asked: frozenset[str] = frozenset(),
) -> FitSettings:
    """Returns the settings with the steps of so many epochs, and evaluations to match.

    Of instruction data, of epochs that were asked for, and where the training may stop early,
    there are several evaluations in a run however short it is.

    Args:
        settings: for a training on `dataset`.
        dataset: what is learned from.
        epochs: passes over it; None: 3 of instruction data, else `max_steps` stays.
        patience: evaluations without improvement after which it stops; 0 for no number.
        asked: names of settings that stay as they are.
    """
    instructions = isinstance(dataset, InstructionDataset)
    if epochs is None and instructions and "max_steps" not in asked:
        epochs = EPOCHS
    if epochs is not None:
        size = settings.batch_size * settings.grad_accum_steps
        steps = max(1, math.ceil(round(epochs * rows_in_epoch(dataset) / size, 6)))
        settings = replace(settings, max_steps=steps)
    if (instructions or epochs is not None or patience > 0) and "evaluate_every" not in asked:
        often = math.ceil(settings.max_steps / EVALUATIONS)
        settings = replace(settings, evaluate_every=min(settings.evaluate_every, often))
    return settings


def amount_of(dataset: Batches) -> str:
    """How much there is to learn from, in words: tokens of a text, examples of instruction data."""
    if not isinstance(dataset, InstructionDataset):
        return f"{round(rows_in_epoch(dataset) * dataset.block_size):,} tokens"
    examples = dataset.counts.examples - dataset.counts.dropped
    rows = f" in {len(dataset):,} rows" if len(dataset) != examples else ""
    return f"{examples:,} examples{rows}"


@dataclass
class SaveInterval:
    """So many steps, or so many seconds, from one checkpoint to the next."""

    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, text: str) -> SaveInterval:
        """The interval that a word such as 500 (steps), 90s, 10m or 2h means.

        Raises:
            SurgeryError: it means none.
        """
        found = re.fullmatch(r"(\d{1,12})([smh]?)", text.strip(), re.ASCII)
        if not found or int(found[1]) == 0:
            raise SurgeryError(
                f"save_every is {text!r}, which is no number of steps and no time",
                "for example 500 (steps), 90s, 10m or 2h",
            )
        number, unit = int(found[1]), found[2]
        return cls(seconds=number * _SECONDS[unit]) if unit else cls(steps=number)

    def __post_init__(self) -> None:
        self._last = monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time after a step."""
        if self.steps:
            return step % self.steps == 0
        return monotonic() - self._last >= self.seconds

    def saved(self) -> None:
        """Notes that a checkpoint was written: the interval begins anew."""
        self._last = monotonic()
