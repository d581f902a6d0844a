"""`plan_training`: what a training will take, from its sizes and from a few real steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nanogpt_surgery.data.gpt_dataset import Batch, Batches
from nanogpt_surgery.data.text.mixture import passes
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.estimates.live_tensors import LiveTensors
from nanogpt_surgery.training.estimates.memory_estimate import FLOAT32, training_memory
from nanogpt_surgery.training.estimates.timing import Part, affordable_part, cut, probed
from nanogpt_surgery.training.evaluation import EvalData, evaluate, subsample, windows_at_once
from nanogpt_surgery.training.hardware import Hardware, choose_hardware, operations_of
from nanogpt_surgery.training.settings import FitSettings

EVALUATED = 2  # batches of the held-out data
_OF_A_STEP = ("gradient_bytes", "activation_bytes", "logits_bytes")  # gone when it has ended


def plan_training(
    model: SimpleGPT,
    dataset: Batches,
    settings: FitSettings,
    validation: Batches | None = None,
    checkpoints: int = 1,
) -> dict[str, Any]:
    """Sizes in bytes, numbers, and seconds; a few steps are taken and undone to the bit.

    Steps and evaluations are measured on as few tokens as take about two seconds, and scaled.
    Where hidden states before the first part that learns are kept, the first pass over the windows,
    which computes them, is timed apart. Nothing is written. The disk is for so many `checkpoints`.

    Raises:
        SurgeryError: as `fit`.
    """
    hardware = choose_hardware(settings, operations_of(model, settings, dataset.block_size))
    model.to(hardware.device)
    part = affordable_part(model, dataset, settings)
    pace, state = probed(model, dataset, settings, part)
    memory = training_memory(model, dataset, settings, hardware, part, state)
    trained = memory["gradient_bytes"]
    rows = settings.windows
    evaluations = 0 if validation is None else _evaluations(settings)
    one, more = 0.0, 0
    if validation is not None:
        eval_data = subsample(validation, settings.evaluate_tokens)
        one, more = _evaluation(model, eval_data, settings, hardware, part)
    evaluating = memory["memory_bytes"] - sum(memory[part] for part in _OF_A_STEP) + more
    return {
        "computing_on": hardware.describe(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": trained // FLOAT32,
        **memory,
        "evaluation_bytes": more,
        "memory_bytes": max(memory["memory_bytes"], evaluating),
        "disk_bytes": checkpoints * (2 * trained + state),
        "steps": settings.max_steps,
        "tokens": rows * dataset.block_size,
        "epochs": ", ".join(f"{share:.3g}" for share in passes(dataset, rows)),
        **pace.to_dict(),
        "evaluations": evaluations,
        "seconds_an_evaluation": one,
        "seconds": pace.seconds(settings.max_steps) + evaluations * one,
    }


def _evaluations(settings: FitSettings) -> int:
    every = settings.evaluate_every
    return -(-settings.max_steps // every) if every else 1


@dataclass(frozen=True)
class _Some:
    """The first batches of held-out data, cut short."""

    first: list[Batch]

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        yield from self.first


def _evaluation(
    model: SimpleGPT, eval_data: EvalData, settings: FitSettings, hardware: Hardware, part: Part
) -> tuple[float, int]:
    """The seconds of an evaluation, and the most bytes that it holds beside the weights.

    Two batches of as many rows as an evaluation reads at once are measured, or of a part's.
    """
    at_once = windows_at_once(model, settings)
    rows = at_once if part.tokens == part.data.block_size * settings.batch_size else part.rows
    some = [cut(batch, part.block_size) for batch in islice(eval_data.iter_all(rows), EVALUATED)]
    start = time.perf_counter()
    with hardware.evaluating():
        evaluate(model, _Some(some), rows)
    took = time.perf_counter() - start
    with LiveTensors([*model.parameters(), *model.buffers()]) as live, hardware.evaluating():
        evaluate(model, _Some(some[:1]), rows)
    measured = sum(batch[1].numel() for batch in some)
    whole = sum(batch[1].numel() for batch in eval_data.iter_all(at_once))
    largest = min(whole, at_once * part.data.block_size)
    return took * whole / measured, int(live.most * max(1.0, largest / some[0][1].numel()))
