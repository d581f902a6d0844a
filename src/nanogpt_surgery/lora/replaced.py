"""A module that an adapter replaces whole: PEFT's `modules_to_save`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.several import LoRALayer, WeightedAdapters


class WholeUpdate(nn.Module):
    """A trained copy of a module, in the place of an update.

    Args:
        module: the original.
        tensors: its parameters and buffers by name; those not given are the original's.
    """

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]):
        super().__init__()
        self.module = copy.deepcopy(module)
        self.module.load_state_dict({**module.state_dict(), **tensors})

    def forward(self, *inputs: Any) -> Any:
        """Returns what the copy gives."""
        return self.module(*inputs)

    def trained(self) -> list[nn.Parameter]:
        """All its parameters."""
        return list(self.module.parameters())

    def wrapper(self) -> type[LoRALayer]:
        """The class of layer that it is put in."""
        return ReplacedLayer


class ReplacedLayer(LoRALayer):
    """A module and the copies that named adapters put in its place."""

    replaces_whole = True

    def forward(self, *inputs: Any) -> Any:
        """Returns what the copy that takes part gives, or else the original."""
        return self._chosen()(*inputs)

    def _chosen(self) -> nn.Module:
        """The copy that takes part, or else the original.

        Raises:
            SurgeryError: the copy's adapter does not take part alone, with the weight 1.
        """
        found = [name for name in self.active.names() if name in self.updates]
        if not self.enabled or not found:
            return self.original_layer
        if self.active != WeightedAdapters({found[0]: 1.0}):
            raise SurgeryError(
                f"the adapter {found[0]!r} replaces whole modules, so it can only take part alone",
                f"swap_lora(model, {found[0]!r})",
            )
        return self.updates[found[0]]

    @property
    def shown(self) -> nn.Module:
        """The module that takes part, bare."""
        chosen = self._chosen()
        return chosen.module if isinstance(chosen, WholeUpdate) else chosen
