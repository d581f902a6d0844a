"""Dropout by 16 bits a number, beside what PyTorch defines."""

import pytest
import torch

from nanogpt_surgery.training.fast.cpu_dropout import Dropout, dropped, gain


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.83])
def test_the_share_is_the_probability_and_the_mean_stays(probability):
    torch.manual_seed(0)
    x = torch.ones(301, 1003)
    y = Dropout(probability)(x)
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs((y == 0).double().mean() - probability) < 5 * deviation
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - probability)),
                               rtol=1e-3, atol=0)  # fmt: skip
    assert abs(y.mean() - 1) < 5 * deviation / (1 - probability)


def test_numbers_that_share_a_draw_are_dropped_independently():
    torch.manual_seed(0)
    four = dropped(torch.empty(200_000, 4), 0.3).double()
    covariance = torch.cov(four.T)
    expected = 0.21 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=5 * 0.21 / 200_000**0.5)


def test_draws_follow_the_generator():
    x = torch.randn(5, 7)
    layer = Dropout(0.4)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("probability", [0.0, 1e-6, 0.999999])
def test_probabilities_at_the_ends_give_no_nan(probability):
    x = torch.randn(64, 64, requires_grad=True)
    y = Dropout(probability)(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert torch.equal(y, x) is (probability < 0.5)


def test_the_gradient_goes_where_the_numbers_went():
    torch.manual_seed(0)
    x = torch.randn(9, 11, requires_grad=True)
    y = Dropout(0.25)(x)
    y.backward(torch.full_like(y, 2.0))
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 2.0 * gain(0.25)))


def test_outside_training_nothing_is_dropped():
    x = torch.randn(5, 7)
    assert Dropout(0.9).eval()(x) is x
