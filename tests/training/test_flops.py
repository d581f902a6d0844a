"""Operations are counted as PyTorch counts those that it is asked for."""

import pytest
import torch
from helpers.models import CONFIGS as FAMILIES
from helpers.models import random_ids, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanogpt_surgery import GPTConfig, KVCache, SimpleGPT, inject_lora
from nanogpt_surgery.training import hardware
from nanogpt_surgery.training.fast.chunked_logits import backward_of_loss
from nanogpt_surgery.training.hardware import matmul_rate
from nanogpt_surgery.training.recipes import RECIPES
from nanogpt_surgery.training.trainable_stages import (
    forward_flops_per_token,
    training_flops_per_token,
)

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


EVERY_FAMILY = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def counted_flops(forward):
    """With the written-out attention, so that the counter sees its two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        forward()
    return counter.get_total_flops()


@EVERY_FAMILY
def test_flops_of_a_forward_pass_are_the_count(config):
    model = tiny_model(config)
    for batch, tokens in ((1, 19), (3, 7)):
        ids = random_ids(config, batch, tokens)
        flops = counted_flops(lambda ids=ids: model(ids))
        assert flops == batch * tokens * forward_flops_per_token(config, tokens)


@EVERY_FAMILY
def test_flops_of_a_forward_pass_are_the_count_for_one_token_after_a_cache(config):
    model, cache = tiny_model(config), KVCache(config)
    ids = random_ids(config, 1, 12)
    model(ids[:, :11], cache)
    flops = counted_flops(lambda: model(ids[:, 11:], cache))
    assert flops == forward_flops_per_token(config, 12)


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
    assert flops == 3 * forward_flops_per_token(config, 16)
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
