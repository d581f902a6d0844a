"""The summary of a run that is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanogpt_surgery.data.text.mixture import passes
from nanogpt_surgery.formats.folders.run_folder import METRICS
from nanogpt_surgery.runs.loss_plot import plot_losses
from nanogpt_surgery.runs.metrics_file import read_metrics
from nanogpt_surgery.runs.samples import read_samples

if TYPE_CHECKING:
    from nanogpt_surgery.runs.run import Run


def summary_of(run: Run, beside: float) -> dict[str, Any]:
    """The summary; `beside`: seconds of evaluations, and of all else outside the steps."""
    training, folder = run.training, run.folder.folder
    rows_of_all = read_metrics(folder / METRICS)
    metrics = [row for row in rows_of_all if row["step"]]
    base = training.description.get("kind") == "finetune"
    plot_losses(rows_of_all, folder / "loss.png", title=str(folder), base=base)
    seconds = sum(row["seconds"] for row in metrics)
    rows = len(metrics) * training.settings.batch_size * training.settings.grad_accum_steps
    tokens = sum(row["tokens"] for row in metrics)
    return {
        "folder": str(folder),
        "steps": len(metrics),
        "trained_parameters": sum(p.numel() for p in run.loop.parameters),
        "tokens": tokens,
        "trained_tokens": sum(row.get("trained_tokens", row["tokens"]) for row in metrics),
        "seconds_of_steps": round(seconds, 2),
        "seconds_in_all": round(seconds + beside, 2),
        "tokens_per_second": round(tokens / seconds),
        "matmul_GFLOPs": round(run.matmul_rate / 1e9),
        "utilisation": round(tokens / seconds / run.full_rate, 4),
        "epochs": ", ".join(f"{share:.3g}" for share in passes(training.dataset, rows)),
        "skipped_steps": sum(row.get("skipped", False) for row in metrics),
        **_losses(rows_of_all),
        "ended": _ending(training.settings.max_steps, training.patience, len(metrics)),
        **_samples(read_samples(folder)),
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


def _ending(most: int, patience: int, steps: int) -> str:
    if steps == most:
        return "all steps done"
    return (
        f"stopped early, {patience} evaluations in a row without improvement; "
        f"{steps:,} of {most:,} steps"
    )


def _samples(found: list[dict[str, Any]]) -> dict[str, str]:
    """The first and the last sample answer, where there are any."""
    if not found:
        return {}
    first, last = found[0], found[-1]
    before = {"sample_before": first["answer"]} if first["step"] == 0 else {}
    return {"sample_prompt": first["prompt"], **before, "sample_after": last["answer"]}
