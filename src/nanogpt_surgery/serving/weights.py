"""Which weights compute a text: a hash of the base and of the adapters that take part."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.history.model_history import UPDATES, plain_name, tensor_hash, tensor_hashes
from nanogpt_surgery.lora.layer import LoRALayer

_NUMBERS = count()


class WeightHashes:
    """The hashes of a model as it stands; made anew after any change.

    Beside its tensors they cover which modules there are and how they are set. A hook, or an
    attribute that cannot be compared, makes them like those of no other time.

    Attributes:
        base: of the model without adapters.
        adapters: of each adapter.
    """

    def __init__(self, model: nn.Module):
        lines: dict[str, list[str]] = defaultdict(list)
        for path, module in model.named_modules():
            lines[_owner(path)].append(_facts(plain_name(f"{path}.")[:-1], module))
        for path, digest in tensor_hashes(model).items():
            lines[_owner(path)].append(f"{path} {digest}")
        self.base = _hash(lines.pop(""))
        self.adapters = {name: _hash(of_name) for name, of_name in lines.items()}

    def of(self, weights: Mapping[str, float]) -> str:
        """Returns the hash of the base with adapters, each with its weight."""
        if not weights:
            return self.base
        parts = (f"{self.adapters[name]} {weight!r}" for name, weight in sorted(weights.items()))
        return _hash([self.base, *parts])


def _owner(path: str) -> str:
    """Returns the adapter that a module or a tensor belongs to, "" for the base."""
    return path.partition(UPDATES)[2].partition(".")[0]


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()


def _facts(path: str, module: nn.Module) -> str:
    """Returns a module's path, its class, and its attributes but parameters, buffers and modules.

    Of what wraps a layer, nothing: without adapters it computes what the layer does.
    """
    hooks = _unlike_any() if module._forward_hooks or module._forward_pre_hooks else ""
    if isinstance(module, LoRALayer) or path.endswith(UPDATES.rstrip(".")):
        return hooks
    shown = {n: _shown(v) for n, v in vars(module).items() if n[0] != "_" and n != "training"}
    kind = type(module)
    return f"{path} {kind.__module__}.{kind.__qualname__} {shown} {hooks}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str, tuple)) or is_dataclass(value):
        return repr(value)
    if isinstance(value, Tensor):  # as the frequencies of rotary positions are
        return tensor_hash(value)
    if isinstance(value, partial):
        return f"{_shown(value.func)} {value.args} {value.keywords}"
    name = getattr(value, "__qualname__", "<")
    comparable = isinstance(value, Callable) and "<" not in name  # type: ignore[arg-type]
    return f"{getattr(value, '__module__', '')}.{name}" if comparable else _unlike_any()


def _unlike_any() -> str:
    return f"unlike any other {next(_NUMBERS)}"
