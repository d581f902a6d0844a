import json
import math

import pytest
import torch
from helpers.training import DATASET, SETTINGS, TOKENIZER, VALIDATION, hashes, model_of, train
from torch import nn

from nanogpt_surgery import (
    FitSettings,
    SimpleGPT,
    SurgeryError,
    evaluate,
    fit,
    inject_lora,
    remove_lora,
)
from nanogpt_surgery.training.optimizer import learning_rate


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An update in proportion to the gradient, so that the one shows the other."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> torch.Tensor:
    """Everything that a training changed, as one vector in float64."""
    changes = [p.detach().double() - before[n].double() for n, p in model.named_parameters()]
    return torch.cat([change.flatten() for change in changes])


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_goes_down(precision):
    model = model_of()
    steps = train(model, max_steps=60, precision=precision)
    assert abs(steps[0].loss / math.log(TOKENIZER.vocab_size) - 1) < 0.05
    assert sum(step.loss for step in steps[-5:]) / 5 < 0.6 * steps[0].loss
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_it_is_lazy():
    model = model_of()
    before = hashes(model)
    steps = fit(model, DATASET, SETTINGS)
    assert iter(steps) is steps
    assert hashes(model) == before
    assert next(steps).step == 1
    after_one = hashes(model)
    assert after_one != before
    next(steps)
    assert hashes(model) != after_one


def test_a_step_says_what_was_done():
    model = model_of()
    first = evaluate_batch(model_of(), step=0)
    steps = train(model, grad_accum_steps=2)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    settings = FitSettings(max_steps=6, learning_rate=1e-2, warmup_steps=2)
    assert [step.learning_rate for step in steps] == [learning_rate(i, settings) for i in range(6)]
    assert all(step.tokens == step.trained_tokens == 5 * 2 * 9 for step in steps)
    assert all(step.seconds > 0 and step.gradient_norm > 0 for step in steps)
    assert all(step.validation_loss is None for step in steps)
    assert steps[0].loss == pytest.approx(first, rel=1e-5)
    assert json.loads(json.dumps(steps[0].to_dict()))["loss"] == steps[0].loss


def evaluate_batch(model: SimpleGPT, step: int) -> float:
    """The mean loss of a step's ten windows, by hand."""
    inputs, targets = DATASET.batch(step, 10, seed=7)
    log_probabilities = torch.log_softmax(model(inputs).detach().double(), -1)
    return -float(log_probabilities.gather(-1, targets[..., None]).mean())


@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_accumulation_equals_the_big_batch(accumulation):
    big, small = model_of(), model_of()
    before = values(big)
    plain = {"max_grad_norm": 0.0, "learning_rate": 0.5, "warmup_steps": 0, "max_steps": 3}
    expected = train(big, optimizer=sgd(big), batch_size=12, **plain)
    actual = train(
        small,
        optimizer=sgd(small),
        batch_size=12 // accumulation,
        grad_accum_steps=accumulation,
        **plain,
    )
    assert [s.tokens for s in actual] == [s.tokens for s in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-6)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)
    assert moved(big, before).abs().max() > 0.05
    assert (moved(small, before) - moved(big, before)).abs().max() < 1e-6


@pytest.mark.parametrize("clip", [0.1, 1e6, 0.0])
def test_the_gradient_is_clipped_to_its_norm(clip):
    model = model_of()
    before = values(model)
    settings = {"max_grad_norm": clip, "learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 1}
    (step,) = train(model, optimizer=sgd(model), **settings)
    assert step.gradient_norm > 0.3  # told as it was before clipping
    applied = float(moved(model, before).norm()) / 1e-3
    assert applied == pytest.approx(0.1 if clip == 0.1 else step.gradient_norm, rel=1e-3)


@pytest.mark.parametrize("targets", ["lm_head", ["q_proj", "v_proj"], "all-linear"])
def test_only_the_updates_are_trained(targets):
    model = model_of()
    inject_lora(model, targets, rank=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = hashes(model)
    steps = train(model, max_steps=20)
    after = hashes(model)
    assert {name for name in before if before[name] != after[name]} == trained
    assert steps[-1].loss < steps[0].loss
    remove_lora(model)
    assert hashes(model) == hashes(model_of())


def test_only_what_can_be_trained_is():
    model = model_of().requires_grad_(False)
    model.norm.requires_grad_(True)
    before = hashes(model)
    train(model)
    after = hashes(model)
    assert {n for n in before if before[n] != after[n]} == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("every", "max_steps", "expected"),
    [(3, 7, [3, 6, 7]), (2, 6, [2, 4, 6]), (0, 5, [5]), (100, 4, [4]), (1, 3, [1, 2, 3])],
)
def test_validation_comes_at_its_steps(every, max_steps, expected):
    model, seen = model_of(0.2), []
    for step in fit(
        model, DATASET, SETTINGS, validation=VALIDATION, evaluate_every=every, max_steps=max_steps
    ):
        if step.validation_loss is not None:
            seen.append(step.step)
            assert step.validation_loss == evaluate(model, VALIDATION)
        assert model.training
    assert seen == expected


def test_nothing_to_train_is_told_at_once():
    with pytest.raises(SurgeryError, match="inject_lora"):
        fit(model_of().requires_grad_(False), DATASET, SETTINGS)


def test_it_prints_nothing(capfd):
    train(model_of(), validation=VALIDATION)
    assert capfd.readouterr() == ("", "")


def test_any_model_that_gives_logits_is_trained():
    torch.manual_seed(0)
    model = nn.Embedding(TOKENIZER.vocab_size, TOKENIZER.vocab_size)
    steps = train(model, max_steps=80, learning_rate=0.3, validation=VALIDATION)
    assert steps[-1].validation_loss < 0.6 * steps[0].loss


def test_changes_come_over_the_settings():
    assert len(train(model_of(), max_steps=2)) == 2
    assert len(list(fit(model_of(), DATASET, max_steps=1, device="cpu", compile="off"))) == 1


@pytest.mark.parametrize("targets", ["q_proj", "lm_head"])
def test_a_float32_update_of_a_float64_model_learns(targets):
    losses = []
    for dtype in (torch.float64, torch.float32):
        model = model_of().to(dtype)
        torch.manual_seed(0)
        inject_lora(model, targets)
        losses.append([step.loss for step in train(model)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
