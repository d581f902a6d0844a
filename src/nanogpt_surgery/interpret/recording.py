"""Recording what happens inside a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.interpret.points import find_points, tap
from nanogpt_surgery.memory import check_memory
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import check_ids


class Activations(Mapping[str, Tensor]):
    """The values of points in the last forward pass, by name; copies, without gradient."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def __getitem__(self, point: str) -> Tensor:
        return self._values[point]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def keep(self, point: str, value: Tensor) -> None:
        """Copies a value; that of an earlier pass is forgotten."""
        self._values[point] = value.detach().clone()


@check_arguments
@contextmanager
def record(model: nn.Module, points: str | Iterable[str]) -> Iterator[Activations]:
    """Within the block, records the values of points in every forward pass.

        with record(model, "layers.*.residual") as activations:
            model(ids)
        activations["layers.3.residual"]  # (B, T, C)

    A pass takes the place of the one before it, whichever thread it is made in. Nothing in the
    model is changed, and nothing stays on it after the block. For a `SimpleGPT` the memory is
    compared with what there is before anything is computed; see `plan_recording`.

    Args:
        model: any module; the points of the anatomy (interpret/points.py) are a `SimpleGPT`'s.
        points: names, in which `*` stands for any letters.

    Raises:
        SurgeryError: a name means no point; from the model's forward, there is not enough memory.
    """
    names, found = find_points(model, points), Activations()
    with ExitStack() as stack:
        if isinstance(model, SimpleGPT):
            check = partial(_check_memory, model, names)
            stack.callback(model.embed_tokens.register_forward_pre_hook(check).remove)
        for name in names:
            stack.enter_context(tap(model, name, partial(found.keep, name)))
        yield found


def _check_memory(
    model: SimpleGPT, names: list[str], _module: nn.Module, inputs: tuple[Any, ...]
) -> None:
    sizes = {name: _bytes(model, name, *inputs[0].shape) or 0 for name in names}
    check_memory("the recording", sizes, "record fewer points, or give the model fewer ids at once")


def checked_ids(model: SimpleGPT, ids: Tensor) -> Tensor:
    """Returns ids (B, T) as int64.

    Raises:
        SurgeryError: they are of another shape, there are none, or one is not in the vocabulary.
    """
    return check_ids(ids, model.config.vocab_size)


@check_arguments
def plan_recording(
    model: SimpleGPT, points: str | Iterable[str], batch: int, tokens: int
) -> Report:
    """Returns the shape and the bytes of each point for ids (batch, tokens), and their sum.

    Those of other modules than the residual stream, attention, heads and neurons are not foreseen.
    """
    rows = [
        {
            "point": name,
            "shape": str(point_shape(model, name, batch, tokens) or "not foreseen"),
            "bytes": _bytes(model, name, batch, tokens),
        }
        for name in find_points(model, points)
    ]
    return Report("recording", rows, {"bytes": sum(row["bytes"] or 0 for row in rows)})


def point_shape(model: SimpleGPT, point: str, batch: int, tokens: int) -> tuple[int, ...] | None:
    """Returns the shape of a point's value for ids (batch, tokens); None if it is not foreseen."""
    c, name = model.config, point.rpartition(".")[2]
    if name.startswith("residual") or name == "norm":
        return batch, tokens, c.n_embd
    shapes = {
        "attention": (batch, c.n_head, tokens, tokens),
        "heads": (batch, tokens, c.n_head, c.n_embd),
        "neurons": (batch, tokens, c.n_inner),
    }
    return shapes.get(name)


def _bytes(model: SimpleGPT, point: str, batch: int, tokens: int) -> int | None:
    shape = point_shape(model, point, batch, tokens)
    if shape is None:
        return None
    size = next(model.parameters()).dtype.itemsize
    for length in shape:
        size *= length
    return size
