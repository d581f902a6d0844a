"""Optimizers that do not load PyTorch's compiler: that takes as long as loading PyTorch itself."""

from __future__ import annotations

from inspect import unwrap

import torch

from nanogpt_surgery.training import muon


class Uncompiled(torch.optim.Optimizer):
    """An optimizer whose bookkeeping is called as it is written.

    PyTorch wraps these methods to keep them out of what is compiled, and the wrapping loads the
    compiler. Nothing here compiles an optimizer.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Uncompiled, torch.optim.AdamW):
    """PyTorch's AdamW (arXiv:1711.05101)."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class Muon(Uncompiled, muon.Muon):
    """Muon, with that AdamW beside it."""

    adamw_class = AdamW
