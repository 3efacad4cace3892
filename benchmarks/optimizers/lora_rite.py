"""LoRA-RITE: Adam with a matrix second moment, unchanged where A -> M A and B -> B M^-1.

Yen and others 2024, arXiv 2410.20625, algorithm 1, with what the authors' code adds (github.com/
gkevinyen5418/LoRA-RITE, `lora_rite.py`: bias correction inside the decays, a clip over all factors,
the skip of large gradients). For A, with B = Q R (Q (out, r) orthonormal) and t steps done with A:

    G = (R^-T g_A)'                (in, r), what Q' would make of the whole gradient: no size of B
    G = 0 where its root mean square is above 1;  all G / max(1, norm of all G / clip)
    P = Q' Q_before                V <- b2 P V P' + (1 - b2) G' G / in
    U = G (V^1/2 + eps I)^-1       M <- b1 M P' + (1 - b1) U
    A <- A - rate ((M R^-T)' + decay A),     b_i = beta_i (1 - beta_i^t) / (1 - beta_i^(t + 1))

and the same for B with A' = Q R. Both are changed from the same A and B. R^-1 is a pseudo-inverse:
while B is zero, A stays.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.optimizers.pairs import Pair, PairOptimizer

LARGEST_RMS = 1.0  # of an unmagnified gradient; the authors' `update_skipping`


class _Coordinates(NamedTuple):
    """A factor as (n, r), the basis of the other one and how its own coordinates come of it."""

    factor: Tensor
    is_a: bool
    basis: Tensor  # (m, r)
    inverse: Tensor  # R^-1, (r, r)
    gradient: Tensor  # G, (n, r)
    group: dict[str, Any]


class LoraRite(PairOptimizer):
    """LoRA-RITE with pseudo-inverses and roots by eigenvalues of (r, r)."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(pairs, {**defaults, "clip": clip})

    def _step(self) -> None:
        found = [one for a, b, group in self.pairs() for one in _coordinates(a, b, group)]
        if not found:
            return
        norms = torch.stack([one.gradient.square().sum() for one in found])
        norm = norms.sum().sqrt()
        changes = []
        for one in found:
            gradient = one.gradient / (norm / one.group["clip"]).clamp_min(1.0)
            changes.append(self._direction(one, gradient))
        for one, direction in zip(found, changes, strict=True):
            rate, decay = one.group["lr"], one.group["weight_decay"]
            one.factor.mul_(1 - rate * decay).sub_(direction, alpha=rate)

    def _direction(self, one: _Coordinates, gradient: Tensor) -> Tensor:
        """Return what is subtracted from a factor, in its own coordinates, and keep the moments."""
        state, (beta1, beta2) = self.state[one.factor], one.group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["first"] = torch.zeros_like(gradient)
            state["second"] = gradient.new_zeros(gradient.shape[1], gradient.shape[1])
            state["basis"] = torch.zeros_like(one.basis)
        turn = one.basis.T @ state["basis"]
        n_done = int(state["step"])
        keep1, keep2 = _kept(beta1, n_done), _kept(beta2, n_done)
        second = keep2 * (turn @ state["second"] @ turn.T)
        second = second + (1 - keep2) * (gradient.T @ gradient) / len(gradient)
        step = gradient @ _inverse_root(second, one.group["eps"])
        state["first"] = keep1 * (state["first"] @ turn.T) + (1 - keep1) * step
        state["second"], state["basis"] = (second + second.T) / 2, one.basis.clone()
        state["step"] += 1
        direction: Tensor = state["first"] @ one.inverse.T
        return direction.T if one.is_a else direction


def _coordinates(a: Tensor, b: Tensor, group: dict[str, Any]) -> list[_Coordinates]:
    """Return those of the two factors that have a gradient, both from the same A and B."""
    found = []
    for factor, other, is_a in ((a, b, True), (b, a.T, False)):
        if factor.grad is None:
            continue
        basis, triangle = torch.linalg.qr(other)
        inverse = torch.linalg.pinv(triangle)
        gradient = (factor.grad.T if is_a else factor.grad) @ inverse
        if gradient.square().mean().sqrt() > LARGEST_RMS:
            gradient = torch.zeros_like(gradient)
        found.append(_Coordinates(factor, is_a, basis, inverse, gradient, group))
    return found


def _kept(beta: float, n_done: int) -> float:
    """Return the weight of the past after `n_done` steps, so that means need no correction."""
    return beta * (1 - beta**n_done) / (1 - beta ** (n_done + 1))


def _inverse_root(second: Tensor, eps: float) -> Tensor:
    """Return (V^1/2 + eps I)^-1 of a symmetric (r, r) V >= 0."""
    values, vectors = torch.linalg.eigh(((second + second.T) / 2).double())
    inverse = 1 / (values.clamp_min(0).sqrt() + eps)
    return ((vectors * inverse) @ vectors.T).to(second.dtype)
