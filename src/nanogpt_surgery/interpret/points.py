"""Places in a model where one can look and intervene: outputs of modules, points of the anatomy.

The output of any module is a point, by the module's path (`layers.0.mlp`, `norm`, `lm_head`), in
any model. In a `SimpleGPT` each block N has these besides:

    | point                     | shape        | it is                                             |
    |---------------------------|--------------|---------------------------------------------------|
    | layers.N.residual_before  | (B, T, C)    | the residual stream as the block finds it         |
    | layers.N.residual_between | (B, T, C)    | the same after attention, before the feed-forward |
    | layers.N.residual         | (B, T, C)    | the same as the block leaves it                   |
    | layers.N.attention        | (B, H, T, S) | how much each token looks at each key             |
    | layers.N.heads            | (B, T, H, C) | each head's share in the residual stream, without |
    |                           |              | the bias of `o_proj`                              |
    | layers.N.neurons          | (B, T, I)    | inside the feed-forward, before `down_proj`       |

Legend: B batch, T tokens, S keys, C width, H heads, D head width, I width in the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from threading import Lock
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError, nearest, quoted
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import (
    CausalSelfAttention,
    TransformerEncoderLayer,
    repeat_heads,
)

See: TypeAlias = Callable[[Tensor], Tensor | None]
"""Is given the value of a point; what it returns, if anything, takes the value's place."""
Undo: TypeAlias = Callable[[], object]


def points_of(model: nn.Module) -> list[str]:
    """Returns the names of all points of a model: those of the anatomy, then the modules'."""
    blocks = range(len(model.layers)) if isinstance(model, SimpleGPT) else range(0)
    anatomy = [f"layers.{i}.{name}" for i in blocks for name in ANATOMY]
    return anatomy + [name for name, _ in model.named_modules() if name]


def find_points(model: nn.Module, patterns: str | Iterable[str]) -> list[str]:
    """Returns the points that names mean, in which `*` is any letters, in a fixed order.

    Raises:
        SurgeryError: one of them means none (with the nearest name).
    """
    there, wanted = points_of(model), [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in there):
            raise SurgeryError(
                f"the model has no point {quoted(pattern)}", f"near it: {nearest(pattern, there)}"
            )
    return [name for name in there if any(fnmatchcase(name, pattern) for pattern in wanted)]


@contextmanager
def tap(model: nn.Module, point: str, see: See) -> Iterator[None]:
    """Within the block, calls `see` with the value of a point in every forward pass.

    Several taps of one point see it in the order in which they were put there, each as the one
    before it left it. After the block the model has the hooks and attributes that it had.
    """
    block, _, name = point.rpartition(".")
    if isinstance(model, SimpleGPT) and name in ANATOMY and point in points_of(model):
        module, install = model.get_submodule(block), ANATOMY[name]
    else:
        module, name, install = model.get_submodule(point), "", _at_output
    chains = _CHAINS.setdefault(module, {})
    if name not in chains:
        chains[name] = _Chain(module, install)
    chains[name].sees.append(see)
    try:
        yield
    finally:
        chains[name].sees.remove(see)
        if not chains[name].sees:
            chains.pop(name).undo()


class _Chain:
    """All that see one point, in order."""

    def __init__(self, module: Any, install: Callable[[Any, See], Undo]):
        self.sees: list[See] = []
        self.undo = install(module, self)

    def __call__(self, value: Tensor) -> Tensor | None:
        first = value
        for see in self.sees:
            new = see(value)
            value = value if new is None else new
        return None if value is first else value


_CHAINS: WeakKeyDictionary[nn.Module, dict[str, _Chain]] = WeakKeyDictionary()


def _at_output(module: nn.Module, see: See) -> Undo:
    """The output of a module: a tensor, or the first of a tuple."""

    def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple) and bool(output)
        value = output[0] if is_tuple else output
        if not isinstance(value, Tensor):
            kind, made = type(module).__name__, type(value).__name__
            raise SurgeryError(f"the output of this {kind} is a {made}, not a tensor")
        new = see(value)
        return None if new is None else (new, *output[1:]) if is_tuple else new

    return module.register_forward_hook(hook).remove


def _at_input(see: See, _module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    new = see(inputs[0])
    return None if new is None else (new, *inputs[1:])


def _before(block: TransformerEncoderLayer, see: See) -> Undo:
    return block.register_forward_pre_hook(partial(_at_input, see)).remove


def _between(block: TransformerEncoderLayer, see: See) -> Undo:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        new = see(inputs[0])
        if new is not None:  # in place: the block adds the feed-forward to this very tensor
            inputs[0].copy_(new)

    return block.post_attention_layernorm.register_forward_pre_hook(hook).remove


def _neurons(block: TransformerEncoderLayer, see: See) -> Undo:
    return block.mlp.down_proj.register_forward_pre_hook(partial(_at_input, see)).remove  # type: ignore[union-attr]


def _attention(block: TransformerEncoderLayer, see: See) -> Undo:
    """The way to attend, exchanged within each forward pass and not longer.

    So it does not matter what a training puts in that place, and when it takes it back.
    """
    attention, lock = block.self_attn, Lock()
    replaced: list[Callable[..., Tensor]] = []  # one for each pass that is under way

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None) -> Tensor:
        new = see(attention_probabilities(q, k, mask))
        if new is None:
            return replaced[0](q, k, v, dropout, mask)
        return new @ repeat_heads(v, q.size(1))  # (B, H, T, D)

    def begin(*_: Any) -> None:
        with lock:
            replaced.append(replaced[0] if replaced else attention.attend)
            attention.attend = attend

    def end(*_: Any) -> None:
        with lock:
            if len(replaced) == 1:
                attention.attend = replaced[0]
            del replaced[-1:]  # of nothing, where an earlier hook ended the pass before it began

    hooks = ExitStack()
    hooks.callback(attention.register_forward_pre_hook(begin).remove)
    hooks.callback(attention.register_forward_hook(end, always_call=True).remove)
    return hooks.close


def attention_probabilities(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns softmax(q kᵀ / √D), (B, H, T, S), of q (B, H, T, D) and k (B, G, S, D).

    Query t sees keys 0 … S − T + t, or what a mask (B, 1, T, S) lets it see.
    """
    new, keys = q.size(2), k.size(2)
    scores = q.float() @ repeat_heads(k, q.size(1)).float().mT / q.size(3) ** 0.5
    if mask is None:
        mask = torch.ones(new, keys, dtype=torch.bool, device=q.device).tril(keys - new)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)


def _heads(block: TransformerEncoderLayer, see: See) -> Undo:
    attention = block.self_attn

    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        shares = head_shares(attention, inputs[0])
        new = see(shares)
        return None if new is None else output + (new - shares).sum(2)  # (B, T, C)

    return attention.o_proj.register_forward_hook(hook).remove


def head_shares(attention: CausalSelfAttention, gathered: Tensor) -> Tensor:
    """Returns what each head adds to the residual stream, (B, T, H, C), without `o_proj`'s bias.

    `gathered` (B, T, H · D) is what all heads gathered, the input of `o_proj`.
    """
    # By `forward`, so that adapters take part and hooks do not.
    project, d = attention.o_proj.forward, attention.head_dim
    nothing = project(torch.zeros_like(gathered))  # the bias alone
    shares = []
    for first in range(0, gathered.size(2), d):
        alone = torch.zeros_like(gathered)
        alone[..., first : first + d] = gathered[..., first : first + d]
        shares.append(project(alone) - nothing)  # (B, T, C)
    return torch.stack(shares, 2)


ANATOMY: dict[str, Callable[[Any, See], Undo]] = {
    "residual_before": _before,
    "residual_between": _between,
    "residual": _at_output,
    "attention": _attention,
    "heads": _heads,
    "neurons": _neurons,
}
