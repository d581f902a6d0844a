"""What a training goes on from: the trained parameters and the optimizer's state of each."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters and their optimizer state: "name:value", "name:exp_avg" and so on."""
    return {
        f"{name}:{key}": tensor.detach().cpu().contiguous()
        for name, parameter in _trained(model, optimizer).items()
        for key, tensor in {"value": parameter, **optimizer.state[parameter]}.items()
    }


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if id(p) in optimised}


def restore_state(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give what is trained and its optimizer the state that a file holds (`training_state`).

    Raises:
        SurgeryError: another version's optimizer kept its state in another shape.
    """
    tensors = load_file(file)
    for name, parameter in _trained(model, optimizer).items():
        prefix = f"{name}:"
        state = {k.removeprefix(prefix): tensors.pop(k) for k in [*tensors] if k.startswith(prefix)}
        value = state.pop("value")
        assert value.shape == parameter.shape, f"{name} is {value.shape} in {file}"
        _check_state(name, parameter, state)
        with torch.no_grad():
            parameter.copy_(value)
        # Copies: the tensors lie in the file's memory, and the file may be deleted.
        optimizer.state[parameter] = {
            key: tensor.to(parameter.device, copy=True) for key, tensor in state.items()
        }
    assert not tensors, f"{file} trains what this model does not: {[*tensors]}"


def _check_state(name: str, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.dim() and tensor.shape != parameter.shape:
            raise SurgeryError(
                f"the {key} of {name} is {tuple(tensor.shape)} in the checkpoint, and of this "
                f"version's {tuple(parameter.shape)}: the run was begun by an earlier one",
                "begin it anew, in another --out",
            )
