"""Blocks that are computed again for their gradients: the same bits, less memory."""

import pytest
import torch
from helpers.models import train_a_little
from helpers.training import DATASET, SETTINGS, hashes, model_of
from torch import Tensor

from nanogpt_surgery import SimpleGPT, fit, inject_lora
from nanogpt_surgery.training.fast.chunked_logits import backward_of_loss
from nanogpt_surgery.training.forward import CheckpointedBlocks


def gradients(model: SimpleGPT, checkpointed: bool) -> dict[str, Tensor]:
    """The gradients of one batch, dropout drawn from one seed."""
    x, y = DATASET.batch(0, 5)
    torch.manual_seed(3)
    model.zero_grad()
    with CheckpointedBlocks(model.train(), checkpointed).active():
        backward_of_loss(model, x, y)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj"), "lm_head"])
def test_gradients_have_the_same_bits(dropout, targets):
    model = model_of(dropout)
    if targets:
        inject_lora(model, targets, rank=2, dropout=dropout)
        train_a_little(model)
    plain, again = gradients(model, False), gradients(model, True)
    assert plain.keys() == again.keys() != set()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name
        assert gradient.abs().sum() > 0 or "k_proj.bias" in name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_has_the_same_bits(precision):
    changes = {"precision": precision, "grad_accum_steps": 2, "max_steps": 3}
    plain, again = model_of(0.2), model_of(0.2)
    losses = [step.loss for step in fit(plain, DATASET, SETTINGS, **changes)]
    steps = fit(again, DATASET, SETTINGS, gradient_checkpointing=True, **changes)
    assert [step.loss for step in steps] == losses
    assert hashes(again) == hashes(plain)
    assert all(block._compiled_call_impl is None for block in again.layers)


def saved_bytes(model: SimpleGPT, ids: Tensor, checkpointed: bool) -> int:
    """What autograd keeps between the forward and the backward pass, parameters apart."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    blocks = CheckpointedBlocks(model.train(), checkpointed)
    with blocks.active(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.hidden(ids)
    return sum(size for place, size in kept.items() if place not in own)


def test_only_what_goes_into_a_block_is_kept():
    model = SimpleGPT(11, n_embd=32, n_head=2, n_layer=6, block_size=40)
    ids = torch.zeros(4, 40, dtype=torch.long)
    plain, checkpointed = (saved_bytes(model, ids, on) for on in (False, True))
    one_input = 4 * 40 * 32 * 4
    assert checkpointed <= (6 + 4) * one_input  # of six blocks, and what the norm needs
    assert plain > 6 * checkpointed
