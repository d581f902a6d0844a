"""The summary of a run that is over."""

from __future__ import annotations

from typing import Any

from nanogpt_surgery.data.text.mixture import passes
from nanogpt_surgery.formats.folders.run_folder import METRICS
from nanogpt_surgery.runs.checkpoints import RunFolder
from nanogpt_surgery.runs.loss_plot import plot_losses
from nanogpt_surgery.runs.metrics_file import read_metrics
from nanogpt_surgery.runs.samples import read_samples
from nanogpt_surgery.runs.training import Training
from nanogpt_surgery.training.trainable_stages import training_flops_per_token


def operations_per_token(training: Training) -> int:
    """Floating-point operations of a training step for each token."""
    kept = False
    if training.settings.fast:
        from nanogpt_surgery.training.fast.frozen_prefix import prefix_for

        kept = prefix_for(training.model, training.dataset, training.settings) is not None
    return training_flops_per_token(training.model, training.dataset.block_size, kept)


def summary_of(
    training: Training, run: RunFolder, matmul_rate: float, beside: float
) -> dict[str, Any]:
    """The summary; `beside` are the seconds for evaluations and else that was no step."""
    rows_of_all = read_metrics(run.folder / METRICS)
    metrics = [row for row in rows_of_all if row["step"]]
    base = training.description.get("kind") == "finetune"
    plot_losses(rows_of_all, run.folder / "loss.png", title=str(run.folder), base=base)
    seconds = sum(row["seconds"] for row in metrics)
    rows = len(metrics) * training.settings.batch_size * training.settings.grad_accum_steps
    tokens = sum(row["tokens"] for row in metrics)
    return {
        "folder": str(run.folder),
        "steps": len(metrics),
        "trained_parameters": sum(
            p.numel() for p in training.model.parameters() if p.requires_grad
        ),
        "tokens": tokens,
        "trained_tokens": sum(row.get("trained_tokens", row["tokens"]) for row in metrics),
        "seconds_of_steps": round(seconds, 2),
        "seconds_in_all": round(seconds + beside, 2),
        "tokens_per_second": round(tokens / seconds),
        "matmul_GFLOPs": round(matmul_rate / 1e9),
        "utilisation": round(tokens / seconds * operations_per_token(training) / matmul_rate, 4),
        "epochs": ", ".join(f"{share:.3g}" for share in passes(training.dataset, rows)),
        "skipped_steps": sum(row.get("skipped", False) for row in metrics),
        **_losses(rows_of_all),
        "ended": _ending(training, len(metrics)),
        **_samples(run),
    }


def _losses(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The validation losses before the first step, at the end and where it was least."""
    found = {row["step"]: row["validation_loss"] for row in metrics}
    found = {step: loss for step, loss in found.items() if loss is not None}
    before, after = found.pop(0, None), found
    best = min(after, key=lambda step: after[step], default=None)
    return {
        "validation_loss_before": before,
        "validation_loss": after[max(after)] if after else None,
        "best_validation_loss": None if best is None else after[best],
        "best_step": best,
    }


def _ending(training: Training, steps: int) -> str:
    if steps == training.settings.max_steps:
        return "all steps done"
    return (
        f"stopped early, {training.patience} evaluations in a row without improvement; "
        f"{steps:,} of {training.settings.max_steps:,} steps"
    )


def _samples(run: RunFolder) -> dict[str, str]:
    """The first and the last sample answer, where there are any."""
    found = read_samples(run.folder)
    if not found:
        return {}
    first, last = found[0], found[-1]
    before = {"sample_before": first["answer"]} if first["step"] == 0 else {}
    return {"sample_prompt": first["prompt"], **before, "sample_after": last["answer"]}
