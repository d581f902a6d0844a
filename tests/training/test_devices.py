"""A training on each device there is, in each precision, beside the same in float64 on the CPU.

Without a GPU only the CPU's rows run; whoever has one runs this file there.
"""

import pytest
import torch
from tiny import FAMILY_CONFIGS, random_ids, tiny_model

from nanogpt_surgery import (
    GPTDataset,
    InstructionDataset,
    SimpleGPT,
    evaluate,
    fit,
    generate,
    inject_lora,
)
from nanogpt_surgery.data.instructions import Example
from nanogpt_surgery.model.initialisation import start_from_zero
from nanogpt_surgery.training.hardware import lacking_to_compile
from nanogpt_surgery.training.recipes import RECIPES

THERE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = [name for name, there in THERE.items() if there]
PRECISIONS = {"float32": 4e-4, "bfloat16": 1e-2}  # and how far a loss may be off, as a share
LLAMA = FAMILY_CONFIGS["llama"]


def text() -> GPTDataset:
    return GPTDataset.from_ids(random_ids(LLAMA, 1, 150)[0], 11)


def answers() -> InstructionDataset:
    ids = random_ids(LLAMA, 12, 6).tolist()
    trained = (False, False, False, True, True, True)
    return InstructionDataset([Example(tuple(row), trained) for row in ids], 12, pack=True)


def adapted(targets: str) -> SimpleGPT:
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
    "everything": (lambda: tiny_model(LLAMA), text, {"accumulation": 2}),
    "answers": (lambda: tiny_model(LLAMA), answers, {"gradient_checkpointing": True}),
    "q and v": (lambda: adapted(".*(q|v)_proj"), text, {}),
    "head, kept": (lambda: adapted("lm_head"), answers, {}),
    "fast": (recipe, text, RECIPES["fast"].training),
}


def losses(way: str, dtype: torch.dtype, **settings: object) -> list[float]:
    make, data, more = WAYS[way]
    settings = {"batch_size": 2, "max_steps": 6, "learning_rate": 1e-2} | more | settings
    model = make().to(dtype)
    found = [step.loss for step in fit(model, data(), **settings)]
    return [*found, evaluate(model, data())]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_training_is_the_exact_one(device, way, precision):
    wanted = losses(way, torch.float64, device="cpu", precision="float32")
    found = losses(way, torch.float32, device=device, precision=precision)
    assert wanted[-1] < wanted[0] * (1 - 2 * PRECISIONS[precision])  # more than may be off
    assert found == pytest.approx(wanted, rel=PRECISIONS[precision])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_it_is_the_same(device):
    if lacking := lacking_to_compile(torch.device(device)):
        pytest.skip(f"there is no {lacking}")
    options = {"device": device, "precision": "float32"}
    wanted, found = (
        losses("everything", torch.float32, compile=how, **options) for how in ("off", "on")
    )
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_it_goes_on_with_the_same_ids(device):
    model = tiny_model(LLAMA)
    wanted = list(generate(model, [1, 2, 3], 9, temperature=0))
    assert list(generate(model.to(device), [1, 2, 3], 9, temperature=0)) == wanted
