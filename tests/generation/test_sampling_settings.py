"""Filters and penalties are transformers', and a property of each holds."""

import math

import pytest
import torch
from helpers.sampling import sample
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.generation.generate import candidates, choose, penalised
from nanogpt_surgery.generation.settings import SamplingSettings


def random_logits(seed, size=37):
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 999),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(1, 50),
    top_p=st.floats(0.01, 0.99),
    min_p=st.floats(0.01, 1),
)
def test_what_is_kept_is_what_transformers_keeps(seed, temperature, top_k, top_p, min_p):
    logits = random_logits(seed)
    settings = SamplingSettings(temperature, top_k, top_p, min_p)
    theirs = logits[None].clone()
    for warper in (
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    ):
        theirs = warper(None, theirs)
    values, ids = candidates(logits / temperature, settings)
    ours = torch.full_like(logits, -math.inf)
    ours[ids] = values
    assert torch.equal(ours, theirs[0])


@given(seed=st.integers(0, 99), penalty=st.floats(0.5, 3), seen=st.lists(st.integers(0, 36)))
def test_the_repetition_penalty_is_transformers(seed, penalty, seen):
    logits = random_logits(seed)
    settings = SamplingSettings(repetition_penalty=penalty)
    ours = penalised(logits, settings, seen[:3], seen[3:])
    if not seen:
        assert torch.equal(ours, logits)
        return
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())
    assert torch.allclose(ours, theirs[0], rtol=1e-6)


def test_presence_counts_once_frequency_every_time_and_neither_the_prompt():
    settings = SamplingSettings(presence_penalty=0.5, frequency_penalty=0.25)
    moved = penalised(torch.zeros(5), settings, [0, 0], [1, 2, 2, 2])
    assert moved.tolist() == [0, -0.75, -1.25, 0, 0]


def test_a_bias_bans_and_forces():
    logits = torch.tensor([5.0, 4.0, 3.0])
    banned = SamplingSettings(0, logit_bias={0: -math.inf})
    assert choose(logits, banned, (), ()) == 1
    assert choose(logits, SamplingSettings(0, logit_bias={2: 100.0}), (), ()) == 2
    assert logits.tolist() == [5.0, 4.0, 3.0]


def test_sample_is_choose_without_a_past():
    logits = random_logits(3)
    for temperature, top_k in ((0, None), (1.0, None), (0.7, 5), (1.0, 99)):
        left = sample(logits, temperature, top_k, torch.Generator().manual_seed(7))
        settings = SamplingSettings(temperature, top_k)
        assert left == choose(logits, settings, (), (), torch.Generator().manual_seed(7))


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, math.log(3.0), -math.inf])
    draw = torch.Generator().manual_seed(1)
    drawn = [choose(logits, SamplingSettings(), (), (), draw) for _ in range(2000)]
    assert 2 not in drawn
    assert drawn.count(1) / 2000 == pytest.approx(0.75, abs=0.04)


def test_settings_out_of_range_are_named_at_once():
    with pytest.raises(
        SurgeryError, match=r"temperature is -1.*top_k is 0.*top_p is 0.*min_p is 2"
    ):
        SamplingSettings(-1, 0, 0, 2)
    with pytest.raises(SurgeryError, match="repetition_penalty is 0"):
        SamplingSettings(repetition_penalty=0)
