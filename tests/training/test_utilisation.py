"""Operations are counted as PyTorch counts those that it is asked for."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanogpt_surgery import GPTConfig, SimpleGPT, inject_lora
from nanogpt_surgery.training.hardware import matmul_rate
from nanogpt_surgery.training.loss import backward_of_loss
from nanogpt_surgery.training.utilisation import training_flops_per_token

SIZES = {"n_embd": 24, "n_head": 3, "n_layer": 4, "block_size": 16}
CONFIGS = [
    GPTConfig(31, **SIZES),
    GPTConfig.for_family("llama", vocab_size=31, n_kv_head=1, head_dim=10, **SIZES),
    GPTConfig.for_family("qwen2", vocab_size=31, tie_head=True, **SIZES),
]


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
    assert flops <= counted(model) <= flops + again


@pytest.mark.parametrize("targets", [("lm_head",), ("layers.2.self_attn.q_proj",), ("up_proj",)])
def test_frozen_parts_are_counted_as_far_as_they_are_needed(targets):
    model = SimpleGPT.from_config(CONFIGS[0])
    inject_lora(model, targets, rank=2)
    flops, found = training_flops_per_token(model, 16), counted(model)
    assert flops == pytest.approx(found, rel=0.1)
    assert flops < 0.75 * training_flops_per_token(SimpleGPT.from_config(CONFIGS[0]), 16)


def test_a_kept_prefix_costs_nothing():
    model = SimpleGPT.from_config(CONFIGS[0])
    inject_lora(model, "lm_head", rank=2)
    head = 2 * 24 * 31 + 2 * 2 * 2 * (24 + 31)
    assert training_flops_per_token(model, 16, prefix_kept=True) == head
    assert training_flops_per_token(model, 16) > 10 * head


def test_the_matmul_rate_is_a_rate():
    rate = matmul_rate(torch.device("cpu"), torch.float32, seconds=0.02)
    assert 1e7 < rate < 1e16
