import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import FitSettings
from nanogpt_surgery.training.optimizer import learning_rate

SETTINGS = FitSettings(max_steps=41, warmup_steps=4, learning_rate=2.0, final_learning_rate=0.25)


def rates(settings: FitSettings) -> list[float]:
    return [learning_rate(step, settings) for step in range(settings.max_steps)]


def test_the_rise_starts_above_zero_and_is_even():
    assert rates(SETTINGS)[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_the_cosine_goes_from_the_peak_to_the_floor():
    assert learning_rate(4, SETTINGS) == 2.0
    assert learning_rate(22, SETTINGS) == pytest.approx((2.0 + 0.5) / 2)  # half of the way
    assert learning_rate(40, SETTINGS) == pytest.approx(0.5)


def test_the_cosine_is_pytorch_s():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=36, eta_min=0.5)
    for rate in rates(SETTINGS)[4:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@given(st.integers(1, 60), st.integers(0, 80), st.floats(0, 1))
def test_it_rises_then_falls_within_its_bounds(max_steps, warmup_steps, final):
    settings = FitSettings(
        max_steps=max_steps, warmup_steps=warmup_steps, final_learning_rate=final, learning_rate=1
    )
    top = min(warmup_steps, max_steps // 10)  # a short training does not rise to its end
    rise, fall = rates(settings)[:top], rates(settings)[top:]
    assert all(0 < rate < 1 for rate in rise)
    assert rise == sorted(rise)
    assert fall[0] == 1
    assert fall == sorted(fall, reverse=True)
    assert all(final - 1e-12 <= rate <= 1 for rate in fall)


@given(st.integers(2, 60), st.integers(0, 80))
def test_the_last_step_is_at_the_floor(max_steps, warmup_steps):
    settings = FitSettings(max_steps=max_steps, warmup_steps=warmup_steps, learning_rate=3)
    assert learning_rate(max_steps - 1, settings) == pytest.approx(0.3)
    assert learning_rate(max_steps + 5, settings) == pytest.approx(0.3)


def test_without_a_rise_the_first_step_is_at_the_peak():
    settings = FitSettings(max_steps=5, warmup_steps=0, learning_rate=3)
    assert learning_rate(0, settings) == 3
    assert learning_rate(0, FitSettings(max_steps=1, warmup_steps=0, learning_rate=3)) == 3


def test_a_stable_schedule_holds_its_peak_then_falls_evenly():
    settings = FitSettings(
        max_steps=10,
        warmup_steps=0,
        learning_rate=2.0,
        final_learning_rate=0.0,
        schedule="stable",
        cooldown=0.5,
    )
    assert rates(settings) == pytest.approx([2, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4], abs=0.03)
    assert rates(settings)[-1] > 0  # the last step still learns
    held = FitSettings(max_steps=10, warmup_steps=0, schedule="stable", cooldown=0.0)
    assert len(set(rates(held))) == 1


@given(st.integers(1, 60), st.floats(0.05, 1), st.floats(0, 1))
def test_a_stable_schedule_never_rises_again(max_steps, cooldown, final):
    settings = FitSettings(
        max_steps=max_steps,
        warmup_steps=0,
        learning_rate=1,
        final_learning_rate=final,
        schedule="stable",
        cooldown=cooldown,
    )
    assert rates(settings)[0] == 1
    assert rates(settings) == sorted(rates(settings), reverse=True)
    assert all(final <= rate <= 1 for rate in rates(settings))
