"""Muon beside its definition by singular values, and beside `torch.optim.Muon`."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from helpers.models import CONFIGS, tiny_model
from helpers.training import DATASET, SETTINGS, hashes, model_of

from nanogpt_surgery import FitSettings, SurgeryError, fit, inject_lora
from nanogpt_surgery.runs.checkpoints import RunFolder, training_state
from nanogpt_surgery.training.muon import MARGIN, POLYNOMIALS, Muon, in_bfloat16, orthogonalised
from nanogpt_surgery.training.optimizer import make_optimizer

JORDANS = ((3.4445, -4.7750, 2.0315),) * 5  # what torch.optim.Muon applies
BETAS = (0.8, 0.95)
SHAPES = [(5, 7), (7, 5), (6, 6), (5, 7), (3, 11), (48, 4)]


def by_singular_values(matrix, polynomials, margin=1.0):
    """What the products must come to: the polynomials of each singular value."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    S = S / (margin * S.norm())
    for a, b, c in polynomials:
        S = a * S + b * S**3 + c * S**5
    return U @ torch.diag(S) @ Vh


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
@pytest.mark.parametrize("polynomials", [POLYNOMIALS, JORDANS, POLYNOMIALS[:1]])
def test_products_alone_treat_each_singular_value_by_the_polynomials(shape, polynomials):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    expected = torch.stack([by_singular_values(m, polynomials) for m in matrices])
    torch.testing.assert_close(orthogonalised(matrices, polynomials), expected)


def test_singular_values_a_thousand_times_smaller_are_no_less_exact():
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(32, 32, dtype=torch.float64))
    matrix = U @ torch.diag(torch.logspace(0, -4, 32, dtype=torch.float64)) @ Vh
    expected = by_singular_values(matrix, POLYNOMIALS)
    found = orthogonalised(matrix.float()[None])[0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_matrices_in_bfloat16_lose_nothing_but_their_last_bits():
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(48, 96, dtype=torch.float64), full_matrices=False)
    values = torch.full((48,), 0.03, dtype=torch.float64)
    values[0] = 1
    stored = (U @ torch.diag(values) @ Vh).bfloat16()
    expected = by_singular_values(stored.double(), POLYNOMIALS)
    found = orthogonalised(stored[None])[0]
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 0.005 * expected.norm()


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(4, 16, 48)))
    assert values.min() > 0.15
    assert values.max() < 2.0
    values = torch.linalg.svdvals(orthogonalised(torch.randn(4, 16, 48), JORDANS))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_gradient_of_zero_moves_nothing():
    assert not orthogonalised(torch.zeros(2, 3, 4)).any()
    assert not in_bfloat16(torch.zeros(2, 3, 4), POLYNOMIALS).any()


@pytest.mark.parametrize("shape", [(5, 8), (24, 24), (16, 48)])
@pytest.mark.parametrize("polynomials", [POLYNOMIALS, JORDANS])
def test_a_gpu_s_rounds_in_bfloat16_come_to_the_same(shape, polynomials):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    exact = torch.stack([by_singular_values(m.double(), polynomials, MARGIN) for m in matrices])
    found = in_bfloat16(matrices, polynomials)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 0.05 * exact.norm()


def test_in_bfloat16_a_single_direction_does_not_blow_up():
    """There the largest singular value is the norm, from which rounding can only go beyond 1."""
    torch.manual_seed(0)
    lines = torch.randn(64, 24, 1) @ torch.randn(64, 1, 48)
    values = torch.linalg.svdvals(in_bfloat16(lines, POLYNOMIALS).float())
    assert values[:, 0].min() > 0.8
    assert values.max() < 2.1


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_those_of_torch(weight_decay):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    group = {"params": ours, "muon": True, "weight_decay": weight_decay}
    mine = Muon([group], lr=0.07, momentum=0.9, betas=BETAS, polynomials=JORDANS)
    other = torch.optim.Muon(theirs, lr=0.07, momentum=0.9, weight_decay=weight_decay)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        # PyTorch orthogonalises in bfloat16, so each of four moves is off by some hundredths.
        torch.testing.assert_close(a, b, rtol=0, atol=4 * 0.07 * 0.04)


def test_beside_the_matrices_it_is_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.arange(12.0)) for _ in range(2))
    group = {"params": [ours], "muon": False, "weight_decay": 0.1}
    mine = Muon([group], lr=0.01, momentum=0.9, betas=(0.8, 0.95))
    other = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(3):
        ours.grad = torch.randn(12)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs)
    assert mine.state[ours].keys() == other.state[theirs].keys()


def matrix_and_vector():
    """A matrix that Muon trains, a vector that AdamW trains, and their optimizer."""
    torch.manual_seed(0)
    both = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(4))]
    groups = [
        {"params": [p], "muon": p.dim() == 2, "weight_decay": 0.1, "rate_ratio": 0.5} for p in both
    ]
    return both, Muon(groups, lr=0.01, momentum=0.9, betas=BETAS)


def step_with_gradients(parameters, optimizer, seeds):
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + seed)
        optimizer.step()


def test_a_state_that_was_loaded_is_gone_on_from_to_the_bit():
    whole, optimizer = matrix_and_vector()
    step_with_gradients(whole, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    again, fresh = matrix_and_vector()
    for parameter, value in zip(again, whole, strict=True):
        parameter.data.copy_(value)
    fresh.load_state_dict(state)
    step_with_gradients(whole, optimizer, range(3, 6))
    step_with_gradients(again, fresh, range(3, 6))
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)
    assert fresh.state[again[1]]["step"] == 6


def test_a_run_with_muon_is_resumed_to_the_bit(tmp_path):
    def steps(model, optimizer, first, last):
        settings = {"muon": True, "max_steps": last, "first_step": first, "optimizer": optimizer}
        return list(fit(model, DATASET, SETTINGS, **settings))

    whole = model_of(0.1)
    optimizer = make_optimizer(whole, replace(SETTINGS, muon=True))
    done = steps(whole, optimizer, 0, 3)[-1]
    run = RunFolder(tmp_path)
    run.save(done, lambda folder: None, whole, optimizer)
    steps(whole, optimizer, 3, 6)
    again = model_of(0.1, seed=1)
    fresh = make_optimizer(again, replace(SETTINGS, muon=True))
    RunFolder(tmp_path, run.checkpoint).restore(again, fresh)
    steps(again, fresh, 3, 6)
    assert hashes(again) == hashes(whole)
    assert training_state(again, fresh).keys() == training_state(whole, optimizer).keys()


def test_a_run_whose_momentum_lies_another_way_is_refused(tmp_path):
    model = model_of(0.1)
    optimizer = make_optimizer(model, replace(SETTINGS, muon=True))
    [done] = fit(model, DATASET, SETTINGS, muon=True, max_steps=1, optimizer=optimizer)
    tall = next(p for p in optimizer.param_groups[0]["params"] if p.size(0) > p.size(1))
    optimizer.state[tall]["momentum"] = optimizer.state[tall]["momentum"].mT
    run = RunFolder(tmp_path)
    run.save(done, lambda folder: None, model, optimizer)
    (long, short), name = tall.shape, next(n for n, p in model.named_parameters() if p is tall)
    shapes = re.escape(f"{name}:momentum is ({short}, {long}) there and ({long}, {short}) here")
    with pytest.raises(SurgeryError, match=shapes):
        RunFolder(tmp_path, run.checkpoint).restore(model, optimizer)


def test_a_closure_is_called_with_gradients_and_its_loss_comes_back():
    parameters, optimizer = matrix_and_vector()
    before = [p.detach().clone() for p in parameters]

    def closure():
        loss = sum(p.square().sum() for p in parameters)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(sum(float(b.square().sum()) for b in before))
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_lora_plus_beside_muon_is_refused():
    with pytest.raises(SurgeryError, match=r"lora_plus_ratio is 4\.0, and Muon"):
        FitSettings(muon=True, lora_plus_ratio=4.0)


def test_the_groups_hold_every_parameter_once_and_the_head_is_no_matrix():
    model = tiny_model(CONFIGS["prev-tokens-relu2"])
    optimizer = make_optimizer(model, FitSettings(muon=True))
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())
    matrices = [names[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]]
    assert len(matrices) == 2 * 6
    assert all(name.endswith("_proj.weight") for name in matrices)


def test_a_lora_has_no_matrix_for_it():
    model = tiny_model(CONFIGS["llama"])
    inject_lora(model, "all-linear")
    with pytest.raises(SurgeryError, match="AdamW"):
        make_optimizer(model, FitSettings(muon=True))
