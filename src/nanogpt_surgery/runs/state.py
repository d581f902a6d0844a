"""The state that a training goes on from: trained parameters, and the optimizer's state of each."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.formats.folders.old_keys import with_current_modules


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
        SurgeryError: it is the state of another model or optimizer, or another version's optimizer
            kept it in another shape.
    """
    tensors = _read(file)
    _check_another(file, tensors, _trained(model, optimizer))
    for name, parameter in _trained(model, optimizer).items():
        prefix = f"{name}:"
        state = {k.removeprefix(prefix): tensors.pop(k) for k in [*tensors] if k.startswith(prefix)}
        value = state.pop("value")
        _check_state(name, parameter, state)
        with torch.no_grad():
            parameter.copy_(value)
        # Copies: the tensors lie in the file's memory, and the file may be deleted.
        optimizer.state[parameter] = {
            key: tensor.to(parameter.device, copy=True) for key, tensor in state.items()
        }


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise SurgeryError(
            f"{file.parent} holds no {file.name}, which a training goes on from",
            "it is a model: init_from=MODEL trains it further, as a new run",
        )
    return with_current_modules(load_file(file))


def _check_another(
    file: Path, tensors: dict[str, Tensor], trained: dict[str, nn.Parameter]
) -> None:
    """Refuse the state of a model in which something else is trained, or in another shape."""
    there = {name[: -len(":value")]: t for name, t in tensors.items() if name.endswith(":value")}
    wrong = [
        f"{name} is {tuple(there[name].shape)} there and {tuple(trained[name].shape)} here"
        for name in trained.keys() & there.keys()
        if there[name].shape != trained[name].shape
    ]
    wrong += [f"{name} is trained there only" for name in there.keys() - trained.keys()]
    wrong += [f"{name} is trained here only" for name in trained.keys() - there.keys()]
    if wrong:
        more = f"; {len(wrong) - 4} more" if wrong[4:] else ""
        raise SurgeryError(
            f"{file} is not the state of this training: {'; '.join(sorted(wrong)[:4])}{more}",
            "go on with the settings that it was begun with, or choose a new folder",
        )


def _check_state(name: str, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.dim() and tensor.shape != parameter.shape:
            raise SurgeryError(
                f"the {key} of {name} is {tuple(tensor.shape)} in the checkpoint, and of this "
                f"version's {tuple(parameter.shape)}: the run was begun by an earlier one",
                "begin it anew, in another folder",
            )
