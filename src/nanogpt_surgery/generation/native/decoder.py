"""The compiled decoder of a model: what decoder.c reads, filled from a `SimpleGPT` as it stands.

Nothing is copied: the structures point at the model's own tensors, wherever they lie, at its
adapters' factors and at the cache. What they were taken from is compared before every step, so
that after any operation, or with another adapter, the decoder is built anew.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.native.library import decoder_library
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.linear import LoRALinear, LoRAUpdate
from nanogpt_surgery.model.embeddings import LearnedPositions, PrevTokenEmbeddings, RotaryPositions
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import (
    CausalSelfAttention,
    KVCache,
    LayerCache,
    PlainFeedForward,
    RMSNorm,
    SwiGLUFeedForward,
    TransformerEncoderLayer,
    causal_attention,
)

KINDS = {torch.float32: 0, torch.bfloat16: 1}
NORMS = {"layernorm": 0, "rmsnorm": 1}
MLPS = {"gelu": 0, "gelu_tanh": 1, "relu2": 2, "swiglu": 3}
POSITIONS = {"learned": 0, "rotary": 1}
# The modules whose arithmetic decoder.c has.
KNOWN = (
    *(SimpleGPT, TransformerEncoderLayer, CausalSelfAttention, PlainFeedForward),
    *(SwiGLUFeedForward, RMSNorm, RotaryPositions, LearnedPositions, PrevTokenEmbeddings),
    *(nn.LayerNorm, nn.Linear, nn.Embedding, nn.Identity, nn.Dropout, nn.ModuleList),
    *(nn.ModuleDict, LoRALinear, LoRAUpdate),
)


def struct(name: str, **fields: Any) -> Any:
    """Returns the class of a structure of C, its fields in order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _ints(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), ctypes.c_int32)


POINTER, FLOAT = ctypes.c_void_p, ctypes.c_float
Numbers = struct("Numbers", at=POINTER, kind=ctypes.c_int32)
Update = struct("Update", rank=ctypes.c_int32, scale=FLOAT, a=Numbers, b=Numbers)
Matrix = struct("Matrix", **_ints("rows columns n_updates"), weight=Numbers, bias=Numbers,
                updates=ctypes.POINTER(Update))  # fmt: skip
Norm = struct("Norm", weight=Numbers, bias=Numbers)
Layer = struct("Layer", **dict.fromkeys(("input_norm", "mlp_norm", "q_norm", "k_norm"), Norm),
               **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), Matrix),
               keys=POINTER, values=POINTER)  # fmt: skip
Model = struct(
    "Model",
    **_ints("n_layer width inner heads kv_heads head_dim vocab positions norm mlp n_prev"),
    **_ints("cache_kind max_length max_rank"),
    eps=FLOAT,
    final_norm=Norm,
    **dict.fromkeys(("embedding", "head"), Matrix),
    **dict.fromkeys(("prev_embeddings", "learned"), ctypes.POINTER(Matrix)),
    frequencies=POINTER,
    layers=ctypes.POINTER(Layer),
)


def unsupported_reason(model: nn.Module, cache: KVCache) -> str:
    """Returns why the compiled decoder does not compute a model, or "" if it does."""
    for name, module in model.named_modules():
        where = name or "the model"
        if type(module) not in KNOWN:
            return f"{where} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{where} has a hook"
        if isinstance(module, CausalSelfAttention) and module.attend is not causal_attention:
            return f"{where} has another attention"
        if isinstance(module, LoRALinear) and not isinstance(module.active, WeightedAdapters):
            return f"{where} has another adapter for each row"
    for name, tensor in [*model.named_parameters(), ("the cache", cache.layers[0].keys)]:
        if tensor.device.type != "cpu" or tensor.dtype not in KINDS or not tensor.is_contiguous():
            return f"{name} is {tensor.dtype} on {tensor.device}, or not in one piece"
    return decoder_library()[1]


class NativeDecoder:
    """Steps of one token a row, for a model and a cache that `unsupported_reason` lets pass."""

    def __init__(self, model: SimpleGPT, cache: KVCache, threads: int = 0):
        library, _ = decoder_library()
        self.library = library
        self.cache = cache
        self._kept: list[Any] = []  # what C points at
        self.model = self._model(model)
        threads = threads or torch.get_num_threads()
        pool = self.library.pool_make(ctypes.byref(self.model), cache.batch_size, threads)
        if not pool:
            raise MemoryError("no memory for the buffers of the decoder")
        self.pool = pool
        self._end = weakref.finalize(self, self.library.pool_free, pool)

    def step(self, ids: Tensor) -> Tensor:
        """Returns the logits (B, V), float32, after one more id a row, (B, 1); see `KVCache`."""
        cache, n_prev = self.cache, self.model.n_prev
        cache.check_room(*ids.shape)
        length = cache.length
        last = cache.append_ids(ids)[:, -1 - n_prev :].flip(1)  # the newest first
        recent = torch.zeros(cache.batch_size, 1 + n_prev, dtype=torch.long)
        recent[:, : last.size(1)] = last
        places = torch.full((cache.batch_size,), length, dtype=torch.int32)
        logits = torch.empty(cache.batch_size, self.model.vocab)
        pointers = (tensor.data_ptr() for tensor in (recent, places, places, logits))
        self.library.pool_step(self.pool, *pointers)
        for layer in cache.layers:
            layer.length = length + 1
        return logits

    def _model(self, model: SimpleGPT) -> Any:
        config, blocks = model.config, zip(model.layers, self.cache.layers, strict=True)
        layers = [self._layer(block, cache) for block, cache in blocks]
        previous: Any = model.embed_prev_tokens
        tables = [self._matrix(t) for t in previous] if config.n_prev_tokens else []
        positions: Any = model.embed_positions
        learned = [self._matrix(positions)] if config.positions == "learned" else []
        ranks = [m.rank for m in model.modules() if isinstance(m, LoRAUpdate)]
        return Model(
            n_layer=config.n_layer, width=config.n_embd, inner=config.n_inner,
            heads=config.n_head, kv_heads=config.n_kv_head, head_dim=config.head_dim,
            vocab=config.vocab_size, positions=POSITIONS[config.positions],
            norm=NORMS[config.norm], mlp=MLPS[config.mlp], n_prev=len(tables),
            cache_kind=KINDS[self.cache.layers[0].keys.dtype], max_length=self.cache.max_length,
            max_rank=max(ranks, default=1), eps=config.norm_eps,
            final_norm=self._norm(model.norm), embedding=self._matrix(model.embed_tokens),
            head=self._matrix(model.lm_head), prev_embeddings=self._array(Matrix, tables),
            learned=self._array(Matrix, learned),
            frequencies=None if learned else positions.frequencies.data_ptr(),
            layers=self._array(Layer, layers),
        )  # fmt: skip

    def _layer(self, block: Any, cache: LayerCache) -> Any:
        attention, mlp = block.self_attn, block.mlp
        return Layer(
            self._norm(block.input_layernorm),
            self._norm(block.post_attention_layernorm),
            self._norm(attention.q_norm),
            self._norm(attention.k_norm),
            *(self._matrix(getattr(attention, f"{name}_proj")) for name in "qkvo"),
            self._matrix(mlp.gate_proj) if isinstance(mlp, SwiGLUFeedForward) else Matrix(),
            self._matrix(mlp.up_proj),
            self._matrix(mlp.down_proj),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
        )

    def _matrix(self, layer: Any) -> Any:
        updates = []
        if isinstance(layer, LoRALinear):
            for update, weight in _taking_part(layer):
                a, b = map(self._numbers, update.factors())
                updates.append(Update(update.rank, weight * update.scaling, a, b))
            layer = layer.original_layer
        bias = self._numbers(getattr(layer, "bias", None))
        weight = self._numbers(layer.weight)
        return Matrix(*layer.weight.shape, len(updates), weight, bias, self._array(Update, updates))

    def _norm(self, norm: nn.Module) -> Any:
        weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        return Norm(self._numbers(weight), self._numbers(bias))

    def _numbers(self, tensor: Tensor | None) -> Any:
        return Numbers() if tensor is None else Numbers(tensor.data_ptr(), KINDS[tensor.dtype])

    def _array(self, kind: Any, values: list[Any]) -> Any:
        array = (kind * len(values))(*values)
        self._kept.append(array)
        return array if values else None


def _taking_part(layer: LoRALinear) -> list[tuple[LoRAUpdate, float]]:
    """Returns the updates that take part in a layer, each with its weight."""
    if not layer.enabled or not isinstance(layer.active, WeightedAdapters):
        return []
    weights = layer.active.weights.items()
    return [(layer.updates[n], w) for n, w in weights if n in layer.updates]  # type: ignore[misc]


class NativeSteps:
    """The decoder of a model that may be operated on between two steps.

    Args:
        model: to be decoded.
        cache: of the tokens so far.
        required: the decoder is asked for.

    Raises:
        SurgeryError: the decoder is required, and does not compute this model, now or at a step.
    """

    def __init__(self, model: SimpleGPT, cache: KVCache, required: bool = False):
        self.model, self.cache, self.required = model, cache, required
        self.decoder: NativeDecoder | None = None
        self.facts: list[Any] = []
        if required:
            self.can_step()

    def can_step(self) -> bool:
        """Returns whether the decoder computes the model as it stands."""
        facts = _facts(self.model, self.cache)
        if facts != self.facts:
            reason = unsupported_reason(self.model, self.cache)
            if reason and self.required:
                raise SurgeryError(f"the compiled decoder is not used: {reason}", "engine='plain'")
            self.decoder = None if reason else NativeDecoder(self.model, self.cache)
            self.facts = facts
        return self.decoder is not None

    def step(self, ids: Tensor) -> Tensor:
        """Returns the logits (B, V) after ids (B, 1)."""
        assert self.decoder is not None, "can_step has seen to it"
        return self.decoder.step(ids)


def _facts(model: SimpleGPT, cache: KVCache) -> list[Any]:
    """Returns what a decoder is made from: where tensors lie, which modules and adapters there are.

    What is written in place is seen at once, since nothing is copied.
    """
    facts: list[Any] = [(t.data_ptr(), t.dtype) for t in model.parameters()]
    facts += [layer.keys.data_ptr() for layer in cache.layers]
    for module in model.modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        facts.append((id(module), hooks, len(vars(module))))
        if isinstance(module, LoRALinear):
            facts.append((module.active, *((id(u), w, u.scaling) for u, w in _taking_part(module))))
        if isinstance(module, CausalSelfAttention):
            facts.append(module.attend)
    return facts
