"""Weights of few bits: blocks of 32 numbers along a row, with a scale each.

The blocks are those of a GGUF file, so that one can be used as it lies there:

    Q8_0   d (float16), 32 int8 q                       w = d q
    Q4_0   d (float16), 32 of 4 bits q in 16 bytes      w = d (q − 8)
    Q4_1   d, m (float16), 32 of 4 bits q in 16 bytes   w = d q + m

The lower halves of the 16 bytes are the first 16 numbers, the upper halves the others.

A quantised layer computes with the numbers that its blocks stand for, in float32: that is its
definition. The compiled decoder multiplies the blocks themselves. Legend: N rows, C columns.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError

Quantization = Literal["int8", "int4"]
BlockKind = Literal["Q8_0", "Q4_0", "Q4_1"]

BLOCK = 32
BLOCK_BYTES: dict[str, int] = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


def block_kind(bits: Quantization, name: str) -> BlockKind:
    """Returns the blocks of a layer's weight, by the layer's name.

    The embedding and the head keep 8 bits: they cost the most in quality for what they save.
    """
    vocabulary = name == "lm_head" or name.startswith(("embed_tokens", "embed_prev_tokens"))
    return "Q8_0" if bits == "int8" or vocabulary else "Q4_0"


def shape_of(blocks: Tensor, kind: BlockKind) -> tuple[int, int]:
    """Returns the shape (N, C) of the numbers that blocks (N, bytes) stand for."""
    rows, n_bytes = blocks.shape
    return rows, n_bytes // BLOCK_BYTES[kind] * BLOCK


def quantize_blocks(weight: Tensor, kind: BlockKind, name: str = "the weight") -> Tensor:
    """Returns the blocks (N, bytes) uint8 of a weight (N, C), rounded as llama.cpp rounds.

    But the scale of a Q4_0 block is the one, of some tried, with the least squared error.

    Raises:
        SurgeryError: a number is not finite, or beyond the range of a scale in float16.
    """
    rows = max(1, _PART // weight.size(1))  # at once: float32 and what is made of it are larger
    blocks = torch.cat([_blocks(part.float(), kind) for part in weight.detach().split(rows)])
    scales = blocks.unflatten(-1, (-1, BLOCK_BYTES[kind]))[..., : 4 if kind == "Q4_1" else 2]
    if not bool(scales.contiguous().view(torch.half).isfinite().all()):
        raise SurgeryError(
            f"{name} cannot be quantised: a number in it is not finite, or beyond the range of a "
            "scale in float16"
        )
    return blocks


_PART = 1 << 20


def _blocks(weight: Tensor, kind: BlockKind) -> Tensor:
    x = weight.unflatten(-1, (-1, BLOCK))  # (N, C / 32, 32)
    least = x.amin(-1, keepdim=True)  # (N, C / 32, 1), as the scales
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))  # with its sign
    if kind == "Q8_0":
        scale = largest.abs() / 127
    else:
        scale = (
            _scale_of_4_bits(x, largest)
            if kind == "Q4_0"
            else (x.amax(-1, keepdim=True) - least) / 15
        )
    by = torch.where(scale == 0, 0, 1 / scale)
    parts = [scale.half().view(torch.uint8)]
    if kind == "Q8_0":
        q = x * by
        parts.append((q.sign() * (q.abs() + 0.5).floor()).to(torch.int8).view(torch.uint8))
    else:
        q = x * by + 8.5 if kind == "Q4_0" else (x - least) * by + 0.5
        numbers = q.clamp(0, 15).to(torch.uint8)
        parts += [least.half().view(torch.uint8)] if kind == "Q4_1" else []
        parts.append(numbers[..., :16] | numbers[..., 16:] << 4)
    return torch.cat(parts, -1).flatten(1)  # (N, bytes)


def _scale_of_4_bits(x: Tensor, largest: Tensor) -> Tensor:
    """Returns the scales (…, 1) by which numbers (…, 32) are best rounded to −8 … 7.

    For each way to round, of those in which the largest number becomes about −8, the best scale is
    that of a least-squares fit: it takes (Σ x q)² / Σ q² from the squared error.
    """
    scale = largest / -8  # and it stays where a number is not finite
    most = torch.full_like(scale, -torch.inf)
    for steps in TRIED:
        by = torch.where(largest == 0, 0, -steps / largest)
        q = (x * by).round_().clamp_(-8, 7)
        products, squares = (x * q).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True)
        fitted = torch.where(squares == 0, 0, products / squares)
        better = products * fitted > most
        scale = torch.where(better, fitted, scale)
        most = torch.where(better, products * fitted, most)
    return scale


TRIED = (8.0, 7.1, 7.4, 7.7, 8.3, 8.6, 8.9)  # steps from 0 to the largest number


def dequantize_blocks(blocks: Tensor, kind: BlockKind) -> Tensor:
    """Returns the numbers (…, C) float32 that blocks (…, bytes) stand for."""
    parts = blocks.unflatten(-1, (-1, BLOCK_BYTES[kind]))  # (…, C / 32, bytes of a block)
    scale = parts[..., :2].contiguous().view(torch.half).float()  # (…, C / 32, 1)
    if kind == "Q8_0":
        return (parts[..., 2:].view(torch.int8) * scale).flatten(-2)  # (…, C)
    halves = parts[..., -16:]
    numbers = torch.empty(*parts.shape[:-1], BLOCK, device=blocks.device)  # (…, C / 32, 32)
    for half, q in ((slice(16), halves & 15), (slice(16, 32), halves >> 4)):
        q = q.view(torch.int8) - 8 if kind == "Q4_0" else q
        torch.mul(q, scale, out=numbers[..., half])
    if kind == "Q4_1":
        numbers += parts[..., 2:4].contiguous().view(torch.half).float()
    return numbers.flatten(-2)


class QuantizedLinear(nn.Linear):
    """A Linear whose weight is kept as blocks; it cannot be trained, and a LoRA may lie on it.

    Args:
        blocks: (N, bytes) uint8.
        kind: of the blocks.
        bias: (N,), or None.
    """

    called_as_its_base = True  # `forward` takes and gives what that of an `nn.Linear` does

    def __init__(self, blocks: Tensor, kind: BlockKind, bias: Tensor | None = None):
        nn.Module.__init__(self)
        self.kind: BlockKind = kind
        self.out_features, self.in_features = shape_of(blocks, kind)
        self.blocks: Tensor
        self.register_buffer("blocks", blocks)
        self.bias: Any = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The numbers that the blocks stand for, (N, C) float32: made anew each time."""
        return dequantize_blocks(self.blocks, self.kind)

    def forward(self, x: Tensor) -> Tensor:
        """Returns y = W x + b, (…, C) → (…, N)."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Returns the text that `print(model)` shows."""
        return f"{super().extra_repr()}, {self.kind}"


class QuantizedEmbedding(nn.Embedding):
    """An Embedding whose table is kept as blocks; a row becomes float32 when it is looked up."""

    called_as_its_base = True

    def __init__(self, blocks: Tensor, kind: BlockKind):
        nn.Module.__init__(self)
        self.kind: BlockKind = kind
        self.num_embeddings, self.embedding_dim = shape_of(blocks, kind)
        self.padding_idx, self.max_norm = None, None
        self.blocks: Tensor
        self.register_buffer("blocks", blocks)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The numbers that the blocks stand for, (N, C) float32: made anew each time."""
        return dequantize_blocks(self.blocks, self.kind)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows of ids, (…) → (…, C) float32."""
        return dequantize_blocks(F.embedding(ids, self.blocks), self.kind)

    def extra_repr(self) -> str:
        """Returns the text that `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind}"


def quantize_layers(model: nn.Module, bits: Quantization) -> list[dict[str, Any]]:
    """Puts a quantised layer in the place of every Linear and Embedding that can be one, in place.

    What else holds numbers becomes float32, in which quantised layers compute. Layers that share a
    weight share its blocks.

    Returns:
        A row for each Linear and Embedding: its name, the blocks, or why it has none, and bytes.

    Raises:
        SurgeryError: a weight cannot be quantised; some layers may be already.
    """
    shared: dict[int, Tensor] = {}  # blocks by the weight that they were made from
    copies: dict[int, Any] = {}
    rows = []
    for path, module in list(model.named_modules()):
        for child, layer in list(module._modules.items()):
            name = f"{path}.{child}".lstrip(".").replace(".original_layer", "")
            new = layer
            if type(layer) in (nn.Linear, nn.Embedding) and layer.weight.size(1) % BLOCK == 0:
                kind, weight = block_kind(bits, name), layer.weight
                if id(weight) not in shared:
                    shared[id(weight)] = quantize_blocks(weight, kind, name)
                new = quantized_layer(layer, shared[id(weight)], kind)
            elif layer is not None and not layer._modules and _is_narrow(layer):
                new = copy.deepcopy(layer, copies).float()
            module._modules[child] = new
            if isinstance(new, nn.Linear | nn.Embedding):
                rows.append(_described(name, new))
    return rows


def quantized_layer(layer: Any, blocks: Tensor, kind: BlockKind) -> nn.Linear | nn.Embedding:
    """Returns the layer that has these blocks in the place of a Linear's or Embedding's weight."""
    if isinstance(layer, nn.Embedding):
        return QuantizedEmbedding(blocks, kind).train(layer.training)
    bias = None if layer.bias is None else layer.bias.float()
    return QuantizedLinear(blocks, kind, bias).train(layer.training)


def _is_narrow(layer: nn.Module) -> bool:
    return any(p.is_floating_point() and p.dtype != torch.float32 for p in layer.parameters())


def _described(name: str, layer: nn.Linear | nn.Embedding) -> dict[str, Any]:
    if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
        return {"layer": name, "kind": layer.kind, "bytes": layer.blocks.numel()}
    width = layer.weight.size(1)
    return {
        "layer": name,
        "kind": "float32",
        "bytes": 4 * layer.weight.numel(),
        "why": f"rows of {width}, no multiple of {BLOCK}" if width % BLOCK else "a type of its own",
    }


def is_quantized(model: nn.Module) -> bool:
    """Returns whether weights of a model are kept as blocks."""
    return any(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in model.modules())


def check_computes_in(dtype: torch.dtype | str | None) -> torch.dtype:
    """Returns the dtype in which quantised layers compute, float32.

    Raises:
        SurgeryError: another one is asked for.
    """
    if dtype not in (None, torch.float32):
        raise SurgeryError(
            f"quantised weights compute in float32, not in {dtype}", "leave the dtype out"
        )
    return torch.float32


def check_not_quantized(model: nn.Module, what: str) -> None:
    """Raises `SurgeryError` if weights of a model are kept as blocks, which `what` cannot take."""
    if is_quantized(model):
        raise SurgeryError(
            f"the model's weights are quantised, which {what} cannot take",
            "open the model again without quantize, or undo it",
        )
