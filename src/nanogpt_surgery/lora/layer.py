"""A frozen layer, and beside it an update for each adapter that changes it.

Which of the adapters take part, and how, is `active` (active.py). The subclasses say how a layer is
computed: `LoRALinear` (linear.py), `LoRAEmbedding` (embedding.py), `ReplacedLayer` (variants.py).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Self

from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.active import ActiveAdapters, WeightedAdapters
from nanogpt_surgery.lora.settings import LoRASettings


class LoRALayer(nn.Module):
    """A frozen layer, and beside it an update for each adapter that changes it.

    A model that reads the layer's weight, bias or sizes finds the original's. One that multiplies
    by that weight itself, instead of calling the layer, passes the updates by; no gradient reaches
    them then, and `fit` says so after the first step.

    Attributes:
        original_layer: frozen, and never written to.
        updates: by the name of the adapter that each belongs to.
        active: which adapters take part, and how.
        enabled: if false, the layer computes as if it had no update.
        unties: a merge may give this layer a weight of its own, if it shares one.
    """

    journaled = ("active", "enabled", "unties")  # attributes that `undo_lora` takes back
    replaces_whole = False  # true where adapters replace the module instead of adding to its weight

    @check_arguments
    def __init__(self, original_layer: nn.Module):
        super().__init__()
        self.original_layer: Any = original_layer.requires_grad_(False)
        self.updates = nn.ModuleDict()
        self.active: ActiveAdapters = WeightedAdapters({LoRASettings.name: 1.0})
        self.enabled = True
        self.unties = False

    @classmethod
    def around(cls, original_layer: nn.Module) -> Self:
        """Returns the layer wrapped, without an update yet."""
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, original_layer)  # that of `LoRALinear` would make an update
        return layer.train(original_layer.training)

    @property
    def shown(self) -> nn.Module:
        """The layer whose attributes are shown as this one's own."""
        return self.original_layer

    weight = property(attrgetter("shown.weight"))
    bias = property(attrgetter("shown.bias"))
    in_features = property(attrgetter("shown.in_features"))
    out_features = property(attrgetter("shown.out_features"))
    num_embeddings = property(attrgetter("shown.num_embeddings"))
    embedding_dim = property(attrgetter("shown.embedding_dim"))
    padding_idx = property(attrgetter("shown.padding_idx"))

    @property
    def update(self) -> Any:
        """The one update that takes part; its attributes, too, are shown as the layer's own.

        Raises:
            SurgeryError: none does, or several do.
        """
        names = [name for name in self.active.names() if name in self.updates]
        if len(names) != 1:
            raise SurgeryError(
                f"{len(names)} updates take part in this layer ({', '.join(names) or 'none'})",
                "layer.updates[NAME] is one of them",
            )
        return self.updates[names[0]]

    lora_A = property(attrgetter("update.lora_A"))  # noqa: N815
    lora_B = property(attrgetter("update.lora_B"))  # noqa: N815
    scaling = property(attrgetter("update.scaling"))
    rank = property(attrgetter("update.rank"))
    alpha = property(attrgetter("update.alpha"))
    dropout = property(attrgetter("update.dropout"))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):  # all those above
            raise SurgeryError(
                f"{name} of a {type(self).__name__} is only shown there: what is inside has it",
                "set it before inject_lora, or after remove_lora(model) or merge_lora(model)",
            )
        super().__setattr__(name, value)

    def delta_weight(self) -> Tensor:
        """Returns ΔW of the updates that take part, in the weight's layout, float32."""
        return self.active.delta_weight(self)

    def extra_repr(self) -> str:
        """Returns the text that `print(model)` shows."""
        return f"{self.active}" + ("" if self.enabled else ", disabled")
