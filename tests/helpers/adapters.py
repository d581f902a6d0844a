"""Models that carry an adapter, adapter folders, and bits to compare."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.models import tiny_model, train_a_little
from nanogpt_surgery import GPTConfig, SimpleGPT, inject_lora
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.merging import add_update, plain_layer
from nanogpt_surgery.lora.several import check_new_name
from nanogpt_surgery.lora.stored_adapter import StoredAdapter, check_fit
from nanogpt_surgery.lora.stored_adapter import attach_adapter as attach_checked

EVERY_LINEAR = r".*_proj|lm_head"


def adapted(
    config: GPTConfig, targets: str | list[str] = EVERY_LINEAR, rank: int = 3, alpha: float = 5
) -> SimpleGPT:
    """A tiny model that carries a trained LoRA."""
    model = tiny_model(config)
    inject_lora(model, targets, rank=rank, alpha=alpha, tied="untie")
    train_a_little(model, size=0.2)
    return model


def merged_layer(layer: LoRALayer) -> nn.Module:
    """The plain layer that a merge puts in the place of a wrapped one."""
    return plain_layer(layer.original_layer, nn.Parameter(add_update(layer)[0]))


def attach_adapter(model: nn.Module, adapter: StoredAdapter, name: str = "default") -> None:
    """Put an adapter on a model as `load_adapter` does, checked before."""
    check_new_name(model, name)
    check_fit(model, adapter, "open its base", "resize it")
    attach_checked(model, adapter, name)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every tensor is there under its name, with the bits it had."""
    now = model.state_dict()
    assert list(now) == list(before)
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name]), name


def unsealed(folder: Path) -> Path:
    """An adapter folder as another program would leave it: without our manifest."""
    (folder / "MANIFEST.json").unlink()
    return folder


def change_config(folder: Path, **changes: object) -> None:
    """Set options in an adapter's config."""
    path = folder / "adapter_config.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(contents | changes), encoding="utf-8")
