"""Interventions: another value in the place of what a model computes at a point.

Legend: B batch, T tokens, C width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import index
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, quoted, warn
from nanogpt_surgery.interpret.points import find_points, tap

Places: TypeAlias = Sequence[int] | None
Change: TypeAlias = Callable[[Tensor], Tensor]
# The axis of each kind of place, by the last part of a point's name; of any other: rows, positions.
_BY_HEAD = {"rows": 0, "heads": 1, "positions": 2}
_AXES = {
    "attention": _BY_HEAD,
    "q_norm": _BY_HEAD,  # (B, H, T, D), and k_norm (B, G, T, D)
    "k_norm": _BY_HEAD,
    "heads": {"rows": 0, "positions": 1, "heads": 2},
}


@dataclass(frozen=True)
class Intervention:
    """A change of a point's value at chosen places; everywhere where none are chosen."""

    change: Change
    """is given the value of the chosen places, and returns what takes its place"""
    rows: Places = None
    """of the batch"""
    positions: Places = None
    """of the tokens; −1 is the last one (in attention: of the queries)"""
    heads: Places = None
    """where the point has heads"""

    def __post_init__(self) -> None:
        for name in ("rows", "positions", "heads"):
            chosen: Any = getattr(self, name)
            try:
                numbers = None if chosen is None else [index(number) for number in chosen]
            except TypeError:
                raise SurgeryError(f"{name} are {quoted(chosen)}; they must be numbers") from None
            object.__setattr__(self, name, numbers)

    def __call__(self, point: str, value: Tensor) -> Tensor:
        """Returns the value after the change; the argument is left as it is.

        Raises:
            SurgeryError: the value has no such places, or the change has another shape.
        """
        places = self._places(point, value)
        part = value[places]
        new = self.change(part)
        try:
            new = new.to(value).expand_as(part)
        except RuntimeError:
            shapes = f"{tuple(new.shape)}, not {tuple(part.shape)}"
            raise SurgeryError(f"what is put at {point} has the shape {shapes}") from None
        changed = value.clone()
        changed[places] = new
        return changed

    def _places(self, point: str, value: Tensor) -> tuple[Tensor, ...]:
        """Returns the chosen places as an index of the value, one tensor an axis."""
        axes = _AXES.get(point.rpartition(".")[2], {"rows": 0, "positions": 1})
        places = [torch.arange(size, device=value.device) for size in value.shape]
        for name in ("rows", "positions", "heads"):
            chosen: Places = getattr(self, name)
            if chosen is None:
                continue
            if name not in axes:
                raise SurgeryError(f"{point} has no {name}, shape {tuple(value.shape)}")
            size = value.size(axes[name])
            if outside := [i for i in chosen if not -size <= i < size]:
                raise SurgeryError(f"{point} has {size} {name}; {outside[0]} is not one of them")
            places[axes[name]] = places[axes[name]][list(chosen)]
        return torch.meshgrid(*places, indexing="ij")


def zero(**places: Places) -> Intervention:
    """Returns the intervention that puts zeros; `places` are the fields of `Intervention`."""
    return Intervention(torch.zeros_like, **places)


def mean(**places: Places) -> Intervention:
    """Returns the intervention that puts the mean over the chosen rows and positions.

    In attention, whose second axis is that of the heads, it is the mean over rows and heads.
    """
    return Intervention(lambda part: part.mean((0, 1), keepdim=True), **places)


def put(value: Tensor, **places: Places) -> Intervention:
    """Returns the intervention that puts a tensor, such as another run's activation.

    Its shape is that of the chosen places, or one that torch expands to it.
    """
    return Intervention(lambda part: value, **places)


def add(vector: Tensor, scale: float = 1.0, **places: Places) -> Intervention:
    """Returns the intervention that adds a vector (C,), times a scale.

    Raises:
        SurgeryError: it is no vector, or a number in it, or the scale, is not finite.
    """
    scaled = scale * _checked_vector("the vector", vector)
    return Intervention(lambda part: part + _fitted("the vector", scaled, part), **places)


def project_out(direction: Tensor, share: float = 1.0, **places: Places) -> Intervention:
    """Returns the intervention that takes out what points along a direction (C,), or a share of it.

    Raises:
        SurgeryError: it is no vector, a number in it is not finite, or it has no length.
    """
    vector = _checked_vector("the direction", direction)
    length = vector.norm()
    if not bool(length > 0):
        raise SurgeryError(f"the direction has the length {float(length)}; it points nowhere")

    def change(part: Tensor) -> Tensor:
        unit = _fitted("the direction", vector / length, part)
        return part - share * (part @ unit)[..., None] * unit

    return Intervention(change, **places)


def _checked_vector(what: str, vector: Tensor) -> Tensor:
    if not isinstance(vector, Tensor) or vector.dim() != 1 or vector.is_complex():
        kind = type(vector).__name__
        found = f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else kind
        raise SurgeryError(f"{what} is {found}; it must be a tensor of real numbers, (C,)")
    if wrong := int((~vector.isfinite()).sum()):
        raise SurgeryError(f"{what} has {wrong} of {len(vector)} numbers that are not finite")
    return vector if vector.is_floating_point() else vector.float()


def _fitted(what: str, vector: Tensor, part: Tensor) -> Tensor:
    if part.shape[-1:] != vector.shape:
        raise SurgeryError(
            f"{what} has {len(vector)} numbers; the point is {tuple(part.shape)} there"
        )
    return vector.to(part)


@check_arguments
@contextmanager
def patch(model: nn.Module, interventions: Mapping[str, Intervention]) -> Iterator[None]:
    """Within the block, changes what a model computes at points.

        with patch(model, {"layers.3.heads": zero(heads=[1, 4])}):
            logits = model(ids)

    After the block, left by an exception or not, the model has its hooks and its attributes back;
    its weights are never touched. A point that no pass came by, or an intervention that changed no
    number, is a `SurgeryWarning` then.

    Args:
        model: any module; the points of the anatomy (interpret/points.py) are a `SimpleGPT`'s.
        interventions: by the names of points, in which `*` stands for any letters.

    Raises:
        SurgeryError: a name means no point; from the model's forward, a point has not the places
            that were chosen, or not the shape of what is put there.
    """
    changed: dict[str, bool | None] = {}
    for pattern, intervention in interventions.items():
        if not isinstance(intervention, Intervention):
            kind = type(intervention).__name__
            raise SurgeryError(f"{quoted(pattern)} gets a {kind}, no Intervention", "put(value)")
    with ExitStack() as stack:
        for pattern, intervention in interventions.items():
            for point in find_points(model, pattern):
                see = _seen(point, intervention, changed)
                stack.enter_context(tap(model, point, see))
        yield
    for verdict, what in ((None, "no forward pass came by"), (False, "nothing was changed at")):
        if points := [point for point, found in changed.items() if found is verdict]:
            warn(f"{what} {', '.join(points)}")


def _seen(point: str, intervention: Intervention, changed: dict[str, bool | None]) -> Any:
    changed.setdefault(point, None)

    def see(value: Tensor) -> Tensor:
        new = intervention(point, value)
        changed[point] = bool(changed[point]) or not torch.equal(new, value)
        return new

    return see
