"""Settings of a training, with their defaults: the only place where they stand.

The command line's flags and the keys of a config file are made from these fields. This module does
not load torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from nanogpt_surgery.errors import SurgeryError

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]
Compile = Literal["auto", "on", "off"]
Shape = Literal["cosine", "stable"]
MOST = 1e15  # of any setting: steps are counted, and rows of all steps are numbered in 64 bits
MOST_SEED = 2**41  # what the order of batches is worked out from has 64 bits


@dataclass(frozen=True)
class FitSettings:
    """Settings of `fit`; contradictions are reported all at once, as a `SurgeryError`."""

    max_steps: int = 2000
    """optimizer steps in all"""
    batch_size: int = 12
    """windows in a batch"""
    grad_accum_steps: int = 1
    """batches whose gradients make one step, as one big batch would"""
    muon: bool = False
    """train the matrices between embedding and head by Muon instead of AdamW (arXiv:2502.16982)"""
    momentum: float = 0.95
    """Muon's memory of the gradient"""
    learning_rate: float = 2e-3
    """the peak of the schedule"""
    schedule: Shape = "cosine"
    """after the rise: a cosine; or the peak held, then a straight line down"""
    cooldown: float = 1.0
    """the share of the steps over which a stable schedule falls (1: from the start)"""
    final_learning_rate: float = 0.1
    """where the schedule ends, as a share of the peak"""
    warmup_steps: int = 100
    """steps over which the rate rises from 0, at most a tenth of all"""
    weight_decay: float = 0.1
    """decay, on matrices only; with muon, only on those that Muon trains"""
    lora_plus_ratio: float = 1.0
    """how many times faster a LoRA's B learns than the rest (LoRA+, arXiv:2402.12354)"""
    beta1: float = 0.9
    """AdamW's memory of the gradient"""
    beta2: float = 0.99
    """AdamW's memory of its square"""
    max_grad_norm: float = 1.0
    """largest norm of the gradient (0: no clipping)"""
    max_skipped_steps: int = 3
    """steps in a row that are skipped, since their gradient is not finite, before training stops"""
    evaluate_every: int = 250
    """steps from one evaluation to the next (0: only at the end)"""
    evaluate_tokens: int = 2**18
    """held-out tokens that an evaluation reads, spread over all there are (0: all)"""
    cache_gib: float = 2.0
    """GiB for hidden states before the first part that learns, kept where windows come again"""
    gradient_checkpointing: bool = False
    """compute each block again for its gradient instead of keeping it: less memory, more time"""
    seed: int = 1337
    """from which batches and dropout follow, with the step's number"""
    device: Device = "auto"
    """where to compute"""
    precision: Precision = "auto"
    """what matrix products are computed in; weights and optimizer stay float32"""
    compile: Compile = "auto"
    """torch.compile for each block: where it pays, always, or never"""
    fast: bool = field(default=True, metadata={"opposite": "plain"})
    """the quicker ways to the same numbers (training/fast); without, the code as it is read"""

    def __post_init__(self) -> None:
        found = [
            f"{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in _LEAST.items()
            if not getattr(self, name) >= least
        ]
        found += [
            f"{name} is {getattr(self, name)}; it must be finite, and at most {MOST:g}"
            for name in _LEAST
            if MOST < getattr(self, name) <= math.inf
        ]
        found += [
            f"{name} is {getattr(self, name)}; it must be below 1"
            for name in ("momentum", "beta1", "beta2")
            if getattr(self, name) >= 1
        ]
        if abs(self.seed) > MOST_SEED:
            found.append(f"seed is {self.seed}; its size must be at most {MOST_SEED}")
        if self.muon and self.lora_plus_ratio != 1:
            found.append(
                f"lora_plus_ratio is {self.lora_plus_ratio}, and Muon trains no B of a LoRA; it "
                "must be 1 with muon"
            )
        if self.compile == "on" and not self.fast:
            found.append("compile is on, which is one of the quicker ways; it must be off or auto")
        if self.cooldown > 1:
            found.append(f"cooldown is {self.cooldown}; it must be at most 1")
        found += [
            f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}"
            for name, choices in _CHOICES.items()
            if getattr(self, name) not in choices
        ]
        if found:
            raise SurgeryError("this training cannot be run: " + "; ".join(found))

    @property
    def windows(self) -> int:
        """How many windows, or rows, a training reads in all."""
        return self.max_steps * self.batch_size * self.grad_accum_steps

    def evaluates_after(self, steps: int) -> bool:
        """Returns whether it is time for an evaluation after so many steps."""
        every = self.evaluate_every
        return steps == self.max_steps or (every > 0 and steps % every == 0)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)


_CHOICES = {
    "device": get_args(Device),
    "precision": get_args(Precision),
    "compile": get_args(Compile),
    "schedule": get_args(Shape),
}
_LEAST = {
    "max_steps": 1,
    "batch_size": 1,
    "grad_accum_steps": 1,
    "learning_rate": 0.0,
    "final_learning_rate": 0.0,
    "cooldown": 0.0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "lora_plus_ratio": 0.0,
    "cache_gib": 0.0,
    "momentum": 0.0,
    "beta1": 0.0,
    "beta2": 0.0,
    "max_grad_norm": 0.0,
    "max_skipped_steps": 1,
    "evaluate_every": 0,
    "evaluate_tokens": 0,
}
