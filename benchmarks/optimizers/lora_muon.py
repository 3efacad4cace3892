"""LoRA-Muon: Muon's spectral step for the product B A, taken in each factor by half.

Cesista, Simal, Crowson, Biderman 2026, arXiv 2606.12921, algorithm 1 and appendix B.4. With M the
exponential mean of a factor's gradient, polar(X) = X (X'X)^-1/2, and both changes from the same A
and B:

    S_A = A A'   S_B = B' B                                        (r, r)
    dB = -rate/2 polar(M_B S_A^-1/2) S_A^-1/2
    dA = -rate/2 S_B^-1/2 polar(S_B^-1/2 M_A)
    c = sqrt(1 - decay rate),   A <- c A + dA / c,   B likewise

Each half changes B A by at most rate/2 in spectral norm. The paper finds roots and polar factors
by iterations that suit accelerators; here they are exact, by eigenvalues of (r, r) in float64. As
in its appendix, S / ||S||_F + damping I is what is rooted; where B is zero there is no S_B to root,
and A stays.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.optimizers.pairs import Pair, PairOptimizer


class LoraMuon(PairOptimizer):
    """LoRA-Muon with exact roots; `momentum` is the weight of the past in M."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(pairs, {**defaults, "damping": damping})

    def _step(self) -> None:
        for a, b, group in self.pairs():
            root_a = inverse_root(a @ a.T, group["damping"])
            root_b = inverse_root(b.T @ b, group["damping"])
            changes: list[tuple[Tensor, Tensor]] = []
            if b.grad is not None:
                changes.append((b, polar(self._mean(b, group["momentum"]) @ root_a) @ root_a))
            if a.grad is not None:
                mean = self._mean(a, group["momentum"]).T
                changes.append((a, (polar(mean @ root_b) @ root_b).T))
            keep = (1 - group["weight_decay"] * group["lr"]) ** 0.5
            for factor, direction in changes:
                factor.mul_(keep).sub_(direction, alpha=group["lr"] / 2 / keep)

    def _mean(self, factor: Tensor, momentum: float) -> Tensor:
        """Return the mean of the gradients of a factor, with the newest one."""
        state = self.state[factor]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(factor)
        mean: Tensor = state["mean"].lerp_(factor.grad, 1 - momentum)
        return mean


def inverse_root(gram: Tensor, damping: float) -> Tensor:
    """Return (S + damping ||S||_F I)^-1/2 of a symmetric (r, r) S >= 0; zero where S is."""
    norm = torch.linalg.matrix_norm(gram.double())
    if norm == 0:
        return torch.zeros_like(gram)
    values, vectors = torch.linalg.eigh(gram.double())
    inverse = (values.clamp_min(0) + damping * norm).rsqrt()
    return ((vectors * inverse) @ vectors.T).to(gram.dtype)


def polar(matrix: Tensor) -> Tensor:
    """Return the nearest (m, r) with orthonormal columns; where the rank is lower, on its range."""
    wide = matrix.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    least = values[-1] * torch.finfo(values.dtype).eps * len(values)
    inverse = torch.where(values > least, values.clamp_min(least).rsqrt(), 0.0)
    return (wide @ ((vectors * inverse) @ vectors.T)).to(matrix.dtype)
