"""Layers by measurement, for `auto:BUDGET`: fewer than all only where a trial speaks for them.

1. A training that is over sooner than its measurement takes all layers at once.
2. What layers cost (`layer_profile`) and what their gradients promise propose the layers from one
   up. What Adam's first steps can win is their rate times the L1 norm of the gradient; with G(l)
   the sum of the norms from layer l up, winning as much as one pass with all layers takes
   G(0) / G(l) passes, at least one. The least time wins, among those that keep the budget with the
   time of measuring counted.
3. A trial (`layer_trial`) decides: all layers, the proposed ones, and as many in the middle train
   the same examples for the same seconds. What keeps the budget is taken where its held-out loss is
   no higher than that of all layers, else all are. So nothing is taken that did worst.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

from swlora.config import RunSpec
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError
from swlora.layer_policy import layer_ranges
from swlora.models.anatomy import Anatomy
from swlora.progress import Progress
from swlora.threads import adapted_threads
from swlora.training.layer_profile import LayerProfile, check_trees, profile
from swlora.training.layer_trial import N_HELD_OUT_LOSSES, TrialPlan, plan_trial, try_layers
from swlora.training.schedule import Schedule
from swlora.training.short_training import loss_or_infinity, loss_text


@dataclass(frozen=True)
class Option:
    """The layers from `lowest` up: what they are predicted to take, and to bring.

    `share_of_time` is that of the training with all layers, measuring included. What one pass with
    all layers wins takes `time_to_quality_s` an example.
    """

    lowest: int
    share_of_time: float
    share_of_gradient: float
    time_to_quality_s: float


@dataclass(frozen=True)
class Trial:
    """Layers that were trained for some steps, and their held-out losses in nats a token.

    `loss_nats` is that after the seconds of the trial with all layers, in which these layers make
    `n_steps`; `early_loss_nats` that after as many steps as all layers make. None: it diverged.
    """

    name: str
    layers: list[int]
    share_of_time: float
    n_steps: int
    loss_nats: float | None
    early_loss_nats: float | None


@dataclass(frozen=True)
class Choice:
    """The layers taken, why, and everything that was measured.

    `expected_loss_nats` is by how much the held-out loss is expected to be above that of all layers
    after as many steps.
    """

    budget: float
    layers: list[int]
    reason: str
    expected_loss_nats: float = 0.0
    measured_s: float = 0.0
    loss_before_nats: float | None = None
    profile: LayerProfile | None = None
    options: list[Option] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)


@dataclass(frozen=True)
class Forecast:
    """Seconds of trainings and trials, by the lowest adapted layer.

    `n_examples` are trained on, `n_epochs` times each; measuring took `spent_s` so far.
    """

    found: LayerProfile
    plan: TrialPlan
    n_examples: int
    n_epochs: float
    spent_s: float

    def training_s(self, lowest: int) -> float:
        """Return the seconds of the training asked for, with the layers from `lowest` up."""
        return self.n_examples * self.found.training_s(lowest, self.n_epochs)

    def trial_steps(self, lowest: int) -> int:
        """Return the steps that take as long as those of the trial with all layers.

        Seconds are those of the training, with its cached epochs, whatever a trial takes itself.
        """
        n_more = self.training_s(0) / self.training_s(lowest)
        return max(self.plan.n_trial, round(self.plan.n_trial * n_more))

    def trial_s(self, lowest: int) -> float:
        """Return the seconds of all trials, where the layers from `lowest` up are proposed."""
        tried = (0, lowest, middle_layers(self.found.n_layers, lowest)[0])
        pass_s = sum(self.trial_steps(i) * self.found.pass_s(i, is_first=True) for i in tried)
        losses_s = N_HELD_OUT_LOSSES * len(self.plan.held_out) * self.found.forward_s
        return self.plan.examples_per_step * (pass_s + losses_s)

    def share_of_time(self, lowest: int, measuring_s: float) -> float:
        """Return the share of the time with all layers that measuring and training take."""
        return (measuring_s + self.training_s(lowest)) / self.training_s(0)

    def measuring_s(self, lowest: int) -> float:
        """Return what all measuring takes where the layers from `lowest` up are proposed."""
        return self.spent_s + self.trial_s(lowest)


@adapted_threads()
def choose(
    model: Any, sequences: TokenSequences, spec: RunSpec, budget: float, progress: Progress
) -> Choice:
    """Choose layers of a base model for a training that shall take `budget` of all layers' time.

    The model's weights are the same afterwards, to the last bit. Raises UserError where the family
    cannot run trees or the adapters do not fit.
    """
    start_s = time.perf_counter()
    anatomy = Anatomy(model)
    check_trees(anatomy, "--layers auto")
    all_layers = list(range(anatomy.n_layers))
    schedule = Schedule.of(sequences, spec.train, spec.seed)
    plan = plan_trial(schedule, sequences, budget)
    if plan.objection:
        return Choice(budget, all_layers, f"all layers: {plan.objection}")
    found = profile(model, sequences, spec, plan.profiled, progress.say)
    n_examples = min(len(sequences), schedule.n_sequences)
    spent_s = time.perf_counter() - start_s
    forecast = Forecast(found, plan, n_examples, schedule.n_sequences / n_examples, spent_s)
    options = options_of(forecast)
    measured: dict[str, Any] = {"profile": found, "options": options}
    proposed = propose(options, budget)
    if proposed is None:
        least = min(option.share_of_time for option in options)
        reason = (
            f"all layers: no fewer keep the budget; the least takes {least:.2f} of their time, "
            "measuring included"
        )
        return Choice(budget, all_layers, reason, measured_s=spent_s, **measured)
    before, trials = _trials(model, sequences, spec, forecast, proposed.lowest, progress)
    measured |= {"trials": trials, "loss_before_nats": before}
    measured["measured_s"] = time.perf_counter() - start_s
    return decide(trials, budget, measured)


def options_of(forecast: Forecast) -> list[Option]:
    """Return the layers from each one up, lowest first."""
    found = forecast.found
    from_layer_up = list(accumulate(reversed(found.gradient_norms)))[::-1]
    if not from_layer_up[-1] > 0:
        raise RunFailedError("the adapters of the last layer have no gradient")
    whole = from_layer_up[0]
    return [
        Option(
            lowest=lowest,
            share_of_time=forecast.share_of_time(lowest, forecast.measuring_s(lowest)),
            share_of_gradient=gradient / whole,
            time_to_quality_s=found.training_s(lowest, whole / gradient),
        )
        for lowest, gradient in enumerate(from_layer_up)
    ]


def propose(options: list[Option], budget: float) -> Option | None:
    """Return what is predicted to learn fastest within the budget; None where nothing keeps it."""
    affordable = [option for option in options[1:] if option.share_of_time <= budget]
    return min(affordable, key=lambda option: option.time_to_quality_s, default=None)


def middle_layers(n_layers: int, lowest: int) -> list[int]:
    """Return as many layers as there are from `lowest` up, from the middle of the model."""
    n_taken = n_layers - lowest
    first = (n_layers - n_taken) // 2
    return list(range(first, first + n_taken))


def decide(trials: list[Trial], budget: float, measured: dict[str, Any]) -> Choice:
    """Take the lowest loss within the budget unless all layers, the first trial, have a lower one.

    `measured` goes into the choice.
    """
    of_all, *others = trials
    within = [t for t in others if t.share_of_time <= budget and t.loss_nats is not None]
    best = min(within, key=lambda t: loss_or_infinity(t.loss_nats), default=None)
    if best is None or loss_or_infinity(best.loss_nats) > loss_or_infinity(of_all.loss_nats):
        reason = "all layers: " + (
            _excess_text(best, of_all) if best else "trained alone, what keeps the budget diverges"
        )
        return Choice(budget, of_all.layers, reason, **measured)
    lost = 0.0
    reason = f"layers {layer_ranges(best.layers)}: "
    if of_all.loss_nats is None:
        reason += "all layers diverge at this learning rate"
    else:
        lost = loss_or_infinity(best.early_loss_nats) - of_all.loss_nats
        reason += (
            f"no worse than all layers in the same seconds. They take {best.share_of_time:.2f} of "
            f"the time and are expected to end {abs(lost):.3f} nats a token "
            f"{'above' if lost > 0 else 'below'} all layers, as after as many steps of the trial"
        )
    return Choice(budget, best.layers, reason, lost, **measured)


def lines(choice: Choice) -> Iterator[str]:
    """Lay out a choice and what it was made from, for a person."""
    if choice.trials:
        yield (
            f"{choice.measured_s:.0f} s of measuring, with all layers {choice.trials[0].n_steps} "
            f"steps; loss on held-out rows, nats a token, {choice.loss_before_nats:.3f} before:"
        )
        yield "layers      of all layers' time   in the same seconds   after as many steps"
    for trial in choice.trials:
        taken = "  <- taken" if trial.layers == choice.layers else ""
        yield (
            f"{layer_ranges(trial.layers):<12}{trial.share_of_time:18.2f}"
            f"{loss_text(trial.loss_nats):>22}{loss_text(trial.early_loss_nats):>22}{taken}"
        )
    yield choice.reason


def _trials(
    model: Any,
    sequences: TokenSequences,
    spec: RunSpec,
    forecast: Forecast,
    lowest: int,
    progress: Progress,
) -> tuple[float, list[Trial]]:
    """Try all layers, those from `lowest` up and the middle; return (loss before, trials)."""
    n_layers = forecast.found.n_layers
    tried = {
        "all": list(range(n_layers)),
        f"last:{n_layers - lowest}": list(range(lowest, n_layers)),
        "middle": middle_layers(n_layers, lowest),
    }
    n_steps = {name: forecast.trial_steps(layers[0]) for name, layers in tried.items()}
    trials, before = [], 0.0
    with progress.task("try layers", sum(n_steps.values())) as task:
        for name, layers in tried.items():
            losses = try_layers(
                model,
                sequences,
                spec,
                layers,
                forecast.plan,
                n_steps=n_steps[name],
                advance=partial(task.advance, 1.0, f"layers {layer_ranges(layers)}"),
            )
            before = losses.before_nats
            # Adapters in the middle save nothing above them: backward goes down to the lowest.
            measuring_s = 0.0 if name == "all" else forecast.measuring_s(lowest)
            share = forecast.share_of_time(layers[0], measuring_s)
            trials.append(
                Trial(name, layers, share, n_steps[name], losses.last_nats, losses.early_nats)
            )
    return before, trials


def _excess_text(best: Trial, of_all: Trial) -> str:
    lost = loss_or_infinity(best.loss_nats) - loss_or_infinity(of_all.loss_nats)
    return (
        f"what keeps the budget, layers {layer_ranges(best.layers)}, ended {lost:.3f} nats a token "
        "above them in the same seconds"
    )
