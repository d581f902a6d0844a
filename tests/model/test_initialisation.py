import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import random_ids

from nanogpt_surgery import FAMILIES, GPTConfig, SimpleGPT
from nanogpt_surgery.model.initialisation import start_from_zero
from nanogpt_surgery.model.simple_gpt import initialise

# Ending of the name → deviation, for 3 layers of width 64 and an untied head.
DEVIATIONS = {
    "embed_tokens.weight": 0.02,
    "embed_positions.weight": 0.02,
    "q_proj.weight": 0.5 / 8,
    "k_proj.weight": 0.5 / 8,
    "v_proj.weight": 0.5 / 8,
    "gate_proj.weight": 0.5 / 8,
    "up_proj.weight": 0.5 / 8,
    "o_proj.weight": 0.5 / 8 / math.sqrt(6),
    "down_proj.weight": 0.5 / 8 / math.sqrt(6),
    "lm_head.weight": 0.02,
}


def assert_drawn_from_normal(tensor, deviation):
    """Mean and deviation within five standard errors."""
    n = tensor.numel()
    assert tensor.mean().abs() < 5 * deviation / math.sqrt(n)
    assert abs(tensor.std() / deviation - 1) < 5 / math.sqrt(2 * n)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_drawn_as_the_table_says(family):
    torch.manual_seed(0)
    config = GPTConfig.for_family(
        family, vocab_size=97, n_embd=64, n_head=4, n_layer=3, block_size=60, tie_head=False
    )
    for name, parameter in SimpleGPT.from_config(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            expected = [d for ending, d in DEVIATIONS.items() if name.endswith(ending)]
            assert_drawn_from_normal(parameter, *expected)


@pytest.mark.parametrize(("width", "deviation"), [(64, 0.02), (400, 0.01)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_wide_head_starts_smaller(width, deviation, tied):
    torch.manual_seed(0)
    model = SimpleGPT(97, n_embd=width, n_layer=1, tie_head=tied)
    assert_drawn_from_normal(model.lm_head.weight, deviation)
    assert_drawn_from_normal(model.embed_tokens.weight, deviation if tied else 0.02)


def test_the_seed_decides_every_weight():
    torch.manual_seed(5)
    first = SimpleGPT(31, n_embd=16).state_dict()
    torch.manual_seed(5)
    second = SimpleGPT(31, n_embd=16).state_dict()
    third = SimpleGPT(31, n_embd=16).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


def test_nothing_of_the_old_weights_stays():
    model = SimpleGPT(31, n_embd=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    initialise(model, model.config)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


FROM_ZERO = DEVIATIONS | {
    "embed_tokens.weight": 1.0,
    "embed_positions.weight": 1.0,
    "embed_prev_tokens": 0.5,
    "o_proj.weight": 0.0,
    "down_proj.weight": 0.0,
    "lm_head.weight": 0.0,
}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_start_from_zero_is_drawn_as_the_second_table_says(tied, positions):
    torch.manual_seed(0)
    config = GPTConfig(
        97, n_embd=64, n_head=4, n_layer=3, block_size=60, n_prev_tokens=2, positions=positions,
        tie_head=tied,
    )  # fmt: skip
    model = SimpleGPT.from_config(config)
    start_from_zero(model, config)
    deviations = dict(FROM_ZERO)
    if tied:
        deviations |= {k: 0.02 for k in deviations if k.startswith("embed_")}
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        elif deviation := deviations[next(k for k in deviations if k in name)]:
            assert_drawn_from_normal(parameter, deviation)
        else:
            assert not parameter.any(), name
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("vocab_size", "n_embd", "n_layer"),
    [
        (16, 128, 2),
        (27, 96, 1),
        (65, 32, 2),
        (65, 128, 4),
        (65, 192, 1),
        (1000, 384, 2),
        (5000, 96, 1),
    ],
)
@torch.no_grad()
def test_the_first_loss_is_near_ln_v(family, tied, vocab_size, n_embd, n_layer):
    torch.manual_seed(0)
    config = GPTConfig.for_family(
        family, vocab_size=vocab_size, n_embd=n_embd, n_layer=n_layer, block_size=64, tie_head=tied
    )
    logits = SimpleGPT.from_config(config)(random_ids(config, 8, 64, seed=1))
    targets = random_ids(config, 8, 64, seed=2)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.02)
