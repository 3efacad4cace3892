"""Arms of a study, and the controls that make a choice of layers a claim that can be tested.

An arm whose layers are found (`super`, `super+removal`, `auto:...`) gets, with k = its number of
layers and everything else equal: `last:k`, `every:k`, and draws of `random:k`, each unlike all of
these. Layers of one model have the same shapes, so the controls have the same number of adapter
weights. Their seeds are the arm's, or its `control_seeds`. Where a control would repeat an arm that
is there anyway, that arm serves as the control. An arm that found the layers of another one, such
as `auto` where all layers pay, has its runs: they would come out alike.
"""

from dataclasses import dataclass, replace

from swlora.config import RunSpec, default_rate
from swlora.errors import UserError
from swlora.layer_policy import LayerPolicy, parse_policy
from swlora.study.spec import RATE_STEPS, ArmSpec, StudySpec

N_TRIES = 100  # draws until a random control is one that is not there yet


@dataclass(frozen=True)
class Arm:
    """One way to train, ready to run once `layers` is known; `policy` says where they come from.

    `n_layers` is the model's number, None where it is not at hand. `fixed_rates` are those of the
    study file, or with which an earlier call began; None: they follow from method and layers.
    """

    name: str
    policy: LayerPolicy
    settings: RunSpec
    fixed_rates: tuple[float, ...] | None
    seeds: tuple[int, ...]
    n_layers: int | None = None
    layers: tuple[int, ...] | None = None
    control_of: str | None = None
    control_seeds: tuple[int, ...] | None = None

    @property
    def method(self) -> str:
        """The adapter's method."""
        return self.settings.adapter.method

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from; those of all layers while `has_rates` is False."""
        if self.fixed_rates is not None:
            return self.fixed_rates
        n_layers = self.n_layers or 1
        n_adapted = len(self.layers or ()) or n_layers
        rate = default_rate(self.settings.adapter, n_adapted=n_adapted, n_layers=n_layers)
        return tuple(float(f"{rate * step:.2g}") for step in RATE_STEPS)

    @property
    def has_rates(self) -> bool:
        """Whether `rates` are final: open ones follow from the number of layers."""
        return self.fixed_rates is not None or self.layers is not None

    def run_spec(self, *, seed: int, rate: float) -> RunSpec:
        """Return the configuration of one run of this arm."""
        spec, policy = self.settings, self.policy
        if self.layers:
            policy = parse_policy(",".join(map(str, self.layers)))
        adapter = spec.adapter.model_copy(update={"layers": policy})
        train = spec.train.model_copy(update={"learning_rate": rate})
        return spec.model_copy(update={"adapter": adapter, "train": train, "seed": seed})


def arms_of(spec: StudySpec, n_layers: int | None) -> list[Arm]:
    """Return the arms that the study names, their layers counted where that needs no search."""
    return [_arm(spec, arm, n_layers) for arm in spec.arms]


def add_controls(
    arms: list[Arm], spec: StudySpec, n_layers: int
) -> tuple[list[Arm], dict[str, dict[str, str]]]:
    """Put after each arm with found layers its controls.

    Returns (arms, by arm: name of each of its controls -> name of the arm that serves as it, which
    is the arm itself where that has the same layers). Arms without layers have no controls.
    """
    every: list[Arm] = []
    serving: dict[str, dict[str, str]] = {}
    there = [arm for arm in arms if arm.layers is not None]
    for arm in arms:
        every.append(arm)
        if not (spec.controls and arm.policy.needs_search and arm.layers):
            continue
        serving[arm.name] = {}
        for control in _controls(arm, n_layers, spec.random_draws):
            same = next((other for other in there if _repeats(control, other)), None)
            serving[arm.name][control.name] = (same or control).name
            if same is None:
                there.append(control)
                every.append(control)
    return every, serving


def same_runs(arms: list[Arm], spec: StudySpec) -> dict[str, str]:
    """Return arm -> the arm whose runs are its own: its layers were found, and are those there.

    An arm with beam search has the runs of one with beam search only.
    """
    order = sorted(arms, key=lambda arm: arm.policy.needs_search)  # stable: named layers first
    same: dict[str, str] = {}
    for i, arm in enumerate(order):
        for other in order[:i]:
            has_beams = arm.name not in spec.beam.arms or other.name in spec.beam.arms
            is_found = arm.policy.needs_search and arm.layers
            if is_found and other.name not in same and has_beams and _repeats(arm, other):
                same[arm.name] = other.name
                break
    return same


def expected_controls(arm: Arm, spec: StudySpec) -> list[Arm]:
    """Return the controls that an arm will have, before its layers and so their K are known."""
    if not (spec.controls and arm.policy.needs_search):
        return []
    last, every = LayerPolicy("last:K", "last"), LayerPolicy("every:K", "every")
    draw = LayerPolicy("random:K", "random")
    draws = [(f"random-{i + 1}", draw) for i in range(spec.random_draws)]
    return [
        replace(_as_control(arm), name=f"{arm.name}-{name}", policy=policy, layers=None)
        for name, policy in [*draws, ("last", last), ("every", every)]
    ]


def _arm(spec: StudySpec, arm: ArmSpec, n_layers: int | None) -> Arm:
    settings = spec.run_spec(arm.overrides)
    policy = settings.adapter.layers
    layers = None
    if n_layers is not None and not policy.needs_search:
        layers = tuple(policy.resolve(n_layers))
    rates, seeds = arm.rates or spec.rate.grid, tuple(arm.seeds or spec.seeds)
    return Arm(
        arm.name,
        policy,
        settings,
        tuple(rates) if rates else None,
        seeds,
        n_layers,
        layers,
        control_seeds=tuple(arm.control_seeds) if arm.control_seeds else None,
    )


def _as_control(arm: Arm) -> Arm:
    """Return an arm that is like this one and a control of it, whatever its layers."""
    return replace(arm, control_of=arm.name, seeds=arm.control_seeds or arm.seeds)


def _controls(arm: Arm, n_layers: int, n_draws: int) -> list[Arm]:
    assert arm.layers is not None
    k = len(arm.layers)
    policies = {name: parse_policy(f"{name}:{k}") for name in ("last", "every")}
    taken = [arm.layers, *(tuple(p.resolve(n_layers)) for p in policies.values())]
    drawn = {}
    for i in range(n_draws):
        policy = _new_draw(k, n_layers, taken)
        if policy is not None:
            drawn[f"random-{i + 1}"] = policy
            taken.append(tuple(policy.resolve(n_layers)))
    return [
        replace(
            _as_control(arm),
            name=f"{arm.name}-{name}",
            policy=policy,
            layers=tuple(policy.resolve(n_layers)),
        )
        for name, policy in {**drawn, **policies}.items()
    ]


def _new_draw(k: int, n_layers: int, taken: list[tuple[int, ...]]) -> LayerPolicy | None:
    """Return `random:k:SEED` with the lowest seed whose layers are not taken; None: all are."""
    policies = (parse_policy(f"random:{k}:{seed}") for seed in range(N_TRIES))
    return next((p for p in policies if tuple(p.resolve(n_layers)) not in taken), None)


def _repeats(arm: Arm, other: Arm) -> bool:
    """Say whether every run of `arm` is one of `other`'s."""
    same_runs = arm.run_spec(seed=0, rate=1.0) == other.run_spec(seed=0, rate=1.0)
    return same_runs and arm.rates == other.rates and set(arm.seeds) <= set(other.seeds)


def select_arms(arms: list[Arm], spec: StudySpec, only: list[str]) -> list[str]:
    """Return the names of `--only`, checked against arms and controls; UserError for others."""
    names = [name for arm in arms for name in (arm.name, *_names(expected_controls(arm, spec)))]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only {','.join(unknown)}: the study has {', '.join(names)}")
    return only or names


def _names(arms: list[Arm]) -> list[str]:
    return [arm.name for arm in arms]
