"""Optimisers of pairs (A, B): against plain float64 references, other coordinates, resume."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.optimizers.lora_muon import LoraMuon, inverse_root, polar
from benchmarks.optimizers.lora_rite import LoraRite
from torch import Tensor, nn

SHAPES = ((7, 5), (4, 9))  # (out, in) of two weights
RANK, STEPS, RATE = 3, 6, 0.05
Factors = list[tuple[Tensor, Tensor]]
Make = Callable[[Factors], torch.optim.Optimizer]


def factors(seed: int = 0, *, b_is_zero: bool = False) -> Factors:
    """A (r, in) and B (out, r) of the weights, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = [(draw(RANK, n_in), draw(n_out, RANK)) for n_out, n_in in SHAPES]
    return [(a, torch.zeros_like(b)) for a, b in made] if b_is_zero else made


def weight_gradients(pairs: Factors, step: int) -> list[Tensor]:
    """The gradient of a quadratic loss with a noise of its own in every step, by the whole B A."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for (a, b), shape in zip(pairs, SHAPES, strict=True):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append(0.2 * (b @ a) + 0.5 * noise)
    return found


def trained(make: Make, pairs: Factors, steps: range = range(STEPS)) -> list[Tensor]:
    """Descend from copies of the pairs; return every B A."""
    own = [(nn.Parameter(a.clone()), nn.Parameter(b.clone())) for a, b in pairs]
    optimizer = make(own)
    descend(optimizer, own, steps)
    return [(b @ a).detach() for a, b in own]


def descend(optimizer: torch.optim.Optimizer, own: Factors, steps: range) -> None:
    for step in steps:
        with torch.no_grad():
            for (a, b), gradient in zip(own, weight_gradients(own, step), strict=True):
                a.grad, b.grad = b.T @ gradient, gradient @ a.T
        optimizer.step()


# Plain references, written from the formulas: loops, SVDs and inverses of whole matrices


def root_of(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.T


def orthogonal(matrix: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def plain_muon(pairs: Factors, momentum: float, decay: float) -> list[Tensor]:
    pairs = [(a.clone(), b.clone()) for a, b in pairs]
    means = [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in pairs]
    for step in range(STEPS):
        for i, gradient in enumerate(weight_gradients(pairs, step)):
            (a, b), (mean_a, mean_b) = pairs[i], means[i]
            mean_a = momentum * mean_a + (1 - momentum) * b.T @ gradient
            mean_b = momentum * mean_b + (1 - momentum) * gradient @ a.T
            root_a, root_b = root_of(a @ a.T, -0.5), root_of(b.T @ b, -0.5)
            change_a = -RATE / 2 * root_b @ orthogonal(root_b @ mean_a)
            change_b = -RATE / 2 * orthogonal(mean_b @ root_a) @ root_a
            c = (1 - decay * RATE) ** 0.5
            pairs[i], means[i] = (c * a + change_a / c, c * b + change_b / c), (mean_a, mean_b)
    return [b @ a for a, b in pairs]


def plain_rite(pairs: Factors, betas: tuple[float, float], clip: float) -> list[Tensor]:
    """Every factor as columns X (n, r), the other one as Y: X Y' is the weight or its transpose."""
    flat = [m for a, b in pairs for m in (a.T.clone(), b.clone())]
    first = [torch.zeros_like(m) for m in flat]
    second = [torch.zeros(RANK, RANK, dtype=torch.float64) for _ in flat]
    bases = [torch.zeros_like(flat[i ^ 1]) for i in range(len(flat))]
    for step in range(STEPS):
        now = [(flat[2 * i].T, flat[2 * i + 1]) for i in range(len(SHAPES))]
        whole = [m for g in weight_gradients(now, step) for m in (g.T, g)]
        turned = [torch.linalg.qr(flat[i ^ 1]) for i in range(len(flat))]
        unmagnified = [whole[i] @ turned[i][0] for i in range(len(flat))]
        unmagnified = [g * (g.square().mean() <= 1) for g in unmagnified]
        norm = sum(float(g.norm() ** 2) for g in unmagnified) ** 0.5
        k1, k2 = (b * (1 - b**step) / (1 - b ** (step + 1)) for b in betas)
        for i, g in enumerate(unmagnified):
            g = g * min(1.0, clip / norm)
            q, r = turned[i]
            p = q.T @ bases[i]
            second[i] = k2 * p @ second[i] @ p.T + (1 - k2) * g.T @ g / len(g)
            eye = torch.eye(RANK, dtype=torch.float64)
            u = g @ torch.linalg.inv(root_of(second[i], 0.5) + 1e-6 * eye)
            first[i] = k1 * first[i] @ p.T + (1 - k1) * u
            bases[i] = q
            flat[i] = flat[i] - RATE * first[i] @ torch.linalg.inv(r).T
    return [flat[2 * i + 1] @ flat[2 * i].T for i in range(len(SHAPES))]


def muon(pairs: Factors) -> LoraMuon:
    return LoraMuon(pairs, RATE, momentum=0.8, weight_decay=0.5, damping=0.0)


def rite(pairs: Factors) -> LoraRite:
    return LoraRite(pairs, RATE, betas=(0.8, 0.9), clip=2.0)


def adamw(pairs: Factors) -> torch.optim.Optimizer:
    return torch.optim.AdamW([m for pair in pairs for m in pair], RATE, betas=(0.8, 0.9))


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> bool:
    return all(
        torch.allclose(one, other, rtol=0, atol=tolerance)
        for one, other in zip(found, expected, strict=True)
    )


def test_lora_muon_is_its_formula() -> None:
    assert same(trained(muon, factors()), plain_muon(factors(), 0.8, 0.5))


def test_lora_rite_is_its_formula() -> None:
    assert same(trained(rite, factors()), plain_rite(factors(), (0.8, 0.9), 2.0), 1e-8)


@pytest.mark.parametrize(
    ("make", "is_invariant"),
    [(muon, True), (rite, True), (adamw, False)],
    ids=lambda m: str(m)[:16],
)
def test_who_does_not_depend_on_the_coordinates(make: Make, is_invariant: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    turn = torch.randn(RANK, RANK, generator=generator, dtype=torch.float64) + 2 * torch.eye(RANK)
    other = [(torch.linalg.inv(turn) @ a, b @ turn) for a, b in factors()]
    found, expected = trained(make, other), trained(make, factors())
    assert same(found, expected, 1e-6) == is_invariant
    moved = max(float((e - b @ a).norm()) for e, (a, b) in zip(expected, factors(), strict=True))
    assert moved > 0.1  # what is compared did change


@pytest.mark.parametrize("make", [muon, rite], ids=["muon", "rite"])
def test_while_b_is_zero_it_moves_alone(make: Make) -> None:
    pairs = [(nn.Parameter(a), nn.Parameter(b)) for a, b in factors(b_is_zero=True)]
    before = [(a.detach().clone(), b.detach().clone()) for a, b in pairs]
    optimizer = make(pairs)
    descend(optimizer, pairs, range(1))
    for (a, b), (old_a, _) in zip(pairs, before, strict=True):
        keep = 1 - optimizer.param_groups[0]["weight_decay"] * RATE
        scale = keep**0.5 if isinstance(optimizer, LoraMuon) else 1.0
        assert torch.allclose(a, scale * old_a, atol=1e-12)
        assert b.norm() > 0 and b.isfinite().all()
    descend(optimizer, pairs, range(1, STEPS))
    assert all(m.isfinite().all() for pair in pairs for m in pair)
    assert all(not torch.equal(a, old_a) for (a, _), (old_a, _) in zip(pairs, before, strict=True))


def test_a_spectral_step_has_the_size_of_the_rate() -> None:
    pairs = factors(b_is_zero=True)
    for change in trained(lambda own: LoraMuon(own, RATE, damping=0.0), pairs, range(1)):
        assert torch.linalg.matrix_norm(change, ord=2) == pytest.approx(RATE / 2)


@pytest.mark.parametrize("make", [muon, rite], ids=["muon", "rite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_optimiser_is_the_same_to_the_last_bit(make: Make, dtype: torch.dtype) -> None:
    def fresh() -> Factors:
        return [(nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype))) for a, b in factors()]

    def step(optimizer: Any, own: Factors, steps: range) -> None:
        for number in steps:
            generator = torch.Generator().manual_seed(number)
            for pair in own:
                for m in pair:
                    m.grad = torch.randn(m.shape, generator=generator, dtype=dtype)
            optimizer.step()

    whole, halves = fresh(), fresh()
    step(make(whole), whole, range(STEPS))
    first = make(halves)
    step(first, halves, range(3))
    second = make(halves)
    second.load_state_dict(first.state_dict())
    step(second, halves, range(3, STEPS))
    for pair, other in zip(whole, halves, strict=True):
        assert all(torch.equal(m, n) for m, n in zip(pair, other, strict=True))


@pytest.mark.parametrize("make", [muon, rite], ids=["muon", "rite"])
def test_a_factor_without_gradient_stays(make: Make) -> None:
    pairs = [(nn.Parameter(a), nn.Parameter(b)) for a, b in factors()]
    before = [a.detach().clone() for a, _ in pairs]
    optimizer = make(pairs)
    for _, b in pairs:
        b.grad = torch.ones_like(b)
    optimizer.step()
    assert all(torch.equal(a, old) for (a, _), old in zip(pairs, before, strict=True))
    assert set(optimizer.state) == {b for _, b in pairs}


def test_large_gradients_are_skipped_by_lora_rite() -> None:
    ((a, b), *_) = factors()
    own = [(nn.Parameter(a.clone()), nn.Parameter(b.clone()))]
    optimizer = rite(own)
    own[0][0].grad, own[0][1].grad = 1e3 * torch.ones_like(a), torch.full_like(b, 1e-3)
    optimizer.step()
    assert torch.equal(own[0][0], a) and not torch.equal(own[0][1], b)


def test_roots_and_polar_factors_of_lower_rank() -> None:
    assert inverse_root(torch.zeros(3, 3), 1e-5).eq(0).all()
    x = torch.randn(6, 3, dtype=torch.float64)
    x[:, 2] = 0
    found = polar(x)
    assert torch.allclose(found[:, :2], orthogonal(x[:, :2])) and found[:, 2].norm() < 1e-12
    assert polar(torch.zeros(6, 3)).eq(0).all()


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="no A and B"):
        muon([(torch.zeros(3, 5), torch.zeros(7, 2))])
    with pytest.raises(ValueError, match="no closure"):
        muon(factors()).step(lambda: 0.0)


def test_scaled_adamw_is_its_formula(make_model: Callable[..., Any]) -> None:
    """PEFT's: g_A <- (B'B + d I)^-1 g_A, g_B <- g_B (A A' + d I)^-1 (2402.02347), then AdamW."""
    from benchmarks.recipes.descent import make_optimizer
    from benchmarks.recipes.recipe import Recipe

    from swlora.adapters.methods import adapt
    from swlora.config import AdapterSpec

    adapted = adapt(
        make_model("llama").double(), AdapterSpec(rank=2, targets=["v_proj"]), [1], seed=0
    )
    a, b = (p.data.double().clone() for p in adapted.parameters.values())
    for p in adapted.parameters.values():
        p.data = p.data.double()
    recipe = Recipe.parse(
        "steps=9 optimizer=scaled-adamw rate=0.05 beta1=0.8 beta2=0.9 damping=0.1"
    )
    optimizer = make_optimizer(adapted, recipe)
    moments = [torch.zeros_like(m) for m in (a, a, b, b)]
    eye = torch.eye(2, dtype=torch.float64)
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in (a, b)]
        for p, g in zip(adapted.parameters.values(), grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        scaled = torch.linalg.inv(b.T @ b + 0.1 * eye) @ grads[0]
        scaled_b = grads[1] @ torch.linalg.inv(a @ a.T + 0.1 * eye)
        changed = []
        for i, (m, g) in enumerate(((a, scaled), (b, scaled_b))):
            moments[2 * i] = 0.8 * moments[2 * i] + 0.2 * g
            moments[2 * i + 1] = 0.9 * moments[2 * i + 1] + 0.1 * g**2
            mean, square = moments[2 * i] / (1 - 0.8**step), moments[2 * i + 1] / (1 - 0.9**step)
            changed.append(m - 0.05 * mean / (square.sqrt() + 1e-8))
        a, b = changed
    assert same([p.data for p in adapted.parameters.values()], [a, b])
