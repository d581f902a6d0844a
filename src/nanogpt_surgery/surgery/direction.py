"""Directions: found between two sets of prompts, and followed while a model computes (steering).

A direction is the difference between two means of a point's value, over prompts of one kind and of
another, at one position of each (arXiv:2308.10248, arXiv:2312.06681). Added to the point in every
forward pass it moves answers towards the first kind; projected out, it is what the model can no
longer see from there on. Weights are never touched.

Legend: B batch, T tokens, C width of the point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.interpret.patching import Intervention, add, patch, project_out
from nanogpt_surgery.interpret.points import find_points
from nanogpt_surgery.interpret.recording import checked_ids, point_shape, record
from nanogpt_surgery.lora.merging import logits_of
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.operating import FLOAT32, costs, effect_on_logits, pass_seconds

Operation: TypeAlias = Literal["add", "project_out"]
OPERATIONS = ("add", "project_out")


@dataclass(frozen=True)
class Direction:
    """A direction at one or several points, and what is done with it there.

    Raises:
        SurgeryError: there is none, a vector is not (C,), not finite or of no length, the operation
            is not known, or the scale is not finite.
    """

    vectors: Mapping[str, Tensor]
    """by the name of a point, such as layers.12.residual: (C,), float32"""
    operation: Operation = "add"
    scale: float = 1.0
    """of what is added; of what is projected out, the share"""
    origin: str = ""
    """what it was made of, in words"""

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise SurgeryError(f"{quoted(self.operation)} is not one of {', '.join(OPERATIONS)}")
        check_scale(self.scale)
        if not self.vectors:
            raise SurgeryError("a direction has at least one point; this one has none")
        for point, vector in self.vectors.items():
            if vector.dim() != 1 or not vector.is_floating_point():
                found = f"{vector.dtype} {tuple(vector.shape)}"
                raise SurgeryError(f"the direction at {quoted(point)} is {found}, no floats (C,)")
            length = float(vector.double().norm())
            if not 0 < length < math.inf:
                raise SurgeryError(
                    f"the direction at {quoted(point)} has the length {length}; it points nowhere"
                )

    def interventions(self, scale: float | None = None) -> dict[str, Intervention]:
        """Returns what `patch` does with it, by point; `scale` takes the place of its own."""
        make = add if self.operation == "add" else project_out
        factor = self.scale if scale is None else scale
        return {point: make(vector, factor) for point, vector in self.vectors.items()}


def check_scale(scale: float) -> None:
    """Raises `SurgeryError` unless a scale is finite."""
    if not math.isfinite(scale):
        raise SurgeryError(f"the scale of a direction is {scale}; it must be finite")


@check_arguments
@contextmanager
def steer(model: nn.Module, direction: Direction, scale: float | None = None) -> Iterator[None]:
    """Within the block, a model follows a direction at every position of every pass.

        with steer(model, direction, scale=2):
            generate(model, prompt, 40)

    After the block, left by an exception or not, the model has no hook of it. Tokens are computed
    by the readable code meanwhile: the compiled decoder refuses a model with hooks.

    Args:
        model: of the direction's width; by a module's path also one of transformers.
        direction: to follow.
        scale: in the place of its own; a negative one leads the other way.

    Raises:
        SurgeryError: the model has no such point, or it is of another width there.
    """
    check_scale(direction.scale if scale is None else scale)
    for point, vector in direction.vectors.items():
        find_points(model, [point])
        shape = point_shape(model, point, 1, 1) if isinstance(model, SimpleGPT) else None
        if shape is not None and shape[2:] != vector.shape:
            there = " × ".join(map(str, shape[2:]))
            raise SurgeryError(
                f"the direction at {quoted(point)} has {len(vector)} numbers; the model has "
                f"{there} there",
                "a direction belongs to the model that it was made with",
            )
    with patch(model, direction.interventions(scale)):
        yield


Prompts: TypeAlias = Sequence[Sequence[int]]


@check_arguments
def mean_difference(
    model: nn.Module,
    positive: Prompts,
    negative: Prompts,
    points: str | Iterable[str],
    *,
    position: int | None = -1,
    operation: Operation = "add",
    scale: float = 1.0,
    probe: Tensor | None = None,
) -> tuple[Direction, Report]:
    """Finds the direction from prompts of one kind to prompts of another, at points.

    Args:
        model: left as it is; adapters that are active take part.
        positive: prompts of the kind that the direction leads to, each a list of ids.
        negative: of the kind that it leads away from.
        points: names, in which `*` stands for any letters; their values are (B, T, C).
        position: of the token in each prompt, −1 the last; None takes the mean over all of them.
        operation: what steering with it does.
        scale: of it.
        probe: ids (B, T), on which the steered model is compared with the plain one.

    Returns:
        The direction, and a report with a row for each point: its length; the mean length of what
        the point holds there; and the share of the prompts that lie on their own side of the plane
        half-way between the means, by which alone nothing is shown about other prompts. With a
        probe also KL divergence, loss, and the share of equal greedy tokens.

    Raises:
        SurgeryError: a point is not there or not (B, T, C), a prompt is empty or has no such
            position, an id is not in the vocabulary, or both means are equal.
    """
    names = find_points(model, points)
    here = _values(model, positive, names, position, "positive")
    there = _values(model, negative, names, position, "negative")
    vectors = {name: here[name].mean(0) - there[name].mean(0) for name in names}  # (C,)
    where = "the mean of all tokens" if position is None else f"token {position}"
    origin = f"mean of {len(positive)} prompts − mean of {len(negative)}, at {where}"
    direction = Direction(vectors, operation, scale, origin)
    rows = [{"point": name, **_measured(here[name], there[name], vectors[name])} for name in names]
    summary = {"origin": origin, "operation": operation, "scale": scale}
    if probe is not None:
        summary |= steering_effect(model, direction, probe)
    return direction, Report("direction", rows, summary)


@check_arguments
def plan_direction(
    model: nn.Module, positive: Prompts, negative: Prompts, points: str | Iterable[str]
) -> Report:
    """Says what `mean_difference` with the same arguments would do; one prompt is computed.

    Returns:
        A row for each point, with the numbers and bytes of its direction where its width is
        foreseen; how many forward passes over how many tokens it takes, memory, and time.

    Raises:
        SurgeryError: a point is not there, or no prompt has a token.
    """
    names, prompts = find_points(model, points), [*positive, *negative]
    longest = max(prompts, key=len, default=[])
    if not longest:
        raise SurgeryError("no prompt has a token", "at least one of each kind is needed")
    shapes = [
        point_shape(model, name, 1, 1) if isinstance(model, SimpleGPT) else None for name in names
    ]
    rows: list[dict[str, Any]] = [
        {"point": name, "numbers": shape and shape[-1], "bytes": shape and 4 * shape[-1]}
        for name, shape in zip(names, shapes, strict=True)
    ]
    summary = {"positive prompts": len(positive), "negative prompts": len(negative)}
    passes = {"forward passes": len(prompts), "tokens": sum(map(len, prompts))}
    tokens = passes["tokens"]
    seconds = pass_seconds(model, torch.tensor([list(longest)]), tokens)
    size = FLOAT32 * tokens * sum(row["numbers"] or 0 for row in rows)
    return Report("direction planned", rows, summary | passes | costs(model, size, seconds))


def _values(
    model: nn.Module, prompts: Prompts, names: list[str], position: int | None, kind: str
) -> dict[str, Tensor]:
    """Returns the value of each point for each prompt, (prompts, C), float32."""
    if not prompts:
        raise SurgeryError(f"there is no {kind} prompt", "at least one of each kind is needed")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for number, ids in enumerate(prompts, 1):
        count = len(ids)
        if not count or (position is not None and not -count <= position < count):
            raise SurgeryError(
                f"{kind} prompt {number} has {count} tokens, and position is {position}"
            )
        row = torch.tensor([list(ids)])
        row = checked_ids(model, row) if isinstance(model, SimpleGPT) else row
        with eval_mode(model), torch.no_grad(), record(model, names) as activations:
            model(row.to(next(model.parameters()).device))
        for name in names:
            found[name].append(_at(name, activations, position))
    return {name: torch.stack(values) for name, values in found.items()}  # (prompts, C)


def _at(name: str, activations: Mapping[str, Tensor], position: int | None) -> Tensor:
    """Returns the value of a point at a position, or the mean over all, (C,)."""
    if name not in activations:
        raise SurgeryError(f"no forward pass came by {name}, so it has no value")
    value = activations[name]
    if value.dim() != 3:
        raise SurgeryError(f"{name} is {tuple(value.shape)}; a direction needs (B, T, C)")
    numbers = value[0].float().cpu()  # (T, C)
    return numbers.mean(0) if position is None else numbers[position]


def _measured(here: Tensor, there: Tensor, vector: Tensor) -> dict[str, Any]:
    """Returns the sizes of a direction, and how well it parts the prompts it was made of."""
    middle = (here.mean(0) + there.mean(0)) / 2
    right = [((here - middle) @ vector > 0), ((there - middle) @ vector < 0)]
    return {
        "length": float(vector.norm()),
        "mean length there": float(torch.cat((here, there)).norm(dim=1).mean()),
        "on their side": float(torch.cat(right).double().mean()),
    }


def steering_effect(model: nn.Module, direction: Direction, probe: Tensor) -> dict[str, Any]:
    """Compares a model that follows a direction with the plain one on ids (B, T)."""
    ids = checked_ids(model, probe) if isinstance(model, SimpleGPT) else probe
    before = logits_of(model, ids)
    with steer(model, direction):
        return effect_on_logits(before, logits_of(model, ids), ids)
