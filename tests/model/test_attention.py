import math

import pytest
import torch
from helpers.models import CONFIGS, random_ids, tiny_model

from nanogpt_surgery.model.transformer_encoder_layer import causal_attention


def naive(q, k, v):
    """One query at a time: softmax over the keys it may see, by its own head's group."""
    batch, heads, new, width = q.shape
    groups, past = heads // k.size(1), k.size(2) - new
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for t in range(new):
                keys = k[b, h // groups, : past + t + 1]
                values = v[b, h // groups, : past + t + 1]
                weights = torch.softmax(keys @ q[b, h, t] / math.sqrt(width), dim=0)
                out[b, h, t] = weights @ values
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 3), (4, 1)])
@pytest.mark.parametrize(("new", "keys"), [(7, 7), (1, 1), (1, 7), (3, 7), (6, 7)])
def test_attention_is_the_weighted_mean_of_what_a_query_may_see(heads, kv_heads, new, keys):
    torch.manual_seed(0)
    q = torch.randn(2, heads, new, 5, dtype=torch.float64)
    k = torch.randn(2, kv_heads, keys, 5, dtype=torch.float64)
    v = torch.randn(2, kv_heads, keys, 5, dtype=torch.float64)
    torch.testing.assert_close(causal_attention(q, k, v), naive(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("new", "keys"), [(7, 7), (1, 7), (3, 7)])
def test_with_dropout_the_mean_over_many_draws_is_the_same(new, keys):
    torch.manual_seed(0)
    q = torch.randn(1, 4, new, 5).expand(5000, 4, new, 5)
    k, v = (torch.randn(1, 2, keys, 5).expand(5000, 2, keys, 5) for _ in range(2))
    many = causal_attention(q, k, v, dropout=0.1)
    error = (many.mean(0) - naive(q[:1], k[:1], v[:1])[0]).abs() / (many.std(0) / 5000**0.5)
    assert error.max() < 5
    assert many.std(0).min() > 0


def test_dropout_is_for_training_alone():
    layer = tiny_model(CONFIGS["gpt2"]).layers[0].self_attn
    layer.dropout = 0.5
    x = torch.randn(1, 7, 24)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_queries_and_keys_are_normalised_where_the_config_says(name):
    config = CONFIGS[name]
    layer = tiny_model(config).layers[0].self_attn
    assert isinstance(layer.q_norm, torch.nn.Identity) is not config.qk_norm
    assert isinstance(layer.k_norm, torch.nn.Identity) is not config.qk_norm


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_under_autocast_training_computes_about_the_same(config):
    """A rotation or a norm leaves queries and keys in float32, the values come in bfloat16."""
    model, ids = tiny_model(config).train(), random_ids(config, 2, 19)
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
    error = (logits.float() - exact).square().mean().sqrt() / exact.std()
    assert error <= 0.03
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
