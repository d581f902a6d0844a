"""An adapter that an operation has computed and not yet put on a model: to be planned, or done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.lora.merging import Probe
from nanogpt_surgery.lora.stored_adapter import StoredAdapter, attach_adapter
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.structure import effect_on_logits, measured

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class MadeAdapter:
    """An adapter, and what there is to say of it."""

    title: str
    """of the operation"""
    adapter: StoredAdapter
    rows: list[dict[str, Any]]
    """for each layer that it changes"""
    more: dict[str, Any] = field(default_factory=dict)
    """for the summary"""

    def plan(self) -> Report:
        """Returns what the operation would put on the model; nothing is touched."""
        return Report(f"planned: {self.title}", self.rows, self._summary())

    def put_on(
        self, model: nn.Module, name: str, before: Callable[[], Tensor | None], probe: Probe | None
    ) -> Report:
        """Puts the adapter on a model, where it takes part alone, and measures its effect.

        Args:
            model: changed in place.
            name: of the adapter.
            before: called first: the logits that the new ones are compared with.
            probe: ids (B, T), or a function that gives logits.

        Raises:
            SurgeryError: the adapter does not fit, or the probe fails. The model is untouched then.
        """
        summary, first = self._summary(), before()

        def measure() -> None:
            summary.update(effect_on_logits(first, measured(model, probe), probe))

        attach_adapter(model, self.adapter, name, title=self.title, then=measure)
        return Report(self.title, self.rows, summary)

    def _summary(self) -> dict[str, Any]:
        numbers = sum(u.A.numel() + u.B.numel() for u in self.adapter.updates.values())
        errors = [row["error"] for row in self.rows if "error" in row]
        return {
            "layers": len(self.rows),
            "adapter_parameters": numbers,
            "adapter_bytes": FLOAT32 * numbers,
            **({"largest_layer_error": max(errors)} if errors else {}),
            **self.more,
        }
