"""Proof of super weights: what their ablation does to a text, against that of random weights.

With L the mean loss of a token in nats, the effect of an ablation is L_ablated - L, and

    ratio = exp(effect) = perplexity with the scalars zero / perplexity of the model as it is

A scalar is `super` if its ratio exceeds 10, `strong` above 1.5, and either only if its effect
exceeds 5 times the largest |effect| among its controls: random weights of the same matrix and of
nearly the same magnitude. Effects are compared, not ratios, since a harmless weight has a ratio
of 1, not 0. All others are `none`. Controls are measured where the ratio exceeds 1.5 (elsewhere
they could not change the verdict), on the first `control_windows` windows, with the candidate's
own effect on the same windows. A set is judged likewise, against sets of one control for each
member. Intervals: 95 %, from the bootstrap over 64-token blocks, the same blocks before and after.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp
from typing import Literal

import numpy as np

from swlora.errors import UserError
from swlora.models.anatomy import WeightAddress
from swlora.plural import counted
from swlora.processes import dealt, world
from swlora.progress import Progress, Silent
from swlora.result_json import NO_KEY
from swlora.superweights.controls import Control, draw_controls
from swlora.superweights.meter import BLOCK_TOKENS, BlockLosses, Meter, rise_nats

SUPER_RATIO = 10.0
STRONG_RATIO = 1.5
CONTROL_FACTOR = 5.0
BOOTSTRAP_DRAWS = 1_000
Verdict = Literal["super", "strong", "none"]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one ablation does, and the numbers that decide.

    `interval` is that of the ratio. `effect_nats` and `control_effects_nats` are the rise in nats a
    token on the control windows, of the ablation and of every control; the former None and the
    latter empty where the ratio alone decides. `largest_control` is the ratio of the control with
    the largest |effect|, below 1 where its ablation helps, None where none was measured.
    """

    perplexity: float
    ratio: float
    interval: tuple[float, float]
    largest_control: float | None = None
    largest_control_effect: float | None = field(default=None, metadata=NO_KEY)
    effect_nats: float | None = None
    control_effects_nats: tuple[float, ...] = ()
    verdict: Verdict = "none"


@dataclass(frozen=True, kw_only=True)
class AddressProof(Effect):
    """One candidate alone.

    `leave_one_out_ratio` is the ratio with all candidates but this one ablated. `controls` are in
    the order of `control_effects_nats`.
    """

    address: WeightAddress = field(metadata=NO_KEY)
    weight: float = field(metadata=NO_KEY)
    leave_one_out_ratio: float
    controls: tuple[Control, ...]


@dataclass(frozen=True, kw_only=True)
class JointProof(Effect):
    """Several candidates together."""

    addresses: tuple[WeightAddress, ...]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Every candidate alone, all of them together, and those together that are proven alone.

    `perplexity` is that of the model as it is; `joint_proven` is None where no candidate is.
    """

    perplexity: float
    n_windows: int
    window_tokens: int
    block_tokens: int
    control_windows: int
    n_controls: int
    seed: int
    bootstrap_draws: int
    addresses: tuple[AddressProof, ...]
    joint: JointProof
    joint_proven: JointProof | None


def prove(
    meter: Meter,
    addresses: Sequence[WeightAddress],
    *,
    n_controls: int = 20,
    control_windows: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Proof:
    """Ablate every candidate alone, all together, and all but one, and judge each by its controls.

    Raises UserError where there are no candidates or one comes twice, for an address that does
    not exist, and where a matrix has too few other weights for the controls.
    """
    if not addresses or len(set(addresses)) < len(addresses):
        raise UserError("a proof needs candidates, each of them once")
    if n_controls < 1 or not 1 <= control_windows <= meter.n_windows:
        raise UserError(
            f"a proof needs one control at least, on 1 to {counted(meter.n_windows, 'window')}; "
            f"not {n_controls} on {control_windows}"
        )
    for address in addresses:
        meter.anatomy.weight_view(address)  # raises UserError before the work
    judge = _Judge(meter, addresses, n_controls, control_windows, seed, progress or Silent())
    judge.ablate()
    alone = tuple(judge.alone(address) for address in addresses)
    proven = [proof.address for proof in alone if proof.verdict != "none"]
    return Proof(
        perplexity=judge.base.total.perplexity,
        n_windows=meter.n_windows,
        window_tokens=meter.windows.shape[1],
        block_tokens=BLOCK_TOKENS,
        control_windows=control_windows,
        n_controls=n_controls,
        seed=seed,
        bootstrap_draws=BOOTSTRAP_DRAWS,
        addresses=alone,
        joint=judge.together(addresses),
        joint_proven=judge.together(proven) if proven else None,
    )


def verdict(ratio: float, effect_nats: float, largest_control_effect: float) -> Verdict:
    """Name what the numbers of an ablation mean."""
    if ratio <= STRONG_RATIO or effect_nats <= CONTROL_FACTOR * largest_control_effect:
        return "none"
    return "super" if ratio > SUPER_RATIO else "strong"


def ratio_interval(base: BlockLosses, ablated: BlockLosses, seed: int) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % points of the ratio when blocks are drawn with replacement.

    A draw takes the same blocks of both; with a single block both points are the ratio itself.
    """
    n = len(base.sums_nats)
    draws = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=BOOTSTRAP_DRAWS)
    rises_nats = np.subtract(ablated.sums_nats, base.sums_nats)
    effects = (draws @ rises_nats) / (draws @ np.array(base.n_tokens))  # (draws,)
    low, high = np.percentile(effects, [2.5, 97.5])
    return exp(low), exp(high)


@dataclass
class _Judge:
    """Measures ablations and controls; the meter remembers what was measured before."""

    meter: Meter
    addresses: Sequence[WeightAddress]
    n_controls: int
    control_windows: int
    seed: int
    progress: Progress

    def ablate(self) -> None:
        """Measure all ablations, in an order that lets each begin at a state that was kept."""
        layers = {address.layer for address in self.addresses}
        n = len(self.addresses)
        with self.progress.task("ablate the candidates", 2 + 2 * n) as task:
            self.meter.measure({}, keep=layers)
            task.advance(1, "none")
            for address in self.addresses:
                self.meter.ablate([address])
                task.advance(1, f"{address} alone")
            self.meter.measure(dict.fromkeys(self.addresses, 0.0), keep=layers)
            task.advance(1, "all")
            for address in self.addresses:
                self._all_but(address)
                task.advance(1, f"all but {address}")

    @cached_property
    def base(self) -> BlockLosses:
        """The model as it is."""
        return self.meter.measure({})

    @cached_property
    def controls(self) -> dict[WeightAddress, tuple[Control, ...]]:
        """The controls of every candidate; drawn when first needed."""
        return draw_controls(self.meter.anatomy, self.addresses, self.n_controls, self.seed)

    def alone(self, address: WeightAddress) -> AddressProof:
        """Judge one candidate."""
        effect = self._judge([address], str(address))
        return AddressProof(
            **vars(effect),
            address=address,
            weight=float(self.meter.anatomy.weight_view(address)),
            leave_one_out_ratio=exp(rise_nats(self.base, self._all_but(address))),
            controls=self.controls[address] if effect.control_effects_nats else (),
        )

    def together(self, addresses: Sequence[WeightAddress]) -> JointProof:
        """Judge several candidates as one."""
        effect = self._judge(addresses, f"{counted(len(addresses), 'candidate')} together")
        return JointProof(**vars(effect), addresses=tuple(addresses))

    def _all_but(self, address: WeightAddress) -> BlockLosses:
        return self.meter.ablate(a for a in self.addresses if a != address)

    def _judge(self, addresses: Sequence[WeightAddress], name: str) -> Effect:
        losses = self.meter.ablate(addresses)
        ratio = exp(rise_nats(self.base, losses))
        effect = Effect(
            perplexity=losses.total.perplexity,
            ratio=ratio,
            interval=ratio_interval(self.base, losses, self.seed),
        )
        if ratio <= STRONG_RATIO:
            return effect
        rise = self._control_window_effect(addresses)
        control_rises = self._control_effects(addresses, name)
        largest = max(control_rises, key=abs)
        return replace(
            effect,
            effect_nats=rise,
            control_effects_nats=control_rises,
            largest_control=exp(largest),
            largest_control_effect=abs(largest),
            verdict=verdict(ratio, rise, abs(largest)),
        )

    def _control_effects(self, addresses: Sequence[WeightAddress], name: str) -> tuple[float, ...]:
        with self.progress.task(f"random weights beside {name}", self.n_controls) as task:

            def effect(i: int) -> float:
                controls = [self.controls[address][i].address for address in addresses]
                rise = self._control_window_effect(controls)
                task.advance(world().size)
                return rise

            return tuple(dealt(range(self.n_controls), effect))

    def _control_window_effect(self, addresses: Sequence[WeightAddress]) -> float:
        n = self.control_windows
        base = self.meter.measure({}, n_windows=n)
        ablated = self.meter.ablate(addresses, n_windows=n)
        return rise_nats(base, ablated)
