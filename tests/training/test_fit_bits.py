"""The same seed gives the same bits, whatever happens around and between the steps."""

import copy

import pytest
import torch
from helpers.training import DATASET, SETTINGS, TEXT, TOKENIZER, VALIDATION, hashes, model_of, train

from nanogpt_surgery import GPTDataset, SimpleGPT, fit, generate, inject_lora
from nanogpt_surgery.training.optimizer import make_optimizer


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_same_seed_gives_the_same_bits(dropout):
    results = []
    for seed, noise in ((7, 0), (7, 1), (8, 0)):
        model = model_of(dropout)
        torch.manual_seed(noise)  # the user's own generator has no say
        losses = [step.loss for step in train(model, seed=seed)]
        results.append((losses, hashes(model)))
    assert results[0] == results[1]
    assert results[0][1] != results[2][1]


def test_dropout_takes_part_and_changes_with_each_step():
    plain, dropped = model_of(0.0), model_of(0.5)
    dropped.load_state_dict(plain.state_dict())
    assert train(plain)[0].loss != train(dropped)[0].loss
    # with nothing to learn, the same window is seen through another mask at each step
    model, window = model_of(0.5), GPTDataset(TEXT[:10], TOKENIZER, block_size=9)
    still = {"learning_rate": 0.0, "batch_size": 1, "max_steps": 6}
    losses = [step.loss for step in fit(model, window, SETTINGS, **still)]
    assert len(set(losses)) == 6
    (other_seed,) = fit(model, window, SETTINGS, **still | {"seed": 8, "max_steps": 1})
    assert other_seed.loss != losses[0]


def test_the_parts_of_a_step_have_masks_of_their_own():
    model, window = model_of(0.5), GPTDataset(TEXT[:10], TOKENIZER, block_size=9)
    still = {"learning_rate": 0.0, "batch_size": 1, "max_steps": 1}
    (one,) = fit(model, window, SETTINGS, **still)
    (two,) = fit(model, window, SETTINGS, grad_accum_steps=2, **still)
    assert two.loss != pytest.approx(one.loss, rel=1e-4)


def test_the_users_generator_is_left_alone():
    model = model_of(0.3)
    torch.manual_seed(42)
    state = torch.get_rng_state()
    for _ in fit(model, DATASET, SETTINGS, validation=VALIDATION):
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_going_on_in_the_middle_gives_the_same_bits(dropout, targets):
    def begin() -> SimpleGPT:
        model = model_of(dropout)
        if targets:
            inject_lora(model, targets, rank=2, dropout=dropout)
        return model

    whole = begin()
    losses = [step.loss for step in train(whole, grad_accum_steps=2)]
    model = begin()
    optimizer = make_optimizer(model, SETTINGS)
    steps = fit(model, DATASET, SETTINGS, optimizer=optimizer, grad_accum_steps=2)
    first = [next(steps).loss for _ in range(2)]

    again = begin()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    other = make_optimizer(again, SETTINGS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest = train(again, optimizer=other, first_step=2, grad_accum_steps=2)
    assert first + [step.loss for step in rest] == losses
    assert [step.step for step in rest] == [3, 4, 5, 6]
    assert hashes(again) == hashes(whole)


def test_going_on_without_the_optimizer_is_another_training():
    whole, model = model_of(), model_of()
    train(whole)
    for _ in zip(range(2), fit(model, DATASET, SETTINGS), strict=False):
        pass
    train(model, first_step=2)
    assert hashes(model) != hashes(whole)


def test_a_finished_training_goes_no_further():
    model = model_of()
    before = hashes(model)
    assert train(model, first_step=6) == []
    assert hashes(model) == before


def test_validation_does_not_change_the_training():
    with_it, without = model_of(0.2), model_of(0.2)
    train(with_it, validation=VALIDATION, evaluate_every=1)
    train(without)
    assert hashes(with_it) == hashes(without)


def test_what_is_done_between_two_steps_does_not_change_the_training():
    watched, alone = model_of(0.2), model_of(0.2)
    watched(torch.zeros(1, 3, dtype=torch.long)).sum().backward()  # a gradient left behind
    for _ in fit(watched, DATASET, SETTINGS):
        list(generate(watched, [1, 2], 5))
        torch.rand(3)
        watched.eval()
    train(alone)
    assert hashes(watched) == hashes(alone)
