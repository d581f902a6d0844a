"""`plan_training`: the memory and time of a training, from its sizes and from a few real steps.

A step of a probe takes about two seconds at most, whatever the training: where a real one would
take longer, two smaller sizes of batch are measured, and the line through both goes on to the real
size; an update that would take longer is not made, and its time follows from its operations.
Nothing is compiled.

Where the hidden states before the first part that learns are kept (`frozen_prefix.py`), the first
pass over the windows computes them and the steps after it only look them up. A probe of new batches
alone would see the first pass; so the batches it began with come again.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt_surgery.data.conversations.instruction_dataset import UNTRAINED
from nanogpt_surgery.data.gpt_dataset import Batch, Batches, documents_of
from nanogpt_surgery.data.text.mixture import passes
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.evaluation import EvalData, evaluate, subsample, windows_at_once
from nanogpt_surgery.training.fast.chunked_logits import most_logits_on
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels
from nanogpt_surgery.training.fast.frozen_head import frozen_head
from nanogpt_surgery.training.fast.frozen_prefix import bytes_of_window, prefix_for
from nanogpt_surgery.training.fast.uncompiled import Uncompiled
from nanogpt_surgery.training.fit import fit
from nanogpt_surgery.training.forward import CheckpointedBlocks, first_trainable_stage, layout_of
from nanogpt_surgery.training.hardware import choose_hardware, matmul_rate, operations_of
from nanogpt_surgery.training.muon import POLYNOMIALS
from nanogpt_surgery.training.optimizer import make_optimizer
from nanogpt_surgery.training.settings import FitSettings

FLOAT32 = 4  # bytes
NEW, AGAIN = 2, 2  # steps of a probe; the first, which warms up, is timed apart
SECONDS = 2.0  # that a step of a probe takes at most, about
ADAMW_WAITS = 100  # operations of a matrix product in the time that AdamW takes for a number
FEWEST = 16  # tokens of a step of a probe, at least
EVALUATED = 2  # batches of the held-out data
_OF_A_STEP = ("gradient_bytes", "activation_bytes", "logits_bytes")  # gone when it has ended


def plan_training(
    model: SimpleGPT,
    dataset: Batches,
    settings: FitSettings,
    validation: Batches | None = None,
    checkpoints: int = 1,
) -> dict[str, Any]:
    """Sizes in bytes, numbers, and seconds; a few steps are taken and undone to the bit.

    Steps and evaluations are measured on as few tokens as take about two seconds, and scaled.
    Where hidden states before the first part that learns are kept, the first pass over the windows,
    which computes them, is timed apart. Nothing is written. The disk is for so many `checkpoints`.

    Raises:
        SurgeryError: as `fit`.
    """
    probe = Probe(model, dataset, settings)
    pace, memory = probe.pace(), probe.memory()
    trained, rows = memory["gradient_bytes"], settings.windows
    evaluations, one, more = 0, 0.0, 0
    if validation is not None:
        every = settings.evaluate_every or settings.max_steps
        evaluations = -(-settings.max_steps // every)
        one, more = probe.evaluation(subsample(validation, settings.evaluate_tokens))
    evaluating = memory["memory_bytes"] - sum(memory[part] for part in _OF_A_STEP) + more
    return {
        "computing_on": probe.hardware.describe(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": trained // FLOAT32,
        **memory,
        "evaluation_bytes": more,
        "memory_bytes": max(memory["memory_bytes"], evaluating),
        "disk_bytes": checkpoints * (2 * trained + memory["optimizer_bytes"]),
        "steps": settings.max_steps,
        "tokens": rows * dataset.block_size,
        "epochs": ", ".join(f"{share:.3g}" for share in passes(dataset, rows)),
        **pace.to_dict(),
        "evaluations": evaluations,
        "seconds_an_evaluation": one,
        "seconds": pace.seconds(settings.max_steps) + evaluations * one,
    }


@dataclass
class Part:
    """The first rows of the first batches of some data, cut short, which come again and again."""

    data: Batches
    rows: int
    block_size: int
    batches: int = 1

    def __len__(self) -> int:
        return self.rows * self.batches

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.rows * self.block_size

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """As the data's own, cut short."""
        assert world_size == 1, "a plan is made by one process"
        return cut(self.data.batch(step % self.batches, batch_size, seed), self.block_size)

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        """As the data's own, cut short."""
        return (cut(batch, self.block_size) for batch in self.data.iter_all(batch_size))

    def half(self) -> Part:
        """Half of its rows, or where there is one, half of its length."""
        if self.rows > 1:
            return replace(self, rows=self.rows // 2)
        return replace(self, block_size=max(1, self.block_size // 2))


def cut(batch: Batch, length: int) -> Batch:
    """So many of a batch's columns, those that most is learned from."""
    trained = (batch[1] != UNTRAINED).sum(0).cumsum(0)
    before = torch.cat((trained.new_zeros(1), trained[:-length]))
    start = int((trained[length - 1 :] - before).argmax()) if trained.numel() > length else 0
    return tuple(tensor[:, start : start + length] for tensor in batch)


@dataclass(frozen=True)
class Pace:
    """Seconds of steps."""

    first: float
    """the very first step, in which libraries warm up"""
    first_pass: float
    """another one that computes hidden states to be kept"""
    later: float
    """one after that"""
    first_pass_steps: int = 0
    """steps until each window was there once, about; 0 where no states are kept"""

    def seconds(self, steps: int) -> float:
        """Returns the seconds of so many steps."""
        filling = max(1, min(self.first_pass_steps, steps))
        return self.first + (filling - 1) * self.first_pass + (steps - filling) * self.later

    def to_dict(self) -> dict[str, float]:
        """For a report: the first pass only where there is one."""
        passing = {
            "first_pass_steps": self.first_pass_steps,
            "seconds_a_step_of_the_first_pass": self.first_pass,
        }
        return (passing if self.first_pass_steps else {}) | {"seconds_a_step": self.later}


class Probe:
    """Steps of a training on a part of its data, from which the whole is estimated.

    Args:
        model: has its bits again after each method.
        dataset: what it is to learn from.
        settings: of the training.
        part: what a step of the probe learns from; by default as much of a batch as takes about
            two seconds, or all of it.

    Attributes:
        optimizer_bytes: of the optimizer's state; Muon keeps one number for each of a matrix,
            AdamW two.
    """

    def __init__(
        self, model: SimpleGPT, dataset: Batches, settings: FitSettings, part: Part | None = None
    ):
        self.model, self.dataset, self.settings = model, dataset, settings
        length = dataset.block_size
        self.hardware = choose_hardware(settings, operations_of(model, settings, length))
        model.to(self.hardware.device)
        with self.hardware.seeded(0):  # the random numbers of others stay theirs
            self.rate = matmul_rate(self.hardware.device, self.hardware.precision)
        self.prefix = prefix_for(model, dataset, settings)
        self.optimizer = make_optimizer(model, settings)
        self.optimizer_bytes = sum(
            (1 if group.get("muon") else 2) * p.numel() * p.element_size()
            for group in self.optimizer.param_groups
            for p in group["params"]
        )
        tokens = int(SECONDS * self.rate / (3 * model.config.flops_per_token(length)))
        rows = min(settings.batch_size, max(1, tokens // length))
        self.part = part or Part(dataset, rows, min(length, max(FEWEST, tokens)))

    def memory(self) -> dict[str, int]:
        """The bytes that a step of the training needs, part by part and in all.

        Activations are what autograd keeps of the part of a batch, scaled by its tokens; of hidden
        states as many are kept at most, since windows that are alike are kept once.
        """
        model, length = self.model, self.dataset.block_size
        one = bytes_of_window(model, length, self.settings)
        memory = {
            "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "gradient_bytes": FLOAT32
            * sum(p.numel() for p in model.parameters() if p.requires_grad),
            "optimizer_bytes": self.optimizer_bytes,
            "activation_bytes": self._activation_bytes(),
            "logits_bytes": self._logits_bytes(),
            "hidden_states_bytes": self.prefix.windows * one if self.prefix else 0,
        }
        return memory | {"memory_bytes": sum(memory.values())}

    def _activation_bytes(self) -> int:
        """Returns the bytes kept of a batch, and those of a block that is computed again."""
        checkpointed = self.settings.gradient_checkpointing
        kept = self._saved_bytes(checkpointed)
        if checkpointed:
            blocks = max(1, len(self.model.layers) - (first_trainable_stage(self.model) or 0))
            kept += self._saved_bytes(checkpointed=False) // blocks
        return kept * self.settings.batch_size * self.dataset.block_size // self.part.tokens

    def _saved_bytes(self, checkpointed: bool) -> int:
        """Returns the bytes that autograd keeps of the part until the backward pass."""
        model, hardware = self.model, self.hardware
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}
        alive: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            alive.append(tensor)  # so that no other storage takes its place
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch, mode = self.part.batch(0, self.part.rows, self.settings.seed), model.training
        blocks = CheckpointedBlocks(model.train(), checkpointed)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        kernels = cpu_kernels(model) if self.settings.fast else nullcontext()
        with blocks.active(), kernels, hardware.seeded(0), hardware.autocast(), hooks:
            layout = layout_of(documents_of(batch), hardware.device)
            model.hidden(batch[0].to(hardware.device), **layout)
        model.train(mode)
        return sum(size for place, size in kept.items() if place not in own)

    def _logits_bytes(self) -> int:
        """Returns the bytes of tensors as wide as the vocabulary, held at once.

        Logits, their logarithms, and the gradients of both; over a frozen head the exponentials
        alone, and on a GPU, which has them in one piece, what its products make of them.
        """
        model, hardware = self.model, self.hardware
        whole = self.settings.batch_size * self.dataset.block_size * model.config.vocab_size
        if not self.settings.fast:
            return 4 * FLOAT32 * whole
        most, head = most_logits_on(hardware.device), frozen_head(model.lm_head, hardware.precision)
        if (whole <= most and self.prefix is None) or head is None:
            return 4 * FLOAT32 * min(whole, most)
        beside = hardware.precision.itemsize if hardware.device.type == "cuda" else 0
        return (FLOAT32 + beside) * min(whole, 2 * most)

    def evaluation(self, eval_data: EvalData) -> tuple[float, int]:
        """The seconds of an evaluation, and the most bytes that it holds beside the weights.

        Two batches of as many rows as an evaluation reads at once are measured, or of a part's.
        """
        model, part, length = self.model, self.part, self.dataset.block_size
        at_once = windows_at_once(model, self.settings)
        rows = at_once if part.tokens == length * self.settings.batch_size else part.rows
        batches = islice(eval_data.iter_all(rows), EVALUATED)
        some = [cut(batch, part.block_size) for batch in batches]
        start = time.perf_counter()
        with self.hardware.evaluating():
            evaluate(model, _Some(some), rows)
        took = time.perf_counter() - start
        own = [*model.parameters(), *model.buffers()]
        with LiveTensors(own) as live, self.hardware.evaluating():
            evaluate(model, _Some(some[:1]), rows)
        measured = sum(batch[1].numel() for batch in some)
        whole = sum(batch[1].numel() for batch in eval_data.iter_all(at_once))
        largest = min(whole, at_once * length)
        return took * whole / measured, int(live.most * max(1.0, largest / some[0][1].numel()))

    def pace(self) -> Pace:
        """The seconds of the training's steps; an update that would take long is not made."""
        seconds = update_operations(self.optimizer) / self.rate
        if seconds > SECONDS:
            pace = self._pace(_Idle(self.optimizer.param_groups, {}))
            later = pace.first_pass + seconds, pace.later + seconds
            return replace(pace, first=pace.first + seconds, first_pass=later[0], later=later[1])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        before, mode = [p.detach().clone() for p in trained], self.model.training
        try:
            return self._pace(self.optimizer)
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, before, strict=True):
                    parameter.copy_(value)
            self.model.train(mode)

    def _pace(self, optimizer: torch.optim.Optimizer) -> Pace:
        rows = self.settings.batch_size * self.settings.grad_accum_steps
        new = min(NEW, max(1, self.prefix.windows // rows)) if self.prefix else NEW + AGAIN
        part, tokens = replace(self.part, batches=new), rows * self.dataset.block_size
        first, filling, again = self._step_seconds(optimizer, part)
        if part.tokens < tokens:
            half = part.half()
            _, *less = self._step_seconds(optimizer, half)
            sizes = half.tokens, part.tokens, tokens
            first = filling = _on_a_line(less[0], filling, *sizes)
            again = _on_a_line(less[1], again, *sizes)
        if self.prefix is None:
            return Pace(first, filling, filling)
        windows = len(self.dataset)
        kept = min(1.0, self.prefix.windows / windows)
        later = kept * again + (1 - kept) * filling
        return Pace(first, filling, later, min(self.settings.max_steps, math.ceil(windows / rows)))

    def _step_seconds(
        self, optimizer: torch.optim.Optimizer, part: Part
    ) -> tuple[float, float, float]:
        """The seconds of the first step, of another with new rows, and of one with rows again.

        Where rows come again in the probe, hidden states are kept if the settings allow it.
        """
        once = part.batches == NEW + AGAIN
        short = replace(
            self.settings,
            batch_size=part.rows,
            grad_accum_steps=1,
            max_steps=NEW + AGAIN,
            compile="off",
            cache_gib=0.0 if once else self.settings.cache_gib,
        )
        steps = fit(self.model, part, short, optimizer=optimizer, examine=False)
        seconds = [step.seconds for step in steps]
        filling = median(seconds[1 : part.batches] or seconds[:1])
        return seconds[0], filling, filling if once else median(seconds[part.batches :])


@dataclass(frozen=True)
class _Some:
    """The first batches of held-out data, cut short."""

    first: list[Batch]

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        yield from self.first


class _Idle(Uncompiled):
    """An optimizer that leaves everything as it is, for gradients alone."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """No update."""


def update_operations(optimizer: torch.optim.Optimizer) -> float:
    """About how many operations of a matrix product take as long as an update.

    Muon's rounds are products, on the short side of a matrix but for two; AdamW waits for memory.
    """
    return sum(
        _muon_operations(*sorted(p.shape)) if group.get("muon") else ADAMW_WAITS * p.numel()
        for group in optimizer.param_groups
        for p in group["params"]
    )


def _muon_operations(short: int, long: int) -> float:
    rounds = len(POLYNOMIALS)
    return 4.0 * short * short * long + (8.0 * rounds - 6) * short**3


def _on_a_line(less: float, more: float, few: int, some: int, many: int) -> float:
    """Seconds for many tokens, on the line through those for few and for some."""
    slope = (more - less) / (some - few) if more > less and some > few else more / some
    return more + slope * (many - some)


class LiveTensors(TorchDispatchMode):
    """A context that counts what operations allocate and keep; kernels' own room is not seen.

    Args:
        own: tensors that are not counted.
    """

    def __init__(self, own: Iterable[Tensor] = ()):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation; one that is made of others is counted as these."""
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
