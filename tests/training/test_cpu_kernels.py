"""Dropout by 16 bits a number, and attention with it, beside what PyTorch defines."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import CONFIGS, random_ids, tiny_model

from nanogpt_surgery.model.layout import Layout
from nanogpt_surgery.model.transformer_encoder_layer import causal_attention
from nanogpt_surgery.training.fast import cpu_kernels as module
from nanogpt_surgery.training.fast.cpu_kernels import (
    Dropout,
    attention_with_dropout,
    cpu_attention,
    cpu_kernels,
    dropped,
    gain,
)


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


def reference(q, k, v, mask, weights_dropped, probability):
    """All of it at once, as PyTorch's documentation of its attention writes it."""
    weights = q @ k.mT / q.size(-1) ** 0.5
    weights = weights.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.masked_fill(weights_dropped, 0) / (1 - probability) @ v


@pytest.mark.parametrize(("new", "keys"), [(13, 13), (5, 13), (1, 13), (8, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_blocks_is_attention_with_those_weights_dropped(
    new, keys, masked, monkeypatch
):
    monkeypatch.setattr(module, "QUERIES", 4)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, n, 6, dtype=torch.float64, requires_grad=True) for n in (new, keys, keys)
    )
    causal = torch.ones(new, keys, dtype=torch.bool).tril(keys - new)
    mask = causal.expand(2, 1, new, keys)
    if masked:
        mask = mask & (torch.rand(2, 1, new, keys) < 0.6) | torch.eye(
            new, keys, dtype=torch.bool
        ).roll(keys - new, 1)
    torch.manual_seed(5)
    out = attention_with_dropout(q, k, v, 0.375, mask if masked else None)
    torch.manual_seed(5)
    lost = torch.zeros(2, 3, new, keys, dtype=torch.bool)
    for start in range(0, new, 4):
        end = keys - new + min(start + 4, new)
        lost[:, :, start : start + 4, :end] = dropped(lost[:, :, start : start + 4, :end], 0.375)
    expected = reference(q, k, v, mask, lost, 0.375)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    up = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), up)
    theirs = torch.autograd.grad(expected, (q, k, v), up)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_without_dropout_it_is_pytorch_s_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 150, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention_with_dropout(q, k, v, 0.0), expected)


def test_the_mean_over_many_draws_is_the_model_s_own_attention():
    layer = tiny_model(CONFIGS["llama"]).layers[0].self_attn.double()
    layer.rotate = lambda x, rotation: x
    x = torch.randn(1, 9, 24, dtype=torch.float64).expand(4000, 9, 24)
    exact = layer(x[:1])
    layer.attend = cpu_attention
    layer.train().dropout = 0.2
    torch.manual_seed(0)
    many = layer(x)
    error = (many.mean(0) - exact[0]).abs() / (many.std(0) / 4000**0.5)
    assert error.max() < 5
    assert many.std(0).min() > 0


def test_documents_in_a_row_do_not_see_each_other_in_training():
    model = tiny_model(CONFIGS["llama"]).train()
    for module_ in model.modules():
        if isinstance(module_, torch.nn.Dropout):
            module_.p = 0.3
        elif hasattr(module_, "rotate"):
            module_.dropout = 0.3
    ids = random_ids(model.config, 1, 12)
    layout = Layout.of_documents(torch.tensor([[0] * 5 + [1] * 7]))
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 1) % model.config.vocab_size
    with cpu_kernels(model):
        torch.manual_seed(1)
        first = model(ids, layout=layout)[0, 5:]
        torch.manual_seed(1)
        second = model(changed, layout=layout)[0, 5:]
    assert torch.equal(first, second)


def test_a_model_is_itself_again_after_the_block():
    model = tiny_model(CONFIGS["llama"])
    classes = [type(part) for part in model.modules()]
    with pytest.raises(ZeroDivisionError), cpu_kernels(model):
        assert type(model.dropout) is Dropout
        assert model.layers[1].self_attn.attend is cpu_attention
        raise ZeroDivisionError
    assert [type(part) for part in model.modules()] == classes
    assert all(layer.self_attn.attend is causal_attention for layer in model.layers)


@pytest.mark.parametrize("trains", [True, False])
def test_in_training_attention_is_computed_in_float32(trains):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8).bfloat16() for h in (6, 2, 2))
    q.requires_grad_(trains)
    found = cpu_attention(q, k, v)
    exact = causal_attention(q.float(), k.float(), v.float()).bfloat16()
    assert found.dtype == torch.bfloat16
    expected = exact if trains else causal_attention(q, k, v)
    assert torch.equal(found, expected)
