"""Operations are counted as PyTorch counts those that it is asked for."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanogpt_surgery import GPTConfig, SimpleGPT, inject_lora
from nanogpt_surgery.training import hardware
from nanogpt_surgery.training.fast.chunked_logits import backward_of_loss
from nanogpt_surgery.training.forward import training_flops_per_token
from nanogpt_surgery.training.hardware import matmul_rate
from nanogpt_surgery.training.recipes import RECIPES

SIZES = {"n_embd": 24, "n_head": 3, "n_layer": 4, "block_size": 16}
CONFIGS = [
    GPTConfig(31, **SIZES),
    GPTConfig.for_family("llama", vocab_size=31, n_kv_head=1, head_dim=10, **SIZES),
    GPTConfig.for_family("qwen2", vocab_size=31, tie_head=True, **SIZES),
    GPTConfig(31, **SIZES, n_prev_tokens=2),
    GPTConfig(31, **SIZES, **(RECIPES["fast"].model | {"n_prev_tokens": 1})),
]
# What a layer's attention kernel computes again for its gradient, for each token, in CONFIGS[0].
AGAIN = 2 * 24 * 16


def counted(model: SimpleGPT) -> float:
    """Operations for each token, as PyTorch counts them."""
    ids = torch.randint(31, (2, 16))
    with FlopCounterMode(display=False) as counter:
        backward_of_loss(model.train(), ids, ids)
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("config", CONFIGS)
def test_three_forward_passes_where_everything_learns(config):
    model = SimpleGPT.from_config(config)
    flops = training_flops_per_token(model, 16)
    assert flops == 3 * config.flops_per_token(16)
    # PyTorch counts the attention that its kernel computes again for its gradient.
    again = 2 * config.n_layer * config.n_head * config.head_dim * 16
    assert counted(model) == flops + again


# In the first layer that learns the whole gradient is counted, although none is needed before the
# first matrix that learns; in the head none is for what goes into B.
FROZEN = {
    "lm_head": 2 * 2 * 31,
    "layers.2.self_attn.q_proj": 2 * AGAIN - 2 * (3 * 24 * 24 + 2 * 24),
    "up_proj": 3 * AGAIN - 2 * (2 * 2 * 24 * 16 + 4 * 24 * 24 + 24 * 96 + 2 * 24),
}


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=["gelu", "relu2"])
@pytest.mark.parametrize("target", FROZEN)
def test_frozen_parts_are_counted_as_far_as_they_are_needed(config, target):
    model = SimpleGPT.from_config(config)
    inject_lora(model, target, rank=2)
    flops = training_flops_per_token(model, 16)
    assert counted(model) == flops + FROZEN[target]
    assert flops < 0.75 * training_flops_per_token(SimpleGPT.from_config(config), 16)


def test_a_kept_prefix_costs_nothing():
    model = SimpleGPT.from_config(CONFIGS[0])
    inject_lora(model, "lm_head", rank=2)
    head = 2 * 24 * 31 + 2 * 2 * 2 * (24 + 31)
    assert training_flops_per_token(model, 16, prefix_kept=True) == head
    assert training_flops_per_token(model, 16) > 10 * head


def test_the_matmul_rate_is_a_rate():
    rate = matmul_rate(torch.device("cpu"), torch.float32, seconds=0.02)
    assert 1e7 < rate < 1e16


def test_a_product_that_was_held_up_does_not_tell_the_rate(monkeypatch):
    """On a busy machine the first small ones can take what large ones do."""

    def timed(a: torch.Tensor, _b: torch.Tensor) -> float:
        return 1.0 if len(a) < 512 else 1e-3

    monkeypatch.setattr(hardware, "_timed_product", timed)
    assert matmul_rate(torch.device("cpu"), torch.float32, seconds=0.02) == 2 * 512**3 / 1e-3
