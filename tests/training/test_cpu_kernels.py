"""A model whose dropout and attention are exchanged for those of training/fast."""

import pytest
import torch
from helpers.models import CONFIGS, random_ids, tiny_model

from nanogpt_surgery.model.layout import Layout
from nanogpt_surgery.model.transformer_encoder_layer import causal_attention
from nanogpt_surgery.training.fast import cpu_kernels as module
from nanogpt_surgery.training.fast.block_attention import block_attention
from nanogpt_surgery.training.fast.cpu_dropout import Dropout
from nanogpt_surgery.training.fast.cpu_kernels import cpu_attention, cpu_kernels


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


def qkv(length: int, dtype: torch.dtype, trains: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, h, length, 8).to(dtype).requires_grad_(trains) for h in (6, 2, 2)]


@pytest.mark.parametrize(("arithmetic", "computed"), [(True, torch.bfloat16), (False, torch.float)])
def test_blocks_compute_in_bfloat16_where_the_processor_does(arithmetic, computed, monkeypatch):
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: arithmetic)
    q, k, v = qkv(9, torch.bfloat16)
    # Under autocast a rotation leaves q and k in float32, and products would be cast again.
    with torch.autocast("cpu", torch.bfloat16):
        found = cpu_attention(q.float(), k.float(), v)
    expected = block_attention(q.to(computed), k.to(computed), v.to(computed))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("length", [9, 256, 513])
@pytest.mark.parametrize("masked", [False, True])
def test_in_float32_each_length_takes_what_is_faster(length, masked):
    tensors = qkv(length, torch.float32)
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    found = cpu_attention(*tensors, 0.0, mask if masked else None)
    by_blocks = masked or length == 256
    assert type(found.grad_fn).__name__.startswith("BlockAttention") is by_blocks
    torch.testing.assert_close(found, causal_attention(*tensors))


def test_without_gradients_it_is_the_model_s_own():
    tensors = qkv(256, torch.bfloat16, trains=False)
    assert torch.equal(cpu_attention(*tensors), causal_attention(*tensors))
    with torch.no_grad():
        tensors = qkv(256, torch.float32)
        assert torch.equal(cpu_attention(*tensors), causal_attention(*tensors))
