"""The compiled decoder of a model: what decoder.c reads, filled from a `SimpleGPT` as it stands.

Nothing is copied: the structures point at the model's own tensors, wherever they lie, at its
adapters' factors and at the caches. What they were taken from is compared before every step of
`NativeSteps`, so that after any operation, or with another adapter, the decoder is built anew.

Legend: B rows, T new tokens a row, N new tokens of a step, V vocabulary.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.native.library import decoder_library
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.linear import LoRALinear, LoRAUpdate
from nanogpt_surgery.lora.per_row import PerRowAdapters, is_row_check
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.embeddings import (
    LearnedPositions,
    PrevTokenEmbeddings,
    RotaryPositions,
    identity,
    rotate,
)
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.model.quantized import (
    BLOCK,
    BLOCK_BYTES,
    QuantizedEmbedding,
    QuantizedLinear,
    shape_of,
)
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import (
    ACTIVATIONS,
    CausalSelfAttention,
    PlainFeedForward,
    RMSNorm,
    SwiGLUFeedForward,
    TransformerEncoderLayer,
    causal_attention,
)

KINDS = {torch.float32: 0, torch.bfloat16: 1}
BLOCK_KINDS = {"Q8_0": 2, "Q4_0": 3, "Q4_1": 4}
NORMS = {"layernorm": 0, "rmsnorm": 1}
MLPS = {"gelu": 0, "gelu_tanh": 1, "relu2": 2, "swiglu": 3}
POSITIONS = {"learned": 0, "rotary": 1}
ALL = -1  # an update for the tokens of every adapter
MOST = 64  # tokens of a step, where the cache has no more rows
# Up to so many new tokens of a text the decoder is faster than PyTorch, as measured (docs/log.md):
# PyTorch makes numbers of all blocks in each pass, and imitates bfloat16 where the processor has no
# such products; then the decoder takes any number.
LONGEST = {"float32": 256, "bfloat16": 16, "blocks": 320}
# The modules whose arithmetic decoder.c has.
KNOWN = (
    *(SimpleGPT, TransformerEncoderLayer, CausalSelfAttention, PlainFeedForward),
    *(SwiGLUFeedForward, RMSNorm, RotaryPositions, LearnedPositions, PrevTokenEmbeddings),
    *(nn.LayerNorm, nn.Linear, nn.Embedding, nn.Identity, nn.Dropout, nn.ModuleList),
    *(nn.ModuleDict, LoRALinear, LoRAUpdate, QuantizedLinear, QuantizedEmbedding),
)


def struct(name: str, **fields: Any) -> Any:
    """Returns the class of a structure of C, its fields in order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _ints(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), ctypes.c_int32)


POINTER, FLOAT = ctypes.c_void_p, ctypes.c_float
Numbers = struct("Numbers", at=POINTER, kind=ctypes.c_int32)
Update = struct("Update", **_ints("rank adapter"), scale=FLOAT, a=Numbers, b=Numbers)
Matrix = struct("Matrix", **_ints("rows columns n_updates"), weight=Numbers, bias=Numbers,
                updates=ctypes.POINTER(Update))  # fmt: skip
Norm = struct("Norm", weight=Numbers, bias=Numbers)
Layer = struct("Layer", **dict.fromkeys(("input_norm", "mlp_norm", "q_norm", "k_norm"), Norm),
               **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), Matrix))  # fmt: skip
Cache = struct("Cache", layers=POINTER, length=ctypes.c_int32)
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


def unsupported_reason(model: SimpleGPT, cache: KVCache) -> str:
    """Returns why the compiled decoder does not compute a model with a cache, or "" if it does.

    C trusts what it is given: every size and every piece of memory that it reads is checked here.
    """
    if _hooks_on_all_modules():
        return "there is a hook on all modules"
    for name, module in model.named_modules():
        if reason := _unknown(module, model.config):
            return f"{name or 'the model'} {reason}"
    for name, types, shape in _parts(model.config):
        try:
            part = model.get_submodule(name)
        except AttributeError:
            return f"{name} is not there"
        if type(part) not in types:
            return f"{name} is a {type(part).__name__}, not a {types[0].__name__}"
        for what, tensor, wanted in _tensors(part, shape):
            dtypes = (torch.uint8,) if what == "blocks" else tuple(KINDS)
            if reason := _unreadable(tensor, wanted, dtypes):
                return f"{what} of {name} {reason}"
    return _unfit(model, cache) or decoder_library()[1]


def _hooks_on_all_modules() -> bool:
    return bool(every_module._global_forward_hooks or every_module._global_forward_pre_hooks)


def _hooked(parts: dict[str, Any]) -> bool:
    """Returns whether the attributes of a module have its forward do more than its class says."""
    hooks = (*parts["_forward_hooks"].values(), *parts["_forward_pre_hooks"].values())
    return "forward" in parts or not all(map(is_row_check, hooks))


def _unknown(module: Any, config: GPTConfig) -> str:
    """Returns what a module computes in another way than decoder.c does, or ""."""
    if type(module) not in KNOWN:
        return f"is a {type(module).__name__}"
    if _hooked(vars(module)):
        return "has a hook"
    if isinstance(module, CausalSelfAttention):
        rotation = rotate if config.positions == "rotary" else identity
        if module.attend is not causal_attention or module.rotate is not rotation:
            return "has another attention"
    if isinstance(module, (PlainFeedForward, SwiGLUFeedForward)):
        # SwiGLU has no attribute for its activation, and no entry in the table.
        found, wanted = getattr(module, "activation", None), ACTIVATIONS.get(config.mlp)
        if _parts_of_call(found) != _parts_of_call(wanted):
            return f"has another activation than {config.mlp}"
    if isinstance(module, (RMSNorm, nn.LayerNorm)) and module.eps != config.norm_eps:
        return f"has eps {module.eps}, not the config's {config.norm_eps}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "has a max_norm"
    return ""


def _parts_of_call(call: Any) -> tuple[Any, ...]:
    """Returns a function, and what a `partial` of it fixes: two copies of one are the same."""
    return getattr(call, "func", call), getattr(call, "keywords", {})


Part = tuple[str, tuple[type[nn.Module], ...], tuple[int, ...]]


def _parts(config: GPTConfig) -> Iterator[Part]:
    """Yields the path, the types and the shape of the weight of each module that C reads."""
    c, width, table = config, config.n_embd, (config.vocab_size, config.n_embd)
    q, kv, inner = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_inner
    norm = (RMSNorm if c.norm == "rmsnorm" else nn.LayerNorm,)
    head_norm = ((RMSNorm if c.qk_norm else nn.Identity),)
    linear = (nn.Linear, QuantizedLinear, LoRALinear)
    embedding = (nn.Embedding, QuantizedEmbedding)
    yield "embed_tokens", embedding, table
    yield from ((f"embed_prev_tokens.{i}", embedding, table) for i in range(c.n_prev_tokens))
    rotary = c.positions == "rotary"
    positions = (RotaryPositions if rotary else LearnedPositions,)
    yield "embed_positions", positions, (c.head_dim // 2,) if rotary else (c.block_size, width)
    up = ("gate_proj", "up_proj") if c.mlp == "swiglu" else ("up_proj",)
    for i in range(c.n_layer):
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        yield f"layers.{i}.input_layernorm", norm, (width,)
        yield from ((f"{attention}.{n}_norm", head_norm, (c.head_dim,)) for n in "qk")
        yield f"{attention}.q_proj", linear, (q, width)
        yield from ((f"{attention}.{n}_proj", linear, (kv, width)) for n in "kv")
        yield f"{attention}.o_proj", linear, (width, q)
        yield f"layers.{i}.post_attention_layernorm", norm, (width,)
        yield from ((f"{mlp}.{name}", linear, (inner, width)) for name in up)
        yield f"{mlp}.down_proj", linear, (width, inner)
    yield "norm", norm, (width,)
    yield "lm_head", linear, table


def _tensors(part: Any, shape: tuple[int, ...]) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Yields the name, the tensor and the shape it must have of all that C reads of a module."""
    if isinstance(part, LoRALinear):
        for update in part.updates.values():
            a, b = update.factors()  # type: ignore[operator]
            yield "lora_A", a, (update.rank, shape[1])  # type: ignore[misc]
            yield "lora_B", b, (shape[0], update.rank)  # type: ignore[misc]
        part = part.original_layer
    if isinstance(part, (QuantizedLinear, QuantizedEmbedding)):
        n_bytes = shape[1] // BLOCK * BLOCK_BYTES.get(part.kind, 0)
        yield "blocks", part.blocks, (shape[0], n_bytes if shape[1] % BLOCK == 0 else 0)
        if getattr(part, "bias", None) is not None:
            yield "bias", part.bias, shape[:1]
    elif isinstance(part, RotaryPositions):
        yield "frequencies", part.frequencies, shape
    elif not isinstance(part, nn.Identity):
        yield "weight", part.weight, shape
        if getattr(part, "bias", None) is not None:
            yield "bias", part.bias, shape[:1]


def _unreadable(
    tensor: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = tuple(KINDS)
) -> str:
    """Returns why C cannot read a tensor as numbers of this shape in one piece, or ""."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return f"is a {type(tensor).__name__}, not a plain tensor"
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes:
        return f"is {tensor.dtype} on {tensor.device}"
    if tuple(tensor.shape) != shape:
        return f"has the shape {tuple(tensor.shape)}, not {shape}"
    return "" if tensor.is_contiguous() else "does not lie in one piece"


def _unfit(model: SimpleGPT, cache: KVCache) -> str:
    """Returns what of a model as a whole, or of its cache, is not as the config says, or ""."""
    config = model.config
    if len(model.layers) != config.n_layer or len(cache.layers) != config.n_layer:
        counts = f"{len(model.layers)} and {len(cache.layers)}, not {config.n_layer}"
        return f"the layers of the model and of the cache are {counts}"
    previous = model.embed_prev_tokens
    tables = len(previous) if isinstance(previous, PrevTokenEmbeddings) else 0
    if tables != config.n_prev_tokens or (previous is identity) != (tables == 0):
        return f"embed_prev_tokens has {tables} tables, not {config.n_prev_tokens}"
    if cache.max_length > config.block_size:
        return f"the cache is longer ({cache.max_length}) than block_size ({config.block_size})"
    shape = (cache.batch_size, config.n_kv_head, cache.max_length, config.head_dim)
    kind = cache.layers[0].keys.dtype
    for tensor in (t for layer in cache.layers for t in (layer.keys, layer.values)):
        reason = _unreadable(tensor, shape) or (tensor.dtype != kind and "has two dtypes")
        if reason:
            return f"the cache {reason}"
    names = _names_by_row(model)
    if len(names) not in (0, cache.batch_size):
        return f"adapters were given for {len(names)} rows, and the cache has {cache.batch_size}"
    frequencies = getattr(model.embed_positions, "frequencies", None)
    if frequencies is not None and frequencies.dtype != torch.float32:
        return f"the rotary frequencies are {frequencies.dtype}"
    return ""


class TextCache:
    """The cache of one text, and where C finds it.

    Args:
        cache: of one row.
    """

    def __init__(self, cache: KVCache):
        self.cache, self.ids = cache, cache.ids[0].numpy()
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        self._layers = (POINTER * len(tensors))(*(t.data_ptr() for t in tensors))
        self.structure = Cache(ctypes.addressof(self._layers), cache.max_length)


@dataclass(frozen=True)
class NewTokens:
    """The next tokens of one text; their ids are in its cache, and their keys and values not yet.

    Of the last `wanted` of `count` the logits are wanted; `adapter` is the number of the text's
    adapters among those of the decoder.
    """

    text: TextCache
    count: int = 1
    wanted: int = 1
    adapter: int = 0


Weights = Mapping[str, float]


class NativeDecoder:
    """Steps of new tokens, for a model and a cache that `unsupported_reason` lets pass.

    Args:
        model: decoded as it stands; it is made anew after any change but of numbers in place.
        cache: of all rows, for `step` and `logits`, or of the kind that those of all texts are.
        threads: PyTorch's number by default.
        adapters: the weights by name that the adapters' numbers stand for; by default those that
            `lora_rows` gives the rows, or that take part in the model.
        most: tokens that are computed at once; by default 32, or as many as there are rows.
    """

    def __init__(
        self,
        model: SimpleGPT,
        cache: KVCache,
        threads: int = 0,
        adapters: Sequence[Weights] | None = None,
        most: int = 0,
    ):
        self.library, _ = decoder_library()
        self.cache, self.texts = cache, [TextCache(row) for row in row_caches(cache)]
        self._kept: list[Any] = []  # what C points at lives as long as this
        names = _names_by_row(model)
        if adapters is None and names:
            adapters = [{} if n is None else {n: 1.0} for n in dict.fromkeys(names)]
        self.adapters = adapters
        self.adapters_of_rows = [[*dict.fromkeys(names)].index(n) for n in names]
        self.model = self._model(model)
        self.threads = threads or torch.get_num_threads()
        self.most = most or max(MOST, cache.batch_size)
        pool = self.library.pool_make(ctypes.byref(self.model), self.most, self.threads)
        if not pool:
            raise MemoryError("no memory for the buffers of the decoder")
        self.pool = pool
        end = weakref.finalize(self, self.library.pool_free, pool)
        end.atexit = False  # a daemon thread may be within a step then

    def step(self, ids: Tensor) -> Tensor:
        """Returns the logits (B, V), float32, after the last of more ids (B, T); see `KVCache`.

        Raises:
            SurgeryError: they do not fit in the cache, or one is outside the vocabulary.
        """
        return self.logits(ids, 1)[:, 0]

    def logits(self, ids: Tensor, count: int) -> Tensor:
        """Returns the logits (B, count, V) after each of the last ids of (B, T); see `step`."""
        cache, (rows, tokens) = self.cache, ids.shape
        cache.check_room(rows, tokens)
        start = cache.length
        cache.append_ids(ids)
        # In the order of time, so that those whose logits are wanted come last.
        adapters = self.adapters_of_rows or [0] * rows
        places = [(row, start + t, adapters[row]) for t in range(tokens) for row in range(rows)]
        logits = self._run(self.texts, places, rows * count).view(count, rows, -1).transpose(0, 1)
        for layer in cache.layers:
            layer.length = start + tokens
        return logits

    def step_texts(self, new: Sequence[NewTokens]) -> list[Tensor]:
        """Returns the logits (wanted, V) after the last of each text's new tokens.

        The texts' caches hold them afterwards.
        """
        unwanted, wanted = list[tuple[int, int, int]](), list[tuple[int, int, int]]()
        for number, part in enumerate(new):
            start = part.text.cache.length
            places = [(number, start + i, part.adapter) for i in range(part.count)]
            unwanted += places[: part.count - part.wanted]
            wanted += places[part.count - part.wanted :]
        # A token looks at those before it: its step may come after theirs, or be the same.
        logits = self._run([part.text for part in new], unwanted + wanted, len(wanted))
        for part in new:
            for layer in part.text.cache.layers:
                layer.length += part.count
        return list(logits.split([part.wanted for part in new]))

    def _run(
        self, texts: Sequence[TextCache], places: list[tuple[int, int, int]], wanted: int
    ) -> Tensor:
        """Returns the logits (wanted, V) after the last of new tokens.

        Each is a text's number among these, a position, the number of its adapters.
        """
        # Whatever the default dtype and device are, C reads and writes these.
        logits = torch.empty(wanted, self.model.vocab, dtype=torch.float32, device="cpu")
        caches = (Cache * len(texts))(*(text.structure for text in texts))
        for first in range(0, len(places), self.most):
            part = places[first : first + self.most]
            later = len(places) - first - len(part)
            found = max(0, min(len(part), wanted - later))  # of this part's last are wanted
            at = logits[wanted - later - found :] if found else logits
            ids = self._recent(texts, part)
            table = torch.tensor(part, dtype=torch.int32, device="cpu")  # (N, 3)
            pointers = caches, table.data_ptr(), ids.data_ptr()
            if not self.library.pool_step(self.pool, *pointers, len(part), found, at.data_ptr()):
                raise SurgeryError(
                    f"an id of {ids[:, 0].tolist()} is outside the vocabulary of {logits.size(1)}"
                )
        return logits

    def _recent(self, texts: Sequence[TextCache], places: list[tuple[int, int, int]]) -> Tensor:
        """Returns each new token's id, and those before it, the newest first: (N, 1 + n_prev)."""
        back = range(1 + self.model.n_prev)
        found = [[int(texts[n].ids[max(0, at - i)]) for i in back] for n, at, _ in places]
        return torch.tensor(found, dtype=torch.long, device="cpu")

    def _model(self, model: SimpleGPT) -> Any:
        config, layers = model.config, [self._layer(block) for block in model.layers]
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
            cache_kind=KINDS[self.cache.layers[0].keys.dtype], max_length=config.block_size,
            max_rank=max(ranks, default=1), eps=config.norm_eps,
            final_norm=self._norm(model.norm), embedding=self._matrix(model.embed_tokens),
            head=self._matrix(model.lm_head), prev_embeddings=self._array(Matrix, tables),
            learned=self._array(Matrix, learned),
            frequencies=None if learned else self._numbers(positions.frequencies).at,
            layers=self._array(Layer, layers),
        )  # fmt: skip

    def _layer(self, block: Any) -> Any:
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
        )

    def _matrix(self, layer: Any) -> Any:
        updates = []
        if isinstance(layer, LoRALinear):
            for name, weight, adapter in self._taking_part(layer):
                update: Any = layer.updates[name]
                a, b = map(self._numbers, update.factors())
                updates.append(Update(update.rank, adapter, weight * update.scaling, a, b))
            layer = layer.original_layer
        bias = self._numbers(getattr(layer, "bias", None))
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
            weight = self._numbers(layer.blocks, BLOCK_KINDS[layer.kind])
            shape = shape_of(layer.blocks, layer.kind)
        else:
            weight, shape = self._numbers(layer.weight), layer.weight.shape
        return Matrix(*shape, len(updates), weight, bias, self._array(Update, updates))

    def _taking_part(self, layer: LoRALinear) -> list[tuple[str, float, int]]:
        """Returns the updates that take part in a layer: name, weight, and for which tokens."""
        active: Any = layer.active
        if not layer.enabled:
            return []
        numbered = [(ALL, active.weights)] if self.adapters is None else enumerate(self.adapters)
        found = [(name, w, number) for number, weights in numbered for name, w in weights.items()]
        return [part for part in found if part[0] in layer.updates]

    def _norm(self, norm: nn.Module) -> Any:
        weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        return Norm(self._numbers(weight), self._numbers(bias))

    def _numbers(self, tensor: Tensor | None, kind: int | None = None) -> Any:
        if tensor is None:
            return Numbers()
        self._kept.append(tensor.detach())  # its memory, even if `tensor.data` becomes another
        return Numbers(tensor.data_ptr(), KINDS[tensor.dtype] if kind is None else kind)

    def _array(self, kind: Any, values: list[Any]) -> Any:
        array = (kind * len(values))(*values)
        self._kept.append(array)
        return array if values else None


def row_caches(cache: KVCache) -> list[KVCache]:
    """Returns a cache for each row of another, in its memory, each with its own length."""
    caches = []
    for row in range(cache.batch_size):
        one = copy(cache)
        one.batch_size, one.ids = 1, cache.ids[row : row + 1]
        one.layers = [copy(layer) for layer in cache.layers]
        for layer in one.layers:
            layer.keys, layer.values = (t[row : row + 1] for t in (layer.keys, layer.values))
        caches.append(one)
    return caches


def _names_by_row(model: SimpleGPT) -> tuple[str | None, ...]:
    """Returns the adapter of each row of a batch; none where all rows have the same."""
    active = (layer.active for layer in model.modules() if isinstance(layer, LoRALinear))
    return next((a.by_row for a in active if isinstance(a, PerRowAdapters)), ())


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
        self.longest = 0  # new tokens of a text that it is given
        self.modules, self.facts = list(model.modules()), list[Any]()
        if required:
            self.can_step()

    def can_step(self) -> bool:
        """Returns whether the decoder computes the model as it stands."""
        if _facts(self.modules, self.cache) != self.facts:
            reason = unsupported_reason(self.model, self.cache)
            if reason and self.required:
                raise SurgeryError(f"the compiled decoder is not used: {reason}", "engine='plain'")
            self.decoder = None if reason else NativeDecoder(self.model, self.cache)
            self.longest = 0 if reason else _longest(self.model)
            self.modules = list(self.model.modules())
            self.facts = _facts(self.modules, self.cache)
        return self.decoder is not None

    def can_take(self, tokens: int) -> bool:
        """Returns whether the decoder computes so many new tokens of a text, and is the faster."""
        return self.can_step() and tokens <= self.longest

    def step(self, ids: Tensor) -> Tensor:
        """Returns the logits (B, V) after ids (B, T)."""
        return self.logits(ids, 1)[:, 0]

    def logits(self, ids: Tensor, count: int) -> Tensor:
        """Returns the logits (B, count, V) after each of the last ids of (B, T)."""
        assert self.decoder is not None, "can_step has seen to it"
        return self.decoder.logits(ids, count)


def _longest(model: SimpleGPT) -> int:
    """Returns how many new tokens of a text the decoder is given at most."""
    layer: Any = model.get_submodule("layers.0.mlp.down_proj")
    layer = layer.original_layer if isinstance(layer, LoRALinear) else layer
    if isinstance(layer, QuantizedLinear):
        return LONGEST["blocks"]
    if layer.weight.dtype == torch.float32:
        return LONGEST["float32"]
    return LONGEST["bfloat16"] if _has_bfloat16() else model.config.block_size


def _has_bfloat16() -> bool:
    """Returns whether the processor multiplies bfloat16."""
    flags = torch.cpu.get_capabilities()
    return any(flags.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _facts(modules: list[nn.Module], cache: KVCache) -> list[Any]:
    """Returns what a decoder is made from: where tensors lie, which modules and adapters there are.

    What is written in place is seen at once, since nothing is copied. This runs before every step,
    over the modules that there were, without a loop in Python over what all of them have: to walk
    through the model anew takes several times as long, and where all their children are the same,
    they are all that there are.
    """
    parts = list(map(vars, modules))
    children, parameters, buffers, *hooks = (
        [value for found in filter(None, map(itemgetter(name), parts)) for value in found.values()]
        for name in DICTS
    )
    tensors = [t for t in (*parameters, *buffers) if t is not None]
    tensors += [t for layer in cache.layers for t in (layer.keys, layer.values)]
    memory = [list(map(of, tensors)) for of in MEMORY]
    hooked = _hooks_on_all_modules() or not all(map(is_row_check, chain(*hooks)))
    hooked = hooked or any("forward" in part for part in parts)
    types = list(map(type, modules))
    others = [ATTRIBUTES[t](m) for t, m in zip(types, modules, strict=True) if t in ATTRIBUTES]
    process = os.getpid(), torch.get_num_threads()
    shape = cache.batch_size, cache.max_length
    return [children, memory, hooked, types, others, process, shape]


DICTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
MEMORY = (Tensor.data_ptr, attrgetter("dtype"), Tensor.size, Tensor.is_contiguous)


def _adapters(layer: LoRALinear) -> Any:
    active: Any = layer.active
    weights = [*active.weights.items()] if isinstance(active, WeightedAdapters) else active.by_row
    return layer.enabled, weights, [*vars(layer)["_modules"]["updates"]._modules]


# The attributes of modules, besides tensors and children, that a decoder is made from.
ATTRIBUTES: dict[type, Callable[[Any], Any]] = {
    SimpleGPT: attrgetter("config", "embed_prev_tokens"),
    RMSNorm: attrgetter("eps"),
    nn.LayerNorm: attrgetter("eps"),
    nn.Embedding: attrgetter("max_norm"),
    QuantizedLinear: attrgetter("kind"),
    QuantizedEmbedding: attrgetter("kind"),
    CausalSelfAttention: attrgetter("attend", "rotate"),
    PlainFeedForward: attrgetter("activation"),
    RotaryPositions: lambda positions: [of(positions.frequencies) for of in MEMORY],
    LoRALinear: _adapters,
    LoRAUpdate: attrgetter("rank", "scaling"),
}
