"""The results of a run: its losses as a picture, sample answers, and a summary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.data.conversations.chat import end_ids
from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
from nanogpt_surgery.data.gpt_dataset import Batches
from nanogpt_surgery.data.text.mixture import passes
from nanogpt_surgery.drawing import BLUE, GREY, ORANGE, drawable, paint
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.files.writing import replace_text
from nanogpt_surgery.formats.folders.run_folder import METRICS, SAMPLES, latest_checkpoint
from nanogpt_surgery.generation.generate import generate
from nanogpt_surgery.report import Report
from nanogpt_surgery.runs.checkpoints import read_metrics
from nanogpt_surgery.runs.training import Training

if TYPE_CHECKING:
    from nanogpt_surgery.runs.run import Run

SMOOTHED_FROM = 200  # steps; fewer are drawn as they are
MOST_TOKENS, PROMPT_TOKENS = 48, 32  # of a sample answer, and of a text that it continues


def plot_losses(
    metrics: Sequence[dict[str, Any]], goal: Path, title: str, base: bool = False
) -> None:
    """Draws training loss and validation loss against steps, from step 0 on.

    From 200 steps on the training loss is faint, with the mean of the steps around each one over
    it. The background is transparent.

    Args:
        metrics: rows with `step`, `loss` (or None) and `validation_loss` (or None), losses in nats
            a token; a row of step 0 is the validation before the first step.
        goal: the PNG to write.
        title: above the picture.
        base: whether the model of step 0 is one that is fine-tuned: its loss is a line then.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained, validated = _curve(metrics, "loss"), _curve(metrics, "validation_loss")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    _draw_training(axes, trained)
    if validated:
        steps, losses = zip(*validated, strict=True)
        axes.plot(steps, losses, color=ORANGE, marker="o", ms=4, clip_on=False, label="validation")
    if base and validated and validated[0][0] == 0:
        loss = validated[0][1]
        axes.axhline(loss, color=GREY, linestyle="--", label=f"validation, base: {loss:.3f}")
    last = max((row["step"] for row in metrics), default=0)
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step", ylabel="loss, nats a token")
    text, fonts = drawable(title)
    axes.set_title(text, family=fonts, parse_math=False)
    axes.grid(color=GREY, alpha=0.3)
    paint(axes)
    figure.savefig(goal, dpi=120, transparent=True)


def _curve(metrics: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Steps with their loss, where one was measured."""
    found = [(row["step"], row.get(key)) for row in metrics]
    return [(step, loss) for step, loss in found if loss is not None and math.isfinite(loss)]


def _draw_training(axes: Any, trained: list[tuple[int, float]]) -> None:
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    if not trained or len(trained) < SMOOTHED_FROM:
        axes.plot(steps, losses, color=BLUE, linewidth=1.2, label="training")
        return
    width = max(5, len(losses) // 50)
    axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8)
    label = f"training, mean of {2 * width + 1} steps"
    inner = slice(width // 4, len(losses) - width // 4)  # at the very ends a mean is of too few
    axes.plot(steps[inner], centred_means(losses, width)[inner], color=BLUE, label=label)


def centred_means(values: Sequence[float], width: int) -> list[float]:
    """For each value the mean of it and of as many on either side, at most `width`.

    At the ends both sides are shorter alike, so that nothing lags.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    sides = [min(width, i, len(values) - 1 - i) for i in range(len(values))]
    return [(sums[i + s + 1] - sums[i - s]) / (2 * s + 1) for i, s in enumerate(sides)]


class Samples:
    """Greedy continuations of one held-out prompt, a line each in the run's folder.

    Nothing of it is drawn, so a training computes the same bits with it and without.

    Args:
        training: of instruction data the first held-out question is asked, of a text its
            held-out part continued.
        folder: the run's.
        first_step: steps done already; what was written after them is dropped.
        say: called with a line for each answer.
    """

    def __init__(
        self, training: Training, folder: Path, first_step: int, say: Callable[[str], object]
    ):
        self.training, self.path, self.say = training, folder / SAMPLES, say
        self.every = training.sample_every
        context = training.model.config.block_size
        self.prompt = prompt_of(training.validation)[-max(context // 2, context - MOST_TOKENS) :]
        before = read_samples(folder) if first_step else []
        self.taken = [line for line in before if line["step"] <= first_step]
        if self.path.is_file():
            self._write()

    def due(self, step: int, evaluated: bool, last: bool) -> bool:
        """Whether one comes after a step."""
        if self.every is None or last:
            return self.every != 0 and (evaluated or last)
        return self.every > 0 and step % self.every == 0

    def take(self, step: int) -> None:
        """Lets the model answer; writes the answer down and says it."""
        prompt, answer = self._decode(self.prompt), self._answer()
        self.taken.append({"step": step, "prompt": prompt, "answer": answer})
        self._write()
        if step == 0:
            self.say(f"sample prompt: {one_line(prompt)}")
        self.say(f"sample at step {step:,}: {one_line(answer)}")

    def _answer(self) -> str:
        model = self.training.model
        count = min(MOST_TOKENS, model.config.block_size - len(self.prompt))
        ends = end_ids(self.training.tokenizer)
        try:
            ids = list(generate(model, self.prompt, count, temperature=0, stop_ids=ends))
        except SurgeryError as error:
            return f"[{error.what}]"
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return self.training.tokenizer.decode(ids)

    def _write(self) -> None:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self.taken]
        replace_text(self.path, "".join(lines))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's samples, up to one that was torn."""
    path, found = folder / SAMPLES, []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append({"step": 0, "prompt": "", "answer": ""} | json.loads(line))
            except (ValueError, TypeError):
                break
    return found


def prompt_of(validation: Batches) -> list[int]:
    """Ids to continue: up to the first held-out answer, or the beginning of the held-out text."""
    if isinstance(validation, InstructionDataset):
        example = validation.first
        if start := example.trained.index(True):
            return list(example.ids[:start])
        return list(example.ids[:PROMPT_TOKENS])
    inputs = next(iter(validation.iter_all(1)))[0]
    return inputs[0, :PROMPT_TOKENS].tolist()


def one_line(text: str) -> str:
    """A sample without its line breaks, for a line of its own."""
    return " ".join(text.split()) or "(nothing)"


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
        "seconds_of_steps": round(seconds, 4),
        "seconds_in_all": round(seconds + beside, 4),
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


def compare_runs(whole: Path, resumed: Path) -> Report:
    """Compares the metrics of every step, their times apart, and the newest checkpoints' tensors.

    Returns a row for each file of tensors, with its sha256 in both folders, and in the summary
    whether all is the `same`, or in what steps and files they differ.
    """
    (steps, files), (steps_too, files_too) = _results(whole), _results(resumed)
    losses = [name for name in steps | steps_too if steps.get(name) != steps_too.get(name)]
    hashes = [name for name in files | files_too if files.get(name) != files_too.get(name)]
    rows = [
        {"file": name, "without a break": digest, "killed": files_too.get(name, "-")}
        for name, digest in files.items()
    ]
    summary = {
        "steps": len(steps),
        "losses_differ": ", ".join(losses[:8]) or None,
        "files_differ": ", ".join(hashes) or None,
        "same": not losses and not hashes,
    }
    return Report("resumed after a kill (sha256)", rows, summary)


def _results(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The metrics of each step but for its time, and the sha256 of each file of tensors."""
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    rows = read_metrics(folder / METRICS)
    files = sorted(checkpoint.glob("*.safetensors"))
    steps = {f"step {row['step']}": row | {"seconds": 0} for row in rows}
    return steps, {file.name: file_hash(file) for file in files}
