"""Settings of a training, with their defaults: the only place where they stand.

The command line's flags and the keys of a config file are made from these fields. This module does
not load torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from nanogpt_surgery.values import SHARE, Settings, integer, number

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]
Compile = Literal["auto", "on", "off"]
Schedule = Literal["cosine", "stable"]
# Counts are small enough that the rows of all steps can be numbered in 64 bits.
Count: TypeAlias = Annotated[int, integer(1, 10**15)]
CountOr0: TypeAlias = Annotated[int, integer(0, 10**15)]
Amount: TypeAlias = Annotated[float, number("from 0 to 1e15", lambda x: 0 <= x <= 1e15)]


@dataclass(frozen=True)
class FitSettings(Settings):
    """Settings of `fit`; all that is wrong with them is one `SurgeryError`."""

    max_steps: Count = 2000
    """optimizer steps in all"""
    batch_size: Count = 12
    """windows in a batch"""
    grad_accum_steps: Count = 1
    """batches whose gradients make one step, as one big batch would"""
    muon: bool = False
    """train the matrices between embedding and head by Muon instead of AdamW (arXiv:2502.16982)"""
    momentum: Annotated[float, SHARE] = 0.95
    """Muon's memory of the gradient"""
    learning_rate: Amount = 2e-3
    """the peak of the schedule"""
    schedule: Schedule = "cosine"
    """after the rise: a cosine; or the peak held, then a straight line down"""
    cooldown: Annotated[float, number("from 0 to 1", lambda x: 0 <= x <= 1)] = 1.0
    """stable schedule alone: the share of the steps over which it falls (1: from the start)"""
    final_learning_rate: Amount = 0.1
    """where the schedule ends, as a share of the peak"""
    warmup_steps: CountOr0 = 100
    """steps over which the rate rises from 0, at most a tenth of all"""
    weight_decay: Amount = 0.1
    """decay, on matrices only; with muon, only on those that Muon trains"""
    lora_plus_ratio: Amount = 1.0
    """how many times faster a LoRA's B learns than the rest (LoRA+, arXiv:2402.12354)"""
    beta1: Annotated[float, SHARE] = 0.9
    """AdamW's memory of the gradient"""
    beta2: Annotated[float, SHARE] = 0.99
    """AdamW's memory of its square"""
    max_grad_norm: Amount = 1.0
    """largest norm of the gradient (0: no clipping)"""
    max_skipped_steps: Count = 3
    """steps in a row that are skipped, since their gradient is not finite, before training stops"""
    evaluate_every: CountOr0 = 250
    """steps from one evaluation to the next (0: only at the end)"""
    evaluate_tokens: CountOr0 = 2**18
    """held-out tokens that an evaluation reads, spread over all there are (0: all)"""
    cache_gib: Amount = 2.0
    """GiB to keep what the frozen first layers compute, where windows come again"""
    gradient_checkpointing: bool = False
    """compute each block again for its gradient instead of keeping it: less memory, more time"""
    seed: Annotated[int, integer(-(2**41), 2**41)] = 1337
    """batches and dropout follow from it and the step's number, by 64-bit arithmetic"""
    device: Device = "auto"
    """where to compute"""
    precision: Precision = "auto"
    """in which matrix products are computed; weights and optimizer stay float32"""
    compile: Compile = "auto"
    """torch.compile for each block: where it pays, always, or never"""
    fast: bool = field(default=True, metadata={"opposite": "plain"})
    """the faster ways to the same numbers (training/fast); without, the code as it is read"""

    def contradictions(self) -> list[str]:
        """Returns a sentence for each contradiction."""
        found = []
        if self.muon and self.lora_plus_ratio != 1:
            found.append(
                f"lora_plus_ratio is {self.lora_plus_ratio}, and Muon trains no B of a LoRA; it "
                "must be 1 with muon"
            )
        if self.compile == "on" and not self.fast:
            found.append("compile is on, which is one of the faster ways; it must be off or auto")
        return found

    @property
    def windows(self) -> int:
        """Number of windows, or rows, that a training reads in all."""
        return self.max_steps * self.batch_size * self.grad_accum_steps

    def evaluates_after(self, steps: int) -> bool:
        """Returns whether it is time for an evaluation after so many steps."""
        every = self.evaluate_every
        return steps == self.max_steps or (every > 0 and steps % every == 0)
