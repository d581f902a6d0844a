"""Sample answers while a model learns, beside the one that it gave before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanogpt_surgery.data.conversations.chat import end_ids
from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
from nanogpt_surgery.data.gpt_dataset import Batches
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.json_files import replace_text
from nanogpt_surgery.formats.folders.run_folder import SAMPLES
from nanogpt_surgery.generation.generate import generate
from nanogpt_surgery.runs.training import Training

MOST_TOKENS, PROMPT_TOKENS = 48, 32


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
