"""Tensors that lie in a file and have not been read, and the model that they become.

A tensor is either mapped, so that its bytes are those of the file and are read when they are used,
or read in pieces, each converted before the next is read. Neither holds the weights twice. Which
of them goes where in a model is checked whole before the first is read.
"""

from __future__ import annotations

import ctypes
import difflib
import itertools
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanogpt_surgery.errors import SurgeryError, first_problems, quoted
from nanogpt_surgery.formats.huggingface.name_map import Row, each_layer
from nanogpt_surgery.memory import check_memory
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.quantized import (
    BLOCK,
    BLOCK_BYTES,
    BlockKind,
    Quantization,
    block_kind,
    quantize_blocks,
    quantized_layer,
)
from nanogpt_surgery.model.simple_gpt import SimpleGPT

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType


PIECE = 1 << 20  # numbers read at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors or GGUF file, whose numbers lie one after the other.

    Several tensors of one file share its map, which is made when the first of them needs it. The
    map is private: writing to a tensor does not write to the file. A file that is replaced, as
    every writer here does, stays as it was for those who have mapped it.

    Attributes:
        name: as the file calls it.
        shape: in the file's orientation.
        dtype: that its numbers are stored in; None if they are quantised.
        offset: in the file, in bytes.
        file: that it lies in.
        quantised: how its numbers are packed in few bits, in blocks along its rows; else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    offset: int
    file: MappedFile
    quantised: GGMLQuantizationType | None = None

    @property
    def n_numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def n_bytes(self, rows: int | None = None) -> int:
        """How many bytes it takes, or so many of its rows."""
        numbers = self.n_numbers if rows is None else rows * math.prod(self.shape[1:])
        if self.dtype is not None:
            return numbers * self.dtype.itemsize
        from gguf import GGML_QUANT_SIZES  # takes a quarter of a second, and few files need it

        assert self.quantised is not None
        block, size = GGML_QUANT_SIZES[self.quantised]
        return numbers // block * size

    @property
    def block_kind(self) -> BlockKind | None:
        """The blocks that its numbers lie in, if they are such as a layer can keep."""
        name: Any = None if self.quantised is None else self.quantised.name
        return name if name in BLOCK_BYTES else None

    def blocks(self) -> Tensor:
        """Its blocks, (N, bytes) uint8, as a part of the mapped file."""
        return self._bytes().view(self.shape[0], -1)

    def mapped(self) -> Tensor | None:
        """The tensor as a part of the mapped file, where it can be used as it lies there."""
        if self.dtype is None or self.offset % self.dtype.itemsize:
            return None
        return self._bytes().view(self.dtype).view(self.shape)

    def read(self) -> Tensor:
        """The tensor, mapped where it can be, or else a copy."""
        mapped = self.mapped()
        if mapped is not None:
            return mapped
        return self._numbers(self._bytes().clone().numpy()).view(self.shape)

    def _bytes(self) -> Tensor:
        return self.file.data[self.offset : self.offset + self.n_bytes()]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Parts of about `PIECE` numbers, each with the index of its first row; read in turn.

        Numbers that are quantised become float32.
        """
        if not self.n_numbers:
            return
        rows = max(1, PIECE * self.shape[0] // self.n_numbers)
        with self.file.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - start)
                data = np.fromfile(file, np.uint8, self.n_bytes(count))
                yield start, self._numbers(data.reshape(count, -1)).view(count, *self.shape[1:])

    def _numbers(self, data: NDArray[Any]) -> Tensor:
        if self.dtype is not None:
            return torch.from_numpy(data).view(self.dtype)
        from gguf.quants import dequantize

        assert self.quantised is not None
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            return torch.from_numpy(dequantize(data, self.quantised))


@dataclass(frozen=True)
class MappedFile:
    """A file that is mapped into memory once, when first asked."""

    path: Path
    size: int

    @cached_property
    def data(self) -> Tensor:
        """Its bytes, (size,) uint8."""
        return torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)


Dtype: TypeAlias = torch.dtype | Literal["each"] | None


@dataclass(frozen=True)
class Placement:
    """One stored tensor, and the row that says which of ours it holds, stacked along the output."""

    row: Row
    kind: str
    """of parameter: "weight" or "bias"."""
    stored: StoredTensor

    @property
    def names(self) -> tuple[str, ...]:
        """Ours, in the order in which they are stacked."""
        return tuple(f"{name}.{self.kind}" for name in self.row.ours)

    @property
    def transposed(self) -> bool:
        """Whether it lies as (in, out)."""
        return self.row.transposes(self.kind)

    @property
    def shape(self) -> tuple[int, ...]:
        """In our orientation, all parts together."""
        return self.stored.shape[::-1] if self.transposed else self.stored.shape

    def load(self, dtype: torch.dtype, room: Room) -> dict[str, Tensor]:
        """Our tensors by name, mapped where the file holds them as they are; else read."""
        tensor = self.mapped(dtype)
        if tensor is None:
            tensor = self._read(room(self.shape, dtype))
        return dict(zip(self.names, tensor.chunk(len(self.names)), strict=True))

    def load_blocks(self, kind: BlockKind, room: Room) -> dict[str, Tensor]:
        """Our weights as blocks, by name: as they lie, where the file has such."""
        if self.stored.block_kind == kind:
            blocks = self.stored.blocks()
        elif self.transposed:
            blocks = quantize_blocks(self._read(torch.empty(self.shape)), kind, self.stored.name)
        else:
            columns = self.shape[-1] // BLOCK * BLOCK_BYTES[kind]
            blocks = room((self.shape[0], columns), torch.uint8)
            for start, piece in self.stored.pieces():
                part = quantize_blocks(piece, kind, self.stored.name)
                blocks[start : start + len(part)] = part
        blocks = deinterleave(blocks, self.row.interleaved)  # (N, bytes), rows moved as they are
        names = [f"{name}.blocks" for name in self.row.ours]
        return dict(zip(names, blocks.chunk(len(names)), strict=True))

    def blocks_kind(self, bits: Quantization, model: nn.Module) -> BlockKind | None:
        """The blocks that a weight is to have: those it is stored in, unless they are wider."""
        if self.kind != "weight" or self.shape[-1] % BLOCK:
            return None
        if type(model.get_submodule(self.row.ours[0])) not in (nn.Linear, nn.Embedding):
            return None
        wanted, stored = block_kind(bits, self.row.ours[0]), self.stored.block_kind
        return wanted if stored in (None, "Q8_0") else stored

    def mapped(self, dtype: torch.dtype) -> Tensor | None:
        """The tensor as a part of the mapped file, if the file holds it as it is needed."""
        as_it_is = self.stored.dtype == dtype and not (self.transposed or self.row.interleaved)
        return self.stored.mapped() if as_it_is else None

    def n_bytes_read(self, dtype: torch.dtype, kind: BlockKind | None) -> int:
        """The bytes that a dtype, or blocks of a kind, take in memory beside the mapped file."""
        if kind is not None:
            as_it_lies = self.stored.block_kind == kind and not self.row.interleaved
            return 0 if as_it_lies else math.prod(self.shape) // BLOCK * BLOCK_BYTES[kind]
        return math.prod(self.shape) * dtype.itemsize if self.mapped(dtype) is None else 0

    def _read(self, room: Tensor) -> Tensor:
        goal = room.t() if self.transposed else room
        for start, piece in self.stored.pieces():
            goal[start : start + len(piece)] = piece
        ordered = deinterleave(room, self.row.interleaved)
        return room if ordered is room else room.copy_(ordered)


Room: TypeAlias = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Returns memory for a tensor of a shape and a dtype."""
LARGE = 1 << 20  # bytes of a tensor that is worth the trouble
LARGE_PAGE = 1 << 21  # bytes of the large pages of x86 and Arm


class LargePages:
    """Memory for tensors, many in a piece, that lies on large pages where the system has them.

    Where each page has 4 KiB, a pass over all weights spends a third of its time and more on
    finding out where they lie.
    """

    def __init__(self) -> None:
        self.left = torch.empty(0, dtype=torch.uint8)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns memory for a tensor."""
        size = math.prod(shape) * dtype.itemsize
        if size < LARGE:
            return torch.empty(shape, dtype=dtype)
        if size > len(self.left):
            self.left = _on_large_pages(max(size, 16 * LARGE_PAGE))
        taken, self.left = self.left[:size], self.left[-(-size // 64) * 64 :]
        return taken.view(dtype).view(shape)


def _on_large_pages(size: int) -> Tensor:
    """Returns so many bytes, which the system was asked to put on large pages."""
    room = torch.empty(size + LARGE_PAGE, dtype=torch.uint8)
    room = room[-room.data_ptr() % LARGE_PAGE :][:size]
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError, AttributeError):
            advise = ctypes.CDLL(None).madvise
            advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            advise(room.data_ptr(), size, mmap.MADV_HUGEPAGE)
    return room


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns memory that is a temporary file's, if it is large and there is room on the disk."""
    numbers = math.prod(shape)
    if numbers * dtype.itemsize >= LARGE and hasattr(os, "posix_fallocate"):
        with suppress(OSError), NamedTemporaryFile() as file:
            # Without it a full disk would kill the process.
            os.posix_fallocate(file.fileno(), 0, numbers * dtype.itemsize)
            mapped = torch.from_file(file.name, shared=True, size=numbers, dtype=dtype)
            return mapped.view(shape)
    return torch.empty(shape, dtype=dtype)


def deinterleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows (H · D, …) of heads whose rotary pairs lie side by side → half a head apart.

    Rows of 0 heads stay as they are.
    """
    shape = tensor.shape
    if not heads:
        return tensor
    return tensor.view(heads, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `deinterleave`."""
    shape = tensor.shape
    if not heads:
        return tensor
    return tensor.reshape(heads, 2, -1, *shape[1:]).transpose(1, 2).reshape(shape)


def place(stored: Mapping[str, StoredTensor], rows: Iterable[Row]) -> list[Placement]:
    """Which stored tensor is which of ours; some may have no place."""
    return [
        Placement(row, kind, tensor)
        for row in rows
        for kind in ("weight", "bias")
        if (tensor := stored.get(f"{row.theirs}.{kind}")) is not None
    ]


def build_model(
    config: GPTConfig,
    stored: Mapping[str, StoredTensor],
    table: Iterable[Row],
    dtype: Dtype,
    where: str,
    quantize: Quantization | None = None,
) -> SimpleGPT:
    """A model of stored weights, in eval mode on the CPU.

    Args:
        config: what the file says the model is.
        stored: its tensors, by the name in the file.
        table: which of them is which of ours; rows with a `*` stand for every layer.
        dtype: of the weights; None: the one that most numbers are stored in, float32 if any are
            quantised; "each": every tensor's own, or float32 for all if any are quantised.
        where: names the file in an error.
        quantize: keep matrices as blocks of 8 or 4 bits, as they lie where the file has such; the
            other weights are float32.

    Raises:
        SurgeryError: the tensors do not fit the config (all of them, before anything is allocated).
    """
    _check_size(config, stored, where)
    head_names = [f"{row.theirs}.weight" for row in table if row.ours == ("lm_head",)]
    heads = [stored[name] for name in head_names if name in stored] if config.tie_head else []
    stored = {name: tensor for name, tensor in stored.items() if tensor not in heads}
    rows = list(each_layer(table, config.n_layer))
    placements = place(stored, rows)
    with torch.device("meta"), _NoDraws():
        model = SimpleGPT.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_head:
        del expected["lm_head.weight"]
    _check_fit(expected, placements, stored, rows, where)
    dtypes = _dtypes(placements, torch.float32 if quantize else dtype)
    kinds = [p.blocks_kind(quantize, model) if quantize else None for p in placements]
    wanted = list(zip(placements, dtypes, kinds, strict=True))
    read = sum(p.n_bytes_read(d, kind) for p, d, kind in wanted)
    on_disk = dtype == "each"
    check_memory(where, {"weights": 0 if on_disk else read}, "open a smaller model, or in bfloat16")
    embeddings = [(p.stored, d) for p, d, _ in wanted if p.row.ours == ("embed_tokens",)]
    for head, (embedding, chosen) in itertools.product(heads, embeddings):
        _check_tie(head, embedding, chosen, where)
    _load(model, wanted, on_disk)
    return model.requires_grad_(quantize is None).eval()


def _load(
    model: SimpleGPT,
    wanted: Iterable[tuple[Placement, torch.dtype, BlockKind | None]],
    on_disk: bool,
) -> None:
    """Gives a model without numbers those of a file, in the dtypes or the blocks wanted."""
    tensors: dict[str, Tensor] = {}
    room: Room = _on_disk if on_disk else LargePages()
    for placement, dtype, kind in wanted:
        if kind is None:
            tensors |= placement.load(dtype, room)
        else:
            tensors |= placement.load_blocks(kind, room)
            _expect_blocks(model, placement.row.ours, kind)
    end = "weight" if "embed_tokens.weight" in tensors else "blocks"
    if model.config.tie_head:
        tensors[f"lm_head.{end}"] = tensors[f"embed_tokens.{end}"]
    model.load_state_dict(tensors, assign=True)
    if model.config.tie_head:
        setattr(model.lm_head, end, getattr(model.embed_tokens, end))


def _expect_blocks(model: SimpleGPT, names: Iterable[str], kind: BlockKind) -> None:
    """Puts layers whose blocks have no numbers yet in the place of others without numbers."""
    for name in names:
        tied = ["lm_head"] if name == "embed_tokens" and model.config.tie_head else []
        for each in (name, *tied):
            owner, _, child = each.rpartition(".")
            old: Any = model.get_submodule(each)
            size = old.weight.size(1) // BLOCK * BLOCK_BYTES[kind]
            blocks = torch.empty(len(old.weight), size, dtype=torch.uint8, device="meta")
            setattr(model.get_submodule(owner), child, quantized_layer(old, blocks, kind))


def _check_tie(head: StoredTensor, embedding: StoredTensor, dtype: torch.dtype, where: str) -> None:
    """A head that is stored although it is tied must be the embedding, as both are loaded."""
    same = head.shape == embedding.shape and all(
        torch.equal(piece.to(dtype), other.to(dtype))
        for (_, piece), (_, other) in zip(head.pieces(), embedding.pieces(), strict=True)
    )
    if not same:
        raise SurgeryError(
            f"{where}: {head.name} differs from the embedding to which the config ties it"
        )


DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class _NoDraws(TorchFunctionMode):
    """Leaves out the drawing of weights that are about to be replaced.

    On the meta device there is nothing to draw into, and torch would load 900 modules to find out.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in DRAWS else func(*args, **kwargs)


def _dtypes(placements: list[Placement], dtype: Dtype) -> list[torch.dtype]:
    """Returns the dtype that each is loaded in."""
    stored = [p.stored.dtype or torch.float32 for p in placements]
    if any(p.stored.dtype is None for p in placements):
        stored = [torch.float32] * len(stored)
    if dtype == "each":
        return stored
    sizes = (math.prod(p.shape) for p in placements)
    return [dtype or usual_dtype(zip(stored, sizes, strict=True))] * len(stored)


def usual_dtype(tensors: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The dtype of most numbers, from the dtype and the size of each tensor."""
    numbers: Counter[torch.dtype] = Counter()
    for dtype, size in tensors:
        numbers[dtype] += size
    return numbers.most_common(1)[0][0]


def _check_size(config: GPTConfig, stored: Mapping[str, StoredTensor], where: str) -> None:
    """A config that is far too large for its tensors is refused before a module is made for it."""
    numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
    many_layers = config.n_layer > max(len(stored), 1000)
    if many_layers or config.n_parameters > 4 * numbers + (1 << 20):
        raise SurgeryError(
            f"{where}: the config describes {config.n_layer:,} layers and {config.n_parameters:,} "
            f"weights, its files hold {len(stored):,} tensors and {numbers:,} numbers"
        )


def _check_fit(
    expected: Mapping[str, tuple[int, ...]],
    placements: list[Placement],
    stored: Mapping[str, StoredTensor],
    rows: list[Row],
    where: str,
) -> None:
    """Raises `SurgeryError` unless the stored tensors are those of ours, of these shapes."""
    placed = {placement.stored.name for placement in placements}
    unknown = sorted(tensor.name for tensor in stored.values() if tensor.name not in placed)
    found = {name for placement in placements for name in placement.names}
    problems = _missing((name for name in expected if name not in found), stored, rows, unknown)
    problems += [f"{_short(name)} is unknown" for name in unknown]
    problems += [problem for p in placements for problem in _misfits(p, expected)]
    if problems:
        shown = first_problems(problems, _SHOWN)
        raise SurgeryError(f"the tensors in {where} do not fit its config: {shown}")


def _missing(
    ours: Iterable[str], stored: Mapping[str, StoredTensor], rows: Iterable[Row], unknown: list[str]
) -> list[str]:
    """A sentence for each tensor that is not there, with what is there of a like name."""
    renamed = ((key, tensor.name) for key, tensor in stored.items() if key != tensor.name)
    prefix = next((key.removesuffix(name) for key, name in renamed), "")  # that the file leaves out
    theirs = {
        f"{name}.{kind}": f"{row.theirs}.{kind}".removeprefix(prefix)
        for row in rows
        for name in row.ours
        for kind in ("weight", "bias")
    }
    near = [name for name in unknown if len(name) <= 200][:1000]
    found = []
    for i, name in enumerate(dict.fromkeys(theirs.get(name, name) for name in ours)):
        like = difflib.get_close_matches(name, near, 1, 0.7) if i < _SHOWN else []
        found.append(f"{name} is missing" + (f" (there is {_short(like[0])})" if like else ""))
    return found


def _misfits(placement: Placement, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """In words what is wrong with a stored tensor for the tensors of ours of these shapes."""
    name, dtype = _short(placement.stored.name), placement.stored.dtype
    if any(ours not in expected for ours in placement.names):
        yield f"{name} is unknown"
        return
    if dtype is not None and not dtype.is_floating_point:
        yield f"{name} holds {dtype}, not floating-point numbers"
    shapes = [expected[ours] for ours in placement.names]
    wanted = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    wanted = wanted[::-1] if placement.transposed else wanted
    if placement.stored.shape != wanted:
        yield f"{name} is {placement.stored.shape}, the config says {wanted}"


_SHOWN = 8


def _short(name: str) -> str:
    """A file's name for a tensor; quoted where it is long or no usual name."""
    return name if re.fullmatch(r"[\w.-]{1,200}", name) else quoted(name)
