"""Muon: momentum whose direction counts, not its size, for the matrices between embedding and head.

AdamW rescales each number of a gradient by itself. Muon (Jordan et al. 2024; arXiv:2502.16982)
takes a matrix as a map: of the momentum M = U S Vᵀ it keeps U Vᵀ, so that every direction in which
the matrix can act moves equally far, the rare ones too. U Vᵀ is found by products alone (Newton and
Schulz): an odd polynomial of M, applied again and again, sends every singular value towards 1.

Legend: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.targets import output_layer
from nanogpt_surgery.training.hardware import has_bfloat16

Polynomials: TypeAlias = tuple[tuple[float, float, float], ...]

# (a, b, c) of a x + b x³ + c x⁵: the first three of Polar Express (arXiv:2505.16932), each the best
# after those before it. They bring what is above 0.003 of the norm to between 0.15 and 2, and in
# short trainings learn as much as more rounds that come nearer to 1 (docs/training.md).
POLYNOMIALS = (
    (8.2873, -23.5959, 17.3004),
    (4.1071, -2.9478, 0.5448),
    (3.9487, -2.9089, 0.5518),
)
MARGIN = 1.02  # of the norm in bfloat16
# Beside Muon's rate, that of what AdamW trains (docs/training.md).
EMBEDDING_RATIO, OTHER_RATIO = 1.5, 0.5


def orthogonalised(matrices: Tensor, polynomials: Polynomials = POLYNOMIALS) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ: (N, R, C) → (N, R, C), of the same dtype."""
    shorter_first = matrices.mT if matrices.size(-2) > matrices.size(-1) else matrices
    quick = matrices.is_cuda and has_bfloat16(matrices.device)
    apply = in_bfloat16 if quick else by_gram
    found = apply(shorter_first, polynomials).to(matrices.dtype)
    return found if shorter_first is matrices else found.mT


def by_gram(matrices: Tensor, polynomials: Polynomials) -> Tensor:
    """The rounds on the Gram matrix: (N, R, C) with R ≤ C → the same in float32, or wider.

    What the polynomials do to a matrix X they do through G = X Xᵀ: a X + b G X + c G² X =
    (a + b G + c G²) X = P X, and then G becomes P G P. So all rounds are on the short side, and X
    takes part in two products alone. They need float32: in bfloat16 the square of a singular value
    under a tenth of the largest is lost beside that of the largest.
    """
    matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    gram = matrices @ matrices.mT  # (N, R, R)
    squared_norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-14)[:, None, None]
    gram = gram / squared_norm
    product = squared_norm.rsqrt()  # of the steps of all rounds; as yet the scale alone
    step = gram
    for number, (a, b, c) in enumerate(polynomials):
        gram = step @ gram @ step if number else gram
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        product = step @ product if number else step * product
    return product @ matrices


def in_bfloat16(matrices: Tensor, polynomials: Polynomials) -> Tensor:
    """The rounds on the matrix itself, for a GPU: its bfloat16 is many times its float32.

    The first two polynomials are steep beyond 1, which rounding must not reach: hence `MARGIN`.
    """
    norm = MARGIN * matrices.float().norm(dim=(-2, -1), keepdim=True) + 1e-7
    x: Tensor = (matrices / norm).bfloat16()  # (N, R, C)
    for a, b, c in polynomials:
        gram = x @ x.mT  # (N, R, R)
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, step, x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for all else; one optimizer, so that a run saves and resumes it.

    Groups with `muon` true hold matrices. A matrix moves by the learning rate times
    √max(1, rows / columns), with Nesterov's momentum and decoupled decay, as `torch.optim.Muon`
    does with its "original" rate. Matrices of one shape are orthogonalised together.

    Args:
        groups: parameter groups, each with `muon`, true or false.
        lr: the learning rate.
        momentum: of the matrices.
        betas: AdamW's.
        polynomials: see `orthogonalised`.
    """

    adamw_class: type[torch.optim.AdamW] = torch.optim.AdamW

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        polynomials: Polynomials = POLYNOMIALS,
    ):
        self.polynomials = polynomials
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        others = [group for group in self.param_groups if not group["muon"]]
        self.adamw = self.adamw_class(others, lr=lr, betas=betas, fused=True) if others else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: called first: computes the gradients, and returns the loss.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                for matrices in _by_shape(group["params"]).values():
                    self._update(matrices, group)
        if self.adamw is not None:  # rates and states are this optimizer's, also after a load
            self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self.adamw.state = self.state
            self.adamw.step()
        return loss

    def _update(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        weights: list[Tensor] = [matrix.detach() for matrix in matrices]
        rate, (rows, columns) = group["lr"], matrices[0].shape
        moves = torch.stack(self._looked_ahead(matrices, group["momentum"]))  # (N, R, C)
        scale = -rate * math.sqrt(max(1.0, rows / columns))
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        torch._foreach_add_(weights, orthogonalised(moves, self.polynomials).unbind(), alpha=scale)

    def _looked_ahead(self, matrices: list[nn.Parameter], momentum: float) -> list[Tensor]:
        """The gradients taken into the momenta, and looked ahead from there (Nesterov), (R, C)."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, momenta, momentum))


def _by_shape(matrices: Iterable[nn.Parameter]) -> dict[torch.Size, list[nn.Parameter]]:
    """Matrices with a gradient, by shape."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for matrix in matrices:
        if matrix.grad is not None:
            shapes.setdefault(matrix.shape, []).append(matrix)
    return shapes


def muon_groups(
    model: nn.Module, trainable: list[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """The groups of parameters: matrices of Linears but the head's for Muon, the rest for AdamW.

    Raises:
        SurgeryError: no such matrix can be trained.
    """
    modules, output = dict(model.named_modules()), output_layer(model)
    linears = [m for name, m in modules.items() if isinstance(m, nn.Linear) and name != output]
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    matrices = {id(m.weight) for m in linears if m.weight.requires_grad} - tables
    if not matrices:
        raise SurgeryError(
            "muon trains the matrices of a model, and none of them can be trained",
            "a LoRA is trained by AdamW: leave muon away",
        )
    groups: list[tuple[list[nn.Parameter], dict[str, Any]]] = [
        (
            [p for p in trainable if id(p) in matrices],
            {"muon": True, "weight_decay": weight_decay},
        ),
        ([p for p in trainable if id(p) in tables], {"muon": False, "rate_ratio": EMBEDDING_RATIO}),
        (
            [p for p in trainable if id(p) not in matrices | tables],
            {"muon": False, "rate_ratio": OTHER_RATIO},
        ),
    ]
    return [{"params": parameters} | options for parameters, options in groups if parameters]
