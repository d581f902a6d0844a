"""A module that an adapter replaces whole: PEFT's `modules_to_save`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.mixture import Blend


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
        """What the copy gives."""
        return self.module(*inputs)

    def trained(self) -> list[nn.Parameter]:
        """All its parameters."""
        return list(self.module.parameters())


class ReplacedLayer(LoRALayer):
    """A module and the copies that named adapters put in its place."""

    def forward(self, *inputs: Any) -> Any:
        """What the copy that takes part gives, or else the original."""
        return self.chosen()(*inputs)

    def chosen(self) -> nn.Module:
        """The module that takes part.

        Raises:
            SurgeryError: the mixture is not of one adapter alone.
        """
        weights = self.mixture.weights if isinstance(self.mixture, Blend) else dict.fromkeys(
            self.mixture.adapters(), 0.0
        )  # fmt: skip
        found = [name for name in weights if name in self.updates]
        if not self.enabled or not found:
            return self.original_layer  # type: ignore[no-any-return]
        if weights != {found[0]: 1.0}:
            raise SurgeryError(
                f"the adapter {found[0]!r} replaces whole modules, so it can only take part alone",
                f"swap_lora(model, {found[0]!r})",
            )
        return self.updates[found[0]]

    def shown(self) -> nn.Module:
        """The module that takes part, bare."""
        chosen = self.chosen()
        return chosen.module if isinstance(chosen, WholeUpdate) else chosen

    def merged_layer(self) -> nn.Module:
        """The module that takes part, bare; it is not rounded."""
        return self.shown()
