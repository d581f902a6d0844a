"""What `train` and `finetune` share: one run, watched, saved, interruptible."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.console import Announced, say, show, watched
from nanogpt_surgery.cli.signals import signals

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nanogpt_surgery.cli.run_options import RunOptions
    from nanogpt_surgery.data.batches import Batches
    from nanogpt_surgery.lora.report import Report
    from nanogpt_surgery.training.checkpoint import Run
    from nanogpt_surgery.training.settings import FitSettings
    from nanogpt_surgery.training.step import Step


@dataclass(frozen=True)
class Job:
    """One training, from its parts to its folder."""

    options: RunOptions
    model: nn.Module
    dataset: Batches
    validation: Batches
    settings: FitSettings
    description: dict[str, Any]
    """what determines the run, beside settings and data"""
    write_weights: Callable[[Path], None]
    """write the files that others read: a model folder's or an adapter folder's"""
    keep_in: Path | None = None
    """where hidden states are kept, if not in memory"""
    named: dict[str, Any] = field(default_factory=dict)
    """what was typed for that of which the description has but a hash"""


def check_first(options: RunOptions, settings: FitSettings) -> None:
    """What can be refused, or said, before anything is read: the folder and the device.

    Raises:
        SurgeryError: the device is not there, or no run can begin or go on in the folder.
    """
    from nanogpt_surgery.formats.run_folder import checkpoints
    from nanogpt_surgery.training.checkpoint import check_folder
    from nanogpt_surgery.training.hardware import choose_hardware

    choose_hardware(settings)
    if options.plan:
        return
    check_folder(options.out, options.resume)
    if options.resume and not checkpoints(options.out):
        say(f"note: there is no checkpoint in {options.out}: --resume begins at step 0")


def carry_out(job: Job, done: str) -> None:
    """Train and show the report under what was `done`, or, with --plan, show what it will take."""
    from nanogpt_surgery.lora.report import Report

    report = _planned(job) if job.options.plan else Report(done, [], _trained(job))
    show(report, job.options.json)


def _trained(job: Job) -> dict[str, Any]:
    """Train to the end, or to a signal; returns the summary for the report."""
    from nanogpt_surgery.files import make_folder
    from nanogpt_surgery.training.checkpoint import start_run
    from nanogpt_surgery.training.fit import fit
    from nanogpt_surgery.training.hardware import choose_hardware, matmul_rate, operations_of
    from nanogpt_surgery.training.optimizer import make_optimizer

    start = monotonic()
    operations = operations_of(job.model, job.settings, job.dataset.block_size)
    hardware = choose_hardware(job.settings, operations)
    description = _description(job)
    with start_run(job.options.out, description, job.options.resume) as run, signals() as stop:
        job.model.to(hardware.device)
        optimizer = make_optimizer(job.model, job.settings)
        if run.checkpoint:
            run.restore(job.model, optimizer)
            say(f"going on from step {run.first_step:,} of {job.settings.max_steps:,}")
        say(f"computing on {hardware.describe()}")
        _say_what_is_measured(job)
        if job.keep_in:
            make_folder(job.keep_in)
        validation = Announced(job.validation)
        steps = fit(
            job.model,
            job.dataset,
            job.settings,
            validation=validation,
            optimizer=optimizer,
            first_step=run.first_step,
            keep_in=job.keep_in,
        )
        rate = matmul_rate(hardware.device, hardware.precision)
        full_rate = rate / _operations_per_token(job)
        stepped = 0.0
        for step in watched(steps, run.first_step, job.settings.max_steps, full_rate, validation):
            run.record(step)
            stepped += step.seconds
            asked = stop.signal  # once: it may come at any moment
            if step.validation_loss is not None or asked:
                run.save(step, job.write_weights, job.model, optimizer)
            if asked and step.step < job.settings.max_steps:
                _leave(job, step, asked)
        summary = _finish(job, run, rate, monotonic() - start - stepped)
        _record(run, description, summary)
        return summary


def _say_what_is_measured(job: Job) -> None:
    from nanogpt_surgery.data.batches import Spread, held_out

    held = held_out(job.validation, job.settings.evaluate_tokens)
    if isinstance(held, Spread):
        say(
            f"an evaluation reads one in {held.every} of the held-out windows, the same each time; "
            "--evaluate-tokens 0 reads all"
        )


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """The sha256 of tensors, one after the other."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _data_fingerprint(data: Batches) -> Any:
    """What tells data from other data: a hash, known already of files, or those of the sources."""
    from nanogpt_surgery.data.mixture import Mixture

    if isinstance(data, Mixture):
        return {"rows": data.counts, "sources": [_data_fingerprint(s) for s in data.sources]}
    known = getattr(data, "fingerprint", None)
    return known or fingerprint(tensor for batch in data.whole(1024) for tensor in batch)


def _description(job: Job) -> dict[str, Any]:
    return {
        **job.description,
        "named": job.named,
        "settings": job.settings.to_dict(),
        "block_size": job.dataset.block_size,
        "train_ids": _data_fingerprint(job.dataset),
        "validation_ids": _data_fingerprint(job.validation),
    }


def _leave(job: Job, step: Step, number: int) -> None:
    place = job.options.out
    say(f"saved after step {step.step:,} in {place}; the same command with --resume goes on")
    sys.exit(128 + number)


def _record(run: Run, description: dict[str, Any], summary: dict[str, Any]) -> None:
    """A line in the folder's journal, which `surgery log` shows; training is not undone.

    A run that is resumed when it is over has its line, unless it was killed before that.
    """
    from nanogpt_surgery.formats.folder_journal import Entry, hashes_of, read_journal, record

    files, base = hashes_of(run.folder), description.get("base", "")
    if read_journal(run.folder).files != files:
        operation = f"{description['kind']}, {summary['steps']:,} steps"
        record(run.folder, Entry(operation, base, {}, files, "none", measured=summary))


def _operations_per_token(job: Job) -> int:
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.training.frozen_prefix import prefix_for
    from nanogpt_surgery.training.utilisation import training_flops_per_token

    assert isinstance(job.model, SimpleGPT)
    kept = prefix_for(job.model, job.dataset, job.settings) is not None
    return training_flops_per_token(job.model, job.dataset.block_size, kept)


def _planned(job: Job) -> Report:
    """What the training will take; no folder is touched."""
    from nanogpt_surgery.lora.report import Report
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.training.planning import plan_training

    assert isinstance(job.model, SimpleGPT)
    summary = plan_training(job.model, job.dataset, job.settings, job.validation)
    return Report("training planned", [], summary)


def _finish(job: Job, run: Run, matmul_rate: float, beside: float) -> dict[str, Any]:
    """The summary; `beside` are the seconds for evaluations and else that was no step."""
    from nanogpt_surgery.data.mixture import passes
    from nanogpt_surgery.report.loss_plot import plot_losses, read_metrics

    metrics = read_metrics(run.folder / "metrics.jsonl")
    plot_losses(metrics, run.folder / "loss.png", title=str(job.options.out))
    losses = [row["validation_loss"] for row in metrics if row["validation_loss"] is not None]
    seconds = sum(row["seconds"] for row in metrics)
    rows = len(metrics) * job.settings.batch_size * job.settings.accumulation
    tokens = sum(row["tokens"] for row in metrics)
    return {
        "folder": str(job.options.out),
        "steps": len(metrics),
        "trained_parameters": sum(p.numel() for p in job.model.parameters() if p.requires_grad),
        "tokens": tokens,
        "trained_tokens": sum(row.get("trained_tokens", row["tokens"]) for row in metrics),
        "seconds_of_steps": round(seconds, 2),
        "seconds_in_all": round(seconds + beside, 2),
        "tokens_per_second": round(tokens / seconds),
        "matmul_GFLOPs": round(matmul_rate / 1e9),
        "utilisation": round(tokens / seconds * _operations_per_token(job) / matmul_rate, 4),
        "epochs": ", ".join(f"{share:.3g}" for share in passes(job.dataset, rows)),
        "validation_loss": losses[-1],
        "best_validation_loss": min(losses),
    }
