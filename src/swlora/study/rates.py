"""Every arm's learning rate: of its grid, or beyond it, the one with the lowest held-out NLL.

First the short runs of all grids, then rounds: one further rate for each arm whose best is at an
edge, `rate.extend` times at most. The runs of a round are announced together, so that a cluster
makes them at the same time. A further rate that fails costs its arm nothing but that rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swlora.study.arms import Arm
from swlora.study.folder import StudyFolder
from swlora.study.live import View
from swlora.study.plan import Task, is_at_edge, rate_beyond, rate_task
from swlora.study.runner import Outcome, Runner
from swlora.study.spec import StudySpec, rate_name

Trial = tuple["Search", Task]


@dataclass
class Search:
    """The search for an arm's rate: held-out NLL by rate, None for one without a result.

    `failed`: a rate of the grid could not be tried, and why; then there is no choice.
    `untried`: so it was with one beyond the grid; then the choice is among the others.
    """

    arm: Arm
    nll: dict[float, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str | None = None
    untried: str | None = None

    @property
    def reason(self) -> str | None:
        """Why there is no choice, or None."""
        if self.failed or any(nll is not None for nll in self.nll.values()):
            return self.failed
        names = ", ".join(map(rate_name, self.nll))
        return f"each of its rates diverged ({names}): give it lower ones, and another --output"

    @property
    def chosen(self) -> float | None:
        """The rate with the lowest NLL, the first of equal ones; None where there is no choice."""
        measured = {rate: nll for rate, nll in self.nll.items() if nll is not None}
        return None if self.reason else min(measured, key=lambda rate: measured[rate])

    @property
    def further(self) -> float | None:
        """The rate beyond the edge where the chosen one lies; None where none is to be tried."""
        chosen = None if self.untried else self.chosen
        return None if chosen is None else rate_beyond(self.nll, chosen)

    def facts(self) -> dict[str, Any]:
        """Return what study.json says of it."""
        nll = {rate_name(rate): value for rate, value in self.nll.items()}
        facts = {"grid": list(self.nll), "nll": nll, "cost_s": round(self.seconds, 3)}
        if self.chosen is not None:
            facts |= {"chosen": self.chosen, "at_edge": is_at_edge(self.nll, self.chosen)}
        return facts | ({"untried": self.untried} if self.untried else {})


@dataclass(frozen=True)
class RateChoices:
    """Chooses the rates of a study's arms, which train on `n_train_rows` rows."""

    spec: StudySpec
    n_train_rows: int
    study: StudyFolder
    runner: Runner
    view: View

    def choose(self, arms: Sequence[Arm]) -> dict[str, float]:
        """Return by arm the rate of those that have one, and record what is known of each.

        Raises UserError as `Runner.run` does, and where the result of a run cannot be read.
        """
        searches = [Search(arm) for arm in arms if len(arm.rates) > 1]
        self._try([self._trial(search, rate) for search in searches for rate in search.arm.rates])
        for _ in range(self.spec.rate.extend):
            self._try([trial for search in searches if (trial := self._further_trial(search))])
        rates = {arm.name: arm.rates[0] for arm in arms if len(arm.rates) == 1}
        for name, rate in rates.items():
            self.study.record_arm(name, learning_rate=rate, rate=None)
        for search in searches:
            name, chosen = search.arm.name, search.chosen
            told = {"rate": search.facts(), "learning_rate": chosen, "reason": search.reason}
            self.study.record_arm(name, **told)
            if search.untried:
                self.view.say(f"{name}: {search.untried}")
            if chosen is not None:
                rates[name] = chosen
                self.view.say(f"{name}: learning rate {rate_name(chosen)}")
        return rates

    def _trial(self, search: Search, rate: float) -> Trial:
        return search, rate_task(search.arm, rate, self.spec, self.n_train_rows)

    def _further_trial(self, search: Search) -> Trial | None:
        """Return the next trial beyond the grid; None where there is none, or none any more.

        One that failed is not made again once the arm has runs: they have the rate chosen without.
        """
        best, rate = search.chosen, search.further
        if best is None or rate is None:
            return None
        _, task = trial = self._trial(search, rate)
        if self.runner.is_over(task):
            return trial
        told = self.study.facts["runs"].get(task.folder, {})
        if told.get("status") == "failed" and (self.study.folder / "runs" / task.arm).exists():
            search.untried = _untried(task, told["reason"])
            return None
        self.view.say(f"{task.arm}: {rate_name(best)} is at the edge; trying {task.label}")
        return trial

    def _try(self, trials: Sequence[Trial]) -> None:
        """Make the runs of a round, and note what came out."""
        self.runner.ahead([task for _, task in trials])
        for search, task in trials:
            self._note(search, task, self.runner.run(task))

    def _note(self, search: Search, task: Task, outcome: Outcome) -> None:
        rate = task.spec.train.rate
        has_failed = outcome.status != "done" and not outcome.has_diverged
        if has_failed and rate not in search.arm.rates:
            search.untried = _untried(task, outcome.reason)
            return
        if has_failed and search.failed is None:
            search.failed = f"the rate {task.label} could not be tried: {outcome.reason}"
        search.nll[rate] = None
        if outcome.status == "done":
            nll = self.study.read_run_value(task.folder, "result.json", "heldout", "nll")
            search.nll[rate] = nll
        search.seconds += self.study.facts["runs"][task.folder]["seconds"] or 0.0


def _untried(task: Task, reason: str | None) -> str:
    """Say that a rate beyond the grid failed, and how it is tried again."""
    return (
        f"the further rate {task.label} could not be tried ({' '.join(str(reason).split())}): the "
        f"best of the others is taken; without runs/{task.arm} the same command tries it again"
    )
