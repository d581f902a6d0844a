"""One training by several processes, each with its share of every batch; torchrun starts them.

    torchrun --nproc-per-node 2 -m nanogpt_surgery train book.txt --out runs/book

Each holds the whole model, with the same weights at all times: it computes the gradients of its
rows, the gradients of all are added up, and each does the same update. Which rows make a step's
batch does not depend on how many share it, so a run can go on with another number of processes.

Numbers of the host are added up by gloo, gradients on GPUs by NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError

STORES: Any = dist  # which does not export its stores by name
BUCKET = 2**23  # numbers that are added up in one go, about


@dataclass(frozen=True)
class World:
    """The processes of a training, and which of them this is. All call its methods alike."""

    rank: int = 0
    size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    @property
    def share(self) -> dict[str, int]:
        """Arguments of a dataset's `batch` that choose this process's share; none if alone."""
        return {} if self.size == 1 else {"rank": self.rank, "world_size": self.size}

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Each number added up over the processes, in float64; all wait for each other.

        Raises:
            SurgeryError: another process has ended.
        """
        return self._all_reduce(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def all_reduce_max(self, number: int) -> int:
        """The largest of the processes' numbers; all wait for each other.

        Raises:
            SurgeryError: another process has ended.
        """
        return int(self._all_reduce(torch.tensor(number), largest=True))

    def _all_reduce(self, values: Tensor, largest: bool = False) -> Tensor:
        """In place; alone, the values stay as they are."""
        if self.size > 1:
            with _others_there():
                dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return values

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients; where another process has one and this has not, it counts as 0.

        They are added up in float32 at least, whatever they are kept in.

        Raises:
            SurgeryError: another process has ended.
        """
        if self.size == 1:
            return
        there = self.all_reduce_sum(*(parameter.grad is not None for parameter in parameters))
        gradients = []
        for parameter, count in zip(parameters, there, strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            parts = [g.to(torch.promote_types(g.dtype, torch.float32)).flatten() for g in bucket]
            sums = self._all_reduce(torch.cat(parts)).split([part.numel() for part in parts])
            for gradient, summed in zip(bucket, sums, strict=True):
                gradient.copy_(summed.view_as(gradient))

    def run_on_main(self, action: Callable[[], int]) -> int:
        """Returns in all processes, from 0 up, what an action of the first one returns.

        Raises:
            SystemExit: with status 1, in the others where the first one raised, which says why.
        """
        if not self.is_main_process:
            number = self.all_reduce_max(-1)
            if number < 0:
                raise SystemExit(1)
            return number
        try:
            number = action()
        except BaseException:
            self.all_reduce_max(-1)
            raise
        return self.all_reduce_max(number)

    @torch.no_grad()
    def broadcast_parameters(self, model: nn.Module) -> None:
        """Give the model of each process the weights of the first one's.

        Raises:
            SurgeryError: another process has ended, or the model is on a device that has no way
                to add gradients up.
        """
        if self.size == 1:
            return
        kinds = {parameter.device.type for parameter in model.parameters()} - {"cpu", "cuda"}
        if kinds:
            raise SurgeryError(
                f"several processes train on CPUs or on CUDA's GPUs, not on {', '.join(kinds)}",
                "choose the device cpu, or start one process",
            )
        for tensor in (*model.parameters(), *model.buffers()):
            value = tensor.detach().contiguous()
            with _others_there():
                dist.broadcast(value, 0)
            tensor.copy_(value)


ALONE = World()


def world() -> World:
    """The processes that `torch.distributed` has joined; one where it has not."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started (`WORLD_SIZE`, `RANK`, …), joined for the block.

    Raises:
        SurgeryError: there are GPUs, but fewer than processes.
    """
    if torch.cuda.is_available():
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise SurgeryError(
                f"process {number} of this machine has no GPU: there are {there}",
                f"torchrun --nproc-per-node {there} starts one process for each",
            )
        torch.cuda.set_device(number)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(STORES.rendezvous("env://"))
    dist.init_process_group(backend, store=_own_part(store), rank=rank, world_size=size)
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def _own_part(store: Any) -> Any:
    """Of torchrun's store on one machine, which begins anew with the processes that it restarts.

    Else one of them may find the address of a process that has ended.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return STORES.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def _others_there() -> Iterator[None]:
    """Turns a failure to reach the other processes into a `SurgeryError`."""
    try:
        yield
    except RuntimeError as error:
        raise SurgeryError(
            "another process of this training has ended",
            "its own message says why; the run can be resumed from its last checkpoint",
        ) from error


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, so many at a time that a bucket is full."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(member.numel() for member in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
