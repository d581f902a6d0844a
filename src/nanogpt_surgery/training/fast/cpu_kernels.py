"""The parts of a `SimpleGPT` that are exchanged for what a CPU does fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import CausalSelfAttention, causal_attention
from nanogpt_surgery.training.fast.activations import quick_squared_relu, with_squared_relu
from nanogpt_surgery.training.fast.block_attention import KEPT_KEYS, block_attention
from nanogpt_surgery.training.fast.cpu_dropout import Dropout
from nanogpt_surgery.training.fast.norms import quick_norms
from nanogpt_surgery.training.forward import attributes_set
from nanogpt_surgery.training.hardware import cpu_has_bfloat16


@contextmanager
def cpu_kernels(model: nn.Module) -> Iterator[None]:
    """Replaces dropout, norms, attention and ReLU² of a `SimpleGPT` on a CPU within the block."""
    if not isinstance(model, SimpleGPT) or model.embed_tokens.weight.device.type != "cpu":
        yield
        return
    owners: list[Any] = [model, *model.layers]
    classes = {o.dropout: Dropout for o in owners if type(o.dropout) is nn.Dropout}
    attentions = [m for m in model.layers.modules() if isinstance(m, CausalSelfAttention)]
    attend = attributes_set("attend", dict.fromkeys(attentions, cpu_attention))
    bend = attributes_set("activation", dict.fromkeys(with_squared_relu(model), quick_squared_relu))
    with attributes_set("__class__", classes | quick_norms(model)), attend, bend:
        yield


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Computes `causal_attention`, in training by blocks where they pay.

    Without bfloat16 arithmetic the processor computes in float32 what is bfloat16.
    """
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not (learns or dropout):
        return causal_attention(q, k, v, 0.0, mask)
    # Under autocast a rotation or a norm leaves q and k in float32: v tells what is computed in.
    dtype = v.dtype
    if dtype == torch.bfloat16 and not cpu_has_bfloat16():
        q, k, v = q.float(), k.float(), v.float()
    blocks = dropout or mask is not None or v.dtype == torch.bfloat16 or float32_blocks_pay(k)
    with torch.autocast("cpu", enabled=False):
        attend = block_attention if blocks else causal_attention
        return attend(q, k, v, dropout, mask).to(dtype)


def float32_blocks_pay(k: Tensor) -> bool:
    """Whether blocks are faster than PyTorch's kernel, for keys (B, G, S, D) in float32.

    They are in contexts that are not short and whose weights are kept (measured: docs/log.md).
    """
    return 256 <= k.size(2) <= KEPT_KEYS
