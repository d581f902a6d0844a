"""Muon: momentum whose direction counts, not its size, for the matrices between embedding and head.

AdamW rescales each number of a gradient by itself. Muon (Jordan et al. 2024; arXiv:2502.16982)
takes a matrix as a map: of the momentum M = U S Vᵀ it keeps U Vᵀ, so that every direction in which
the matrix can act moves equally far, the rare ones too. U Vᵀ is found by products alone (Newton and
Schulz): an odd polynomial of M, applied again and again, sends every singular value towards 1.

Legend: N matrices of one shape, R rows, C columns, R ≤ C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Polynomials: TypeAlias = tuple[tuple[float, float, float], ...]

# (a, b, c) of a x + b x³ + c x⁵: the first three of Polar Express (arXiv:2505.16932), each the best
# after those before it. They bring what is above 0.003 of the norm to between 0.15 and 2, and in
# short trainings learn as much as more rounds that come nearer to 1 (docs/training.md).
POLYNOMIALS = (
    (8.2873, -23.5959, 17.3004),
    (4.1071, -2.9478, 0.5448),
    (3.9487, -2.9089, 0.5518),
)


def orthogonalised(matrices: Tensor, polynomials: Polynomials = POLYNOMIALS) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ: (N, R, C) → (N, R, C), for R ≤ C."""
    largest = matrices.norm(dim=(-2, -1), keepdim=True)  # at least the first singular value
    x: Tensor = matrices / largest.clamp_min(1e-7)
    for a, b, c in polynomials:
        square = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
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
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=True) if others else None

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
                for matrices in _by_size(group["params"]).values():
                    self._update(matrices, group)
        if self.adamw is not None:  # rates and states are this optimizer's, also after a load
            self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self.adamw.state = self.state
            self.adamw.step()
        return loss

    def _update(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        momentum, rate = group["momentum"], group["lr"]
        gradients = torch.stack([_wide(m.grad) for m in matrices if m.grad is not None])
        buffers = torch.stack([self._buffer(matrix) for matrix in matrices])  # (N, R, C)
        buffers.lerp_(gradients, 1 - momentum)
        moves = orthogonalised(gradients.lerp(buffers, momentum), self.polynomials)
        for matrix, buffer, move in zip(matrices, buffers, moves, strict=True):
            self.state[matrix]["momentum"] = buffer
            rows, columns = matrix.shape
            matrix.mul_(1 - rate * group["weight_decay"])
            move = move if rows <= columns else move.mT
            matrix.add_(move, alpha=-rate * math.sqrt(max(1.0, rows / columns)))

    def _buffer(self, matrix: nn.Parameter) -> Tensor:
        """The momentum of a matrix, lying on its long side, (R, C)."""
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(_wide(matrix))
        momentum: Tensor = state["momentum"]
        return momentum


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.size(0) <= matrix.size(1) else matrix.mT


def _by_size(matrices: Iterable[nn.Parameter]) -> dict[tuple[int, ...], list[nn.Parameter]]:
    """Matrices with a gradient, by their shorter and longer side."""
    sizes: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for matrix in matrices:
        if matrix.grad is not None:
            sizes.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
    return sizes
