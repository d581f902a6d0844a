"""Steps whose loss or gradient is not finite: skipped, counted, and after some in a row the end."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from helpers.training import SETTINGS, TEXT, hashes

from nanogpt_surgery import CharacterTokenizer, GPTDataset, SimpleGPT, fit, inject_lora
from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.training.optimizer import make_optimizer

RARE = TEXT[:100] + "Z" + TEXT[100:]  # a few windows hold the letter
TOKENIZER = CharacterTokenizer(RARE)
DATASET = GPTDataset(RARE, TOKENIZER, block_size=9)
Z = TOKENIZER.encode("Z")[0]


def model_of(dropout: float = 0.0) -> SimpleGPT:
    """A model whose weights are finite, and in which the letter Z overflows float32."""
    torch.manual_seed(0)
    model = SimpleGPT(TOKENIZER.vocab_size, 16, 2, 2, 12, dropout=dropout)
    with torch.no_grad():
        model.embed_tokens.weight[Z] = 3e38 * torch.tensor([1.0, -1.0]).repeat(8)
    return model


def holds_z(steps: int) -> list[bool]:
    batches = (DATASET.batch(step, SETTINGS.batch_size, SETTINGS.seed) for step in range(steps))
    return [bool((inputs == Z).any()) for inputs, _ in batches]


BAD = holds_z(30)


def test_the_data_is_as_the_tests_want_it():
    assert sum(BAD) >= 2 and not BAD[0] and not any(a and b for a, b in pairwise(BAD))


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], "lm_head"])
def test_a_bad_step_is_skipped_and_counted_and_changes_nothing(targets):
    model = model_of()
    if targets:
        inject_lora(model, targets, rank=2)
    optimizer = make_optimizer(model, SETTINGS)
    found, before, state = [], hashes(model), copy.deepcopy(optimizer.state_dict()["state"])
    for step in fit(model, DATASET, SETTINGS, optimizer=optimizer, max_steps=30):
        after = hashes(model)
        found.append(step.skipped)
        assert (after == before) == step.skipped
        if step.skipped:
            kept = optimizer.state_dict()["state"]
            assert all(torch.equal(kept[i][key], state[i][key]) for i in kept for key in kept[i])
            assert all(p.grad is None for p in model.parameters())
            line = json.dumps(step.to_dict(), allow_nan=False)
            assert json.loads(line)["skipped"] is True and json.loads(line)["loss"] is None
        else:
            assert math.isfinite(step.loss + step.gradient_norm)
        before, state = after, copy.deepcopy(optimizer.state_dict()["state"])
    assert found == BAD


def test_gone_on_with_after_a_skipped_step_the_bits_are_the_same():
    first = BAD.index(True) + 1
    whole = model_of(0.2)
    wanted = [step.loss for step in fit(whole, DATASET, SETTINGS, max_steps=20)]
    cut = model_of(0.2)
    optimizer = make_optimizer(cut, SETTINGS)
    steps = fit(cut, DATASET, SETTINGS, optimizer=optimizer, max_steps=20)
    losses = [next(steps).loss for _ in range(first)]
    steps.close()
    rest = fit(cut, DATASET, SETTINGS, optimizer=optimizer, first_step=first, max_steps=20)
    losses += [step.loss for step in rest]
    assert hashes(cut) == hashes(whole)
    assert losses == pytest.approx(wanted, rel=0, abs=0, nan_ok=True)


def test_the_first_step_is_looked_at_when_it_was_not_skipped():
    first = BAD.index(True)
    model = model_of()
    inject_lora(model, ["q_proj"], rank=2)
    steps = list(fit(model, DATASET, SETTINGS, first_step=first, max_steps=first + 3))
    assert [step.skipped for step in steps] == [True, False, False]


def test_too_many_in_a_row_end_it_and_say_where():
    model = model_of()
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight.fill_(3e38)
    before, done = hashes(model), []
    with pytest.raises(NotFiniteError) as caught:
        done.extend(fit(model, DATASET, SETTINGS))
    assert [step.skipped for step in done] == [True, True]
    said = str(caught.value)
    row = DATASET.indices(2, SETTINGS.batch_size, SETTINGS.seed)[0]
    for part in ("3 steps", "step 3", f"row {row} ", "layers.1", "learning rate"):
        assert part in said, said
    assert "embed_tokens.weight" in said or "layers.0" in said  # the first gradient
    assert hashes(model) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_weight_that_is_not_finite_is_named(value):
    model = model_of()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 2] = value
    with pytest.raises(NotFiniteError, match=r"layers\.0\.mlp\.up_proj"):
        list(fit(model, DATASET, SETTINGS, max_skipped_steps=1))
