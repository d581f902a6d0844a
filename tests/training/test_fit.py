import copy
import hashlib
import json
import math

import pytest
import torch
from torch import nn

from nanogpt_surgery import (
    CharacterTokenizer,
    FitSettings,
    GPTDataset,
    SimpleGPT,
    Step,
    SurgeryError,
    evaluate,
    fit,
    generate,
    inject_lora,
    remove_lora,
)
from nanogpt_surgery.training.hardware import choose_hardware
from nanogpt_surgery.training.optimizer import make_optimizer
from nanogpt_surgery.training.schedule import learning_rate

TEXT = "how much wood would a woodchuck chuck if a woodchuck could chuck wood? " * 4
TOKENIZER = CharacterTokenizer(TEXT)
DATASET = GPTDataset(TEXT, TOKENIZER, block_size=9)
VALIDATION = GPTDataset(TEXT[60:150], TOKENIZER, block_size=11)
SETTINGS = FitSettings(
    max_steps=6,
    batch_size=5,
    learning_rate=1e-2,
    warmup_steps=2,
    evaluate_every=0,
    seed=7,
    device="cpu",
    precision="float32",
    compile="off",
)


def model_of(dropout: float = 0.0, seed: int = 0) -> SimpleGPT:
    torch.manual_seed(seed)
    return SimpleGPT(TOKENIZER.vocab_size, 16, 2, 2, 12, dropout=dropout)


def train(model: nn.Module, **changes: object) -> list[Step]:
    return list(fit(model, DATASET, SETTINGS, **changes))


def hashes(model: nn.Module) -> dict[str, str]:
    """The sha256 of every tensor's bytes."""
    return {
        name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


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
    steps = train(model, accumulation=2)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    settings = FitSettings(max_steps=6, learning_rate=1e-2, warmup_steps=2)
    assert [step.learning_rate for step in steps] == [learning_rate(i, settings) for i in range(6)]
    assert all(step.tokens == 5 * 2 * 9 for step in steps)
    assert all(step.seconds > 0 and step.gradient_norm > 0 for step in steps)
    assert all(step.validation_loss is None for step in steps)
    assert steps[0].loss == pytest.approx(first, rel=1e-5)
    assert json.loads(json.dumps(steps[0].to_dict()))["loss"] == steps[0].loss


def evaluate_batch(model: SimpleGPT, step: int) -> float:
    """The mean loss of a step's ten windows, by hand."""
    inputs, targets = DATASET.batch(step, 10, seed=7)
    log_probabilities = torch.log_softmax(model(inputs).detach().double(), -1)
    return -float(log_probabilities.gather(-1, targets[..., None]).mean())


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
    (two,) = fit(model, window, SETTINGS, accumulation=2, **still)
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
    losses = [step.loss for step in train(whole, accumulation=2)]
    model = begin()
    optimizer = make_optimizer(model, SETTINGS)
    steps = fit(model, DATASET, SETTINGS, optimizer=optimizer, accumulation=2)
    first = [next(steps).loss for _ in range(2)]

    again = begin()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    other = make_optimizer(again, SETTINGS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest = train(again, optimizer=other, first_step=2, accumulation=2)
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


@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_accumulation_equals_the_big_batch(accumulation):
    big, small = model_of(), model_of()
    before = values(big)
    plain = {"clip": 0.0, "learning_rate": 0.5, "warmup_steps": 0, "max_steps": 3}
    expected = train(big, optimizer=sgd(big), batch_size=12, **plain)
    actual = train(
        small,
        optimizer=sgd(small),
        batch_size=12 // accumulation,
        accumulation=accumulation,
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
    settings = {"clip": clip, "learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 1}
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


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes(value):
    model = model_of()
    optimizer = make_optimizer(model, SETTINGS)
    steps = fit(model, DATASET, SETTINGS, optimizer=optimizer)
    next(steps)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 2] = value
    before, state = hashes(model), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(SurgeryError, match="gradient of step 2 is not finite") as caught:
        next(steps)
    assert "learning rate" in caught.value.hint
    assert hashes(model) == before
    assert all(p.grad is None for p in model.parameters())
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[key], state[index][key]) for key in entry)


def test_nothing_to_train_is_told_at_once():
    with pytest.raises(SurgeryError, match="no parameter that can be trained"):
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


def test_settings_that_contradict_are_told_all_at_once():
    with pytest.raises(SurgeryError) as caught:
        FitSettings(
            max_steps=0,
            batch_size=-1,
            learning_rate=math.nan,
            beta2=1.0,
            device="tpu",
            precision="float16",
            compile="yes",
        )
    message = str(caught.value)
    for part in (
        "max_steps is 0",
        "batch_size is -1",
        "learning_rate is nan",
        "beta2 is 1.0",
        "device is 'tpu'; it must be one of auto, cpu, cuda, mps",
        "precision is 'float16'",
        "compile is 'yes'",
    ):
        assert part in message


def test_what_it_computes_on_is_said_in_one_line():
    line = choose_hardware(SETTINGS).describe()
    assert line == f"CPU, {torch.get_num_threads()} threads, float32, not compiled"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SurgeryError, match="no cuda device here"):
        fit(model_of(), DATASET, SETTINGS, device="cuda")
