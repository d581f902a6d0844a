"""Directions on disk: a safetensors file, or llama.cpp's control vector as GGUF.

    safetensors      a tensor (C,) for each point, under the point's name; operation, scale and
                     origin in the header
    control vector   direction.N (C,), which llama.cpp adds to the residual stream after block N,
                     counted from 0; it has none for block 0, and no other point or operation

What is written is read again and compared before it counts.
"""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, foreign_file, quoted
from nanogpt_surgery.files.atomic import write_file
from nanogpt_surgery.formats.gguf.file import is_gguf, read_gguf
from nanogpt_surgery.formats.huggingface.safetensors_file import (
    read_header,
    read_metadata,
    write_tensors,
)
from nanogpt_surgery.surgery.direction import Direction

KIND = "surgery_direction"  # the key in the header by which a file of ours is known
ARCHITECTURE = "controlvector"
MOST_NUMBERS = 1 << 20  # of a vector: far wider than any model


@check_arguments
def save_direction(direction: Direction, path: str | Path, *, family: str = "") -> None:
    """Writes a direction, whole or not at all; a name that ends in .gguf is a control vector.

    Args:
        direction: to write.
        path: made, or replaced if it is a direction's file.
        family: of its model, such as llama: a control vector mentions it.

    Raises:
        SurgeryError: another file lies there, a control vector cannot hold this, or what was
            written does not read back. There is no new file then.
    """
    goal = Path(path)
    if goal.exists():
        load_direction(goal)  # whatever else lies there is not written over
    vectors = {
        point: v.detach().float().cpu().contiguous() for point, v in direction.vectors.items()
    }
    kept = Direction(vectors, direction.operation, direction.scale, direction.origin)
    if goal.suffix == ".gguf":
        layers = {_layer(kept, point): kept.scale * vector for point, vector in vectors.items()}
        kept = Direction({_point(n): vector for n, vector in layers.items()}, origin=kept.origin)

    def write(new: Path) -> None:
        if goal.suffix == ".gguf":
            _write_control_vector(new, layers, family)
        else:
            write_tensors(vectors, new, metadata=_metadata(kept))
        _check_again(kept, load_direction(new))

    write_file(goal, write, magic=b"")


@check_arguments
def load_direction(path: str | Path) -> Direction:
    """Reads a direction, from a file of ours or a control vector of llama.cpp.

    Raises:
        SurgeryError: it is missing, damaged, another kind of file, or says what cannot be.
    """
    path = Path(path)
    with foreign_file(path):
        try:
            return _read_control_vector(path) if is_gguf(path) else _read_safetensors(path)
        except SurgeryError as error:
            where = "" if str(path) in error.what else f"{path}: "
            raise SurgeryError(f"{where}{error.what}", error.hint) from None


def _metadata(direction: Direction) -> dict[str, str]:
    return {
        KIND: "1",
        "operation": direction.operation,
        "scale": repr(float(direction.scale)),
        "origin": direction.origin,
    }


def _read_safetensors(path: Path) -> Direction:
    stored = read_header(path)
    said = read_metadata(path)
    if said.get(KIND) != "1":
        raise SurgeryError(
            f"{path} is no direction: its header does not say {KIND} 1",
            "mean_difference finds one, save_direction writes it",
        )
    vectors = {name: _vector(tensor, name) for name, tensor in stored.items()}
    operation: Any = said.get("operation")
    return Direction(vectors, operation, _number(said.get("scale")), said.get("origin", ""))


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise SurgeryError(f"the scale is {quoted(text)}, no number") from None


def _vector(tensor: Any, name: str) -> Tensor:
    """Returns the numbers of a stored vector; they are looked at no sooner than its shape."""
    if not re.fullmatch(r"[\w.]+", name):
        raise SurgeryError(f"{quoted(name)} cannot be the name of a point")
    if len(tensor.shape) != 1 or not 0 < tensor.shape[0] <= MOST_NUMBERS:
        raise SurgeryError(f"the direction at {quoted(name)} has the shape {tensor.shape}")
    if tensor.dtype is None or not tensor.dtype.is_floating_point:
        raise SurgeryError(f"the direction at {quoted(name)} is not stored as floats")
    return torch.as_tensor(tensor.read()).float().clone()


def _layer(direction: Direction, point: str) -> int:
    """Returns the number of the block that a control vector adds to.

    Raises:
        SurgeryError: it is not the residual stream after a block but the first, or is not added.
    """
    named = re.fullmatch(r"layers\.(\d+)\.residual", point)
    if direction.operation != "add" or named is None or int(named[1]) < 1:
        raise SurgeryError(
            f"a control vector is added to the residual stream after a block from 1 on; this "
            f"direction does {direction.operation} at {point}",
            "a name that does not end in .gguf keeps it as safetensors",
        )
    return int(named[1])


def _point(layer: int) -> str:
    return f"layers.{layer}.residual"


def _write_control_vector(path: Path, layers: dict[int, Tensor], family: str) -> None:
    from gguf import GGUFWriter

    with closing(GGUFWriter(path, ARCHITECTURE)) as writer:
        writer.add_string(f"{ARCHITECTURE}.model_hint", family)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", max(layers))
        for layer, vector in layers.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _read_control_vector(path: Path) -> Direction:
    file = read_gguf(path)
    found = file.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise SurgeryError(f"{path} is a GGUF file of {quoted(found)}, not of {ARCHITECTURE}")
    vectors = {}
    for name, tensor in file.tensors.items():
        named = re.fullmatch(r"direction\.([1-9]\d{0,5})", name)
        if named is None:
            raise SurgeryError(
                f"{path} has a tensor {quoted(name)}, no direction.1, direction.2, …"
            )
        vectors[_point(int(named[1]))] = _vector(tensor, name)
    return Direction(vectors, origin=f"control vector {path.name}")


def _check_again(one: Direction, other: Direction) -> None:
    same = one.vectors.keys() == other.vectors.keys() and all(
        torch.equal(vector, other.vectors[point]) for point, vector in one.vectors.items()
    )
    if not same or (one.operation, one.scale) != (other.operation, other.scale):
        raise SurgeryError("the direction that was written does not read back")
