"""Compiled blocks compute what the blocks compute, and are gone afterwards."""

from collections.abc import Callable

import pytest
import torch

from nanogpt_surgery import (
    CharacterTokenizer,
    FitSettings,
    GPTDataset,
    SimpleGPT,
    SurgeryError,
    fit,
)
from nanogpt_surgery.training.fast.accelerate import compiled_calls
from nanogpt_surgery.training.fast.chunked_logits import backward_of_loss
from nanogpt_surgery.training.forward import CheckpointedBlocks, attributes_set
from nanogpt_surgery.training.hardware import choose_hardware, operations_of

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


def losses(compile_: str, dropout: float = 0.0) -> tuple[SimpleGPT, list[float]]:
    torch.manual_seed(0)
    tokenizer = CharacterTokenizer(TEXT)
    model = SimpleGPT(tokenizer.vocab_size, 24, 3, 3, 10, dropout=dropout)
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


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_dropout_is_drawn_for_each_step() -> None:
    _, first = losses("on", 0.3)
    _, again = losses("on", 0.3)
    _, without = losses("on")
    assert first == again
    assert all(abs(a - b) > 1e-4 for a, b in zip(first, without, strict=True))
    assert first == pytest.approx(without, rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_blocks_that_are_computed_again_have_the_same_gradients() -> None:
    """And of each block only what goes into it is kept."""
    model = SimpleGPT(11, n_embd=32, n_head=2, n_layer=3, block_size=20).train()
    ids, targets = torch.randint(11, (2, 4, 20))
    found, kept = {}, {}
    for quick in (False, True):
        model.zero_grad()
        calls, again = compiled_calls(model) if quick else {}, CheckpointedBlocks(model, quick)
        saved: list[torch.Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(noting(saved), lambda tensor: tensor)
        with attributes_set("_compiled_call_impl", calls), again.active(), hooks:
            backward_of_loss(model, ids, targets)
        kept[quick] = sum({t.untyped_storage().data_ptr(): t.nbytes for t in saved}.values())
        found[quick] = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().sum() > 0 or "k_proj.bias" in name
    assert 2 * kept[True] < kept[False]


def noting(saved: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    return pack


def test_without_a_compiler_nothing_is_compiled(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not choose_hardware(FitSettings(device="cpu"), 1e30).compile
    with pytest.raises(SurgeryError, match=r"there is no C\+\+ compiler"):
        choose_hardware(FitSettings(device="cpu", compile="on"))


def test_long_trainings_are_compiled_and_short_ones_are_not() -> None:
    model = SimpleGPT(65, n_embd=64, n_layer=2)
    short, long = (FitSettings(max_steps=n, device="cpu") for n in (10, 10**9))
    assert not choose_hardware(short, operations_of(model, short, 64)).compile
    forced = FitSettings(compile="on", device="cpu")
    assert choose_hardware(forced).compile
    assert not choose_hardware(FitSettings(compile="off", device="cpu"), 1e30).compile
    assert operations_of(model, long, 64) == 1e8 * operations_of(model, short, 64)
