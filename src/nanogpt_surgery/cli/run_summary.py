"""What is said of a run when it is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt_surgery.cli.job import Job
    from nanogpt_surgery.runs.checkpoint import Run


def operations_per_token(job: Job) -> int:
    """Of a training step, by what it computes."""
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.training.fast.frozen_prefix import prefix_for
    from nanogpt_surgery.training.utilisation import training_flops_per_token

    assert isinstance(job.model, SimpleGPT)
    kept = prefix_for(job.model, job.dataset, job.settings) is not None
    return training_flops_per_token(job.model, job.dataset.block_size, kept)


def summary_of(job: Job, run: Run, matmul_rate: float, beside: float) -> dict[str, Any]:
    """The summary; `beside` are the seconds for evaluations and else that was no step."""
    from nanogpt_surgery.data.text.mixture import passes
    from nanogpt_surgery.runs.loss_plot import plot_losses, read_metrics

    rows_of_all = read_metrics(run.folder / "metrics.jsonl")
    metrics = [row for row in rows_of_all if row["step"]]
    base = job.description.get("kind") == "finetune"
    plot_losses(rows_of_all, run.folder / "loss.png", title=str(job.options.out), base=base)
    seconds = sum(row["seconds"] for row in metrics)
    rows = len(metrics) * job.settings.batch_size * job.settings.grad_accum_steps
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
        "utilisation": round(tokens / seconds * operations_per_token(job) / matmul_rate, 4),
        "epochs": ", ".join(f"{share:.3g}" for share in passes(job.dataset, rows)),
        "skipped_steps": sum(row.get("skipped", False) for row in metrics),
        **_losses(rows_of_all),
        "ended": _ending(job, len(metrics)),
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


def _ending(job: Job, steps: int) -> str:
    if steps == job.settings.max_steps:
        return "all steps done"
    return (
        f"stopped early, {job.options.patience} evaluations in a row without improvement; "
        f"{steps:,} of {job.settings.max_steps:,} steps"
    )


def _samples(run: Run) -> dict[str, str]:
    """The first and the last sample answer, where there are any."""
    from nanogpt_surgery.cli.samples import read_samples

    found = read_samples(run.folder)
    if not found:
        return {}
    first, last = found[0], found[-1]
    before = {"sample_before": first["answer"]} if first["step"] == 0 else {}
    return {"sample_prompt": first["prompt"], **before, "sample_after": last["answer"]}
