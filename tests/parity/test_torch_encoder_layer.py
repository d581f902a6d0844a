"""Our block against PyTorch's own, with the same weights."""

import pytest
import torch
from helpers.models import randomise
from torch import nn

from nanogpt_surgery import GPTConfig, TransformerEncoderLayer

C, H, INNER, T = 24, 3, 40, 11


def theirs():
    layer = nn.TransformerEncoderLayer(
        d_model=C,
        nhead=H,
        dim_feedforward=INNER,
        dropout=0.0,
        activation="gelu",
        norm_first=True,
        batch_first=True,
        layer_norm_eps=2e-3,
    )
    return randomise(layer).double()


def ours(reference):
    """Our block with the weights of a reference copied in."""
    config = GPTConfig(31, n_embd=C, n_head=H, n_inner=INNER, norm_eps=2e-3)
    block = TransformerEncoderLayer(config).double()
    attention = reference.self_attn
    projections = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    with torch.no_grad():
        for i, projection in enumerate(projections):
            projection.weight.copy_(attention.in_proj_weight[i * C : (i + 1) * C])
            projection.bias.copy_(attention.in_proj_bias[i * C : (i + 1) * C])
    for part, other in (
        (block.self_attn.o_proj, attention.out_proj),
        (block.mlp.up_proj, reference.linear1),
        (block.mlp.down_proj, reference.linear2),
        (block.input_layernorm, reference.norm1),
        (block.post_attention_layernorm, reference.norm2),
    ):
        part.load_state_dict(other.state_dict())
    return block


def their_answer(reference, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype)
    return reference(x, src_mask=mask, is_causal=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gradients", [True, False], ids=["with-gradients", "without"])
def test_a_block_equals_pytorchs(training, gradients):
    reference = theirs().train(training)
    block = ours(reference).train(training)
    x = torch.randn(2, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(gradients):
        answer, expected = block(x), their_answer(reference, x)
    torch.testing.assert_close(answer, expected, rtol=1e-11, atol=1e-11)


def test_its_gradients_equal_pytorchs():
    reference = theirs()
    block = ours(reference)
    x = torch.randn(2, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for layer, answer in ((block, block), (reference, lambda x: their_answer(reference, x))):
        layer.train()
        answer(x).square().sum().backward()
    q, k, v = (getattr(block.self_attn, f"{name}_proj").weight.grad for name in "qkv")
    expected = reference.self_attn.in_proj_weight.grad
    torch.testing.assert_close(torch.cat((q, k, v)), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        block.mlp.down_proj.weight.grad, reference.linear2.weight.grad, rtol=1e-9, atol=1e-9
    )
