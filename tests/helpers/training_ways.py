"""Ways to train a tiny model: what learns, on what, and with which settings."""

import torch
from torch import Tensor, nn

from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model
from nanogpt_surgery import (
    GPTDataset,
    InstructionDataset,
    SimpleGPT,
    Step,
    evaluate,
    fit,
    inject_lora,
)
from nanogpt_surgery.data.conversations.instructions import Example
from nanogpt_surgery.model.initialisation import start_from_zero
from nanogpt_surgery.training.recipes import RECIPES

LLAMA = FAMILY_CONFIGS["llama"]


class FirstRows(GPTDataset):
    """Windows of a text; of a batch that one process has, only the first rows are trained on."""

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        inputs, targets = super().batch(step, batch_size, seed, rank=rank, world_size=world_size)
        rows = torch.arange(rank * len(inputs), (rank + 1) * len(inputs))
        return inputs, targets.masked_fill((rows >= batch_size // 4)[:, None], -100)


def text() -> GPTDataset:
    return GPTDataset.from_ids(random_ids(LLAMA, 1, 150)[0], 11)


def first_rows() -> FirstRows:
    return FirstRows.from_ids(random_ids(LLAMA, 1, 150)[0], 11)


def answers() -> InstructionDataset:
    """Rows of several documents, in which some tokens are trained on."""
    ids = random_ids(LLAMA, 12, 6).tolist()
    trained = [[False] * (5 - n % 3) + [True] * (1 + n % 3) for n in range(12)]
    examples = [Example(tuple(row), tuple(t)) for row, t in zip(ids, trained, strict=True)]
    return InstructionDataset(examples, 12, pack=True)


def adapted(targets: str | list[str]) -> SimpleGPT:
    model = tiny_model(LLAMA)
    torch.manual_seed(0)
    inject_lora(model, targets, rank=2, tied="untie")
    return model


def recipe() -> SimpleGPT:
    torch.manual_seed(0)
    model = SimpleGPT(53, 24, 3, 2, 19, **RECIPES["fast"].model)
    start_from_zero(model, model.config)
    return model


WAYS = {
    "everything": (lambda: tiny_model(LLAMA), text, {"grad_accum_steps": 2}),
    "answers": (lambda: tiny_model(LLAMA), answers, {"gradient_checkpointing": True}),
    "q and v": (lambda: adapted(".*(q|v)_proj"), text, {}),
    "head, kept": (lambda: adapted("lm_head"), answers, {}),
    "fast": (recipe, text, RECIPES["fast"].training),
}


def trained(way: str, dtype: torch.dtype, **settings: object) -> tuple[nn.Module, list[Step]]:
    """A model that was trained for six steps, and the steps."""
    make, data, more = WAYS[way]
    settings = {"batch_size": 2, "max_steps": 6, "learning_rate": 1e-2} | more | settings
    model = make().to(dtype)
    return model, list(fit(model, data(), validation=data(), **settings))


def losses(way: str, dtype: torch.dtype, **settings: object) -> list[float]:
    """Of the steps, and over the whole data at the end."""
    model, steps = trained(way, dtype, **settings)
    return [*(step.loss for step in steps), evaluate(model, WAYS[way][1]())]
