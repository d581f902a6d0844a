"""Compiled blocks compute what the blocks compute, and are gone afterwards."""

import pytest
import torch

from nanogpt_surgery import CharacterTokenizer, FitSettings, GPTDataset, SimpleGPT, fit
from nanogpt_surgery.training.hardware import choose_hardware, operations_of

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


def losses(compile_: str) -> tuple[SimpleGPT, list[float]]:
    torch.manual_seed(0)
    tokenizer = CharacterTokenizer(TEXT)
    model = SimpleGPT(tokenizer.vocab_size, 24, 3, 3, 10)
    settings = FitSettings(max_steps=4, compile=compile_, device="cpu", precision="float32")
    steps = fit(model, GPTDataset(TEXT, tokenizer, 7), settings)
    return model, [step.loss for step in steps]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_equals_eager() -> None:
    _, eager = losses("off")
    model, compiled = losses("on")
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert all(block._compiled_call_impl is None for block in model.layers)


def test_long_trainings_are_compiled_and_short_ones_are_not() -> None:
    model = SimpleGPT(65, n_embd=64, n_layer=2)
    short, long = (FitSettings(max_steps=n, device="cpu") for n in (10, 10**9))
    assert not choose_hardware(short, operations_of(model, short, 64)).compile
    forced = FitSettings(compile="on", device="cpu")
    assert choose_hardware(forced).compile
    assert not choose_hardware(FitSettings(compile="off", device="cpu"), 1e30).compile
    assert operations_of(model, long, 64) == 1e8 * operations_of(model, short, 64)
