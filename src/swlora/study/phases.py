"""The phases of a study: find layers, choose rates, measure, search with beams.

The run folders are the truth: layers and rates that were chosen are read from them each time, so a
study that was interrupted anywhere comes out as one that was not. An arm that cannot go on is noted
with its reason and left behind; the others go on. That a model has no super weight is no failure
but an answer: its arm has no layers, and no runs.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swlora.errors import UserError
from swlora.files import read_json
from swlora.study.arms import Arm, add_controls, arms_of
from swlora.study.check import Checked
from swlora.study.folder import StudyFolder
from swlora.study.live import Board, View
from swlora.study.overview import arms_before
from swlora.study.plan import Task, beam_tasks, identify_tasks, rate_beyond, rate_tasks, run_tasks
from swlora.study.runner import Outcome, Runner

Facts = dict[str, Any]


@dataclass
class Phases:
    """One study at work in its folder; `wanted` are the names of the arms that run."""

    checked: Checked
    study: StudyFolder
    runner: Runner
    board: Board
    view: View
    wanted: list[str]
    arms: list[Arm] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Run everything that is not done."""
        spec, n_layers = self.checked.spec, self.checked.n_layers
        assert n_layers is not None  # checked
        self.arms = arms_before(self.checked)
        self._tell_board()
        named = arms_of(spec, n_layers)
        searches = ((arm, identify_tasks([arm]).get(arm.name)) for arm in named)
        self.runner.ahead([t for arm, t in searches if t and self._is_needed(arm, t)])
        found = [self._find_layers(arm) for arm in named]
        self._end_phase("identify")
        self.arms, serving = add_controls(found, spec, n_layers)
        for arm in self.arms:
            served = dict.fromkeys(serving.get(arm.name, {}).values())
            self._record_arm(arm, [name for name in served if name != arm.name])
        for control, name in (pair for each in serving.values() for pair in each.items()):
            if control in self.wanted and name != control:
                self.view.say(f"{control}: {name} has the same layers and serves as it")
                self.wanted.append(name)
        self._tell_board()
        running = [arm for arm in self.arms if arm.name in self.wanted and arm.layers is not None]
        n_rows = self.checked.n_rows["train"]
        self.runner.ahead([task for arm in running for task in rate_tasks(arm, spec, n_rows)])
        for arm in running:
            self._choose_rate(arm)
        self._end_phase("rates")
        runs = run_tasks(running, self.rates, n_rows)
        self.runner.ahead(runs)
        done = [task for task in runs if self.runner.run(task).status == "done"]
        self._end_phase("runs")
        beams = beam_tasks(done, spec)
        self.runner.ahead(beams)
        for task in beams:
            self.runner.run(task)
        self._end_phase("beam")

    def unfinished(self) -> list[str]:
        """List what of the wanted arms is not done and why, a line each."""
        told, lines = self.study.facts, []
        for arm in self.arms:
            facts = told["arms"].get(arm.name, {})
            if arm.name in self.wanted and facts.get("reason") and facts.get("layers") != []:
                lines.append(f"{arm.name}: {facts['reason']}")
        for place, run in told["runs"].items():
            is_measured = run["phase"] in ("runs", "beam") and run["arm"] in self.wanted
            if is_measured and run["status"] != "done":
                lines.append(f"{place}: {run['reason'] or run['status']}")
        return lines

    def is_complete(self) -> bool:
        """Say whether every run of every arm is done, also of those that were not wanted now."""
        told = self.study.facts
        arms = [arm for arm in self.arms if told["arms"].get(arm.name, {}).get("layers") != []]
        runs = run_tasks(arms, {arm.name: arm.rates[0] for arm in arms}, 1)
        tasks = [*runs, *beam_tasks(runs, self.checked.spec)]
        return all(told["runs"].get(t.folder, {}).get("status") == "done" for t in tasks)

    def _find_layers(self, arm: Arm) -> Arm:
        """Return the arm with its layers, found by a run where that is needed."""
        task = identify_tasks([arm]).get(arm.name)
        if task is None or not self._is_needed(arm, task):
            return arm
        outcome = self.runner.run(task)
        if outcome.status != "done":
            reason = f"no layers for {task.label}: {outcome.reason}"
            self.study.record_arm(arm.name, layers=None, reason=reason)
            return arm
        choice = self._read(task, "result.json")["choice"]
        seconds = self._read(task, "run.json")["timings_s"]["choose_layers"]
        found = {"layers": choice["layers"], "reason": choice["reason"], "one_off_s": seconds}
        self.study.record_arm(arm.name, **found)
        self.view.say(f"{arm.name}: layers {choice['layers'] or 'none'}")
        return replace(arm, layers=tuple(choice["layers"])) if choice["layers"] else arm

    def _is_needed(self, arm: Arm, task: Task) -> bool:
        """Say whether the arm or a control of it is wanted, or its layers are there already."""
        parents = [
            each.control_of for each in arms_before(self.checked) if each.name in self.wanted
        ]
        told = self.study.facts["runs"].get(task.folder, {})
        return arm.name in (*self.wanted, *parents) or told.get("status") == "done"

    def _record_arm(self, arm: Arm, controls: list[str]) -> None:
        known = self.study.facts["arms"].get(arm.name, {})
        self.study.record_arm(
            arm.name,
            policy=str(arm.policy),
            method=arm.method,
            layers=known.get("layers") if arm.layers is None else list(arm.layers),
            n_trainable=self.checked.n_trainable(arm),
            n_steps=self.checked.n_steps(arm.settings),
            seeds=list(arm.seeds),
            control_of=arm.control_of,
            controls=controls,
            one_off_s=known.get("one_off_s", 0.0),
            reason=known.get("reason") if arm.layers is None else None,
        )

    def _choose_rate(self, arm: Arm) -> None:
        """Take the rate with the lowest held-out NLL; note an arm for which there is none.

        Where it is at the edge of the grid, `rate.extend` further rates are tried at most.
        """
        if len(arm.rates) == 1:
            self.rates[arm.name] = arm.rates[0]
            self.study.record_arm(arm.name, learning_rate=arm.rates[0], rate=None)
            return
        facts, reason = self._compared_rates(arm)
        for _ in range(self.checked.spec.rate.extend):
            beyond = None if reason else rate_beyond(arm.rates, facts["chosen"])
            if beyond is None:
                break
            self.view.say(f"{arm.name}: {facts['chosen']:g} is at the edge; trying {beyond:g}")
            arm = replace(arm, rates=(*arm.rates, beyond))
            facts, reason = self._compared_rates(arm)
        if reason is None:
            self.rates[arm.name] = facts["chosen"]
            self.view.say(f"{arm.name}: learning rate {facts['chosen']:g}")
        learning_rate = self.rates.get(arm.name)
        self.study.record_arm(arm.name, rate=facts, learning_rate=learning_rate, reason=reason)

    def _compared_rates(self, arm: Arm) -> tuple[Facts, str | None]:
        """Try the rates of an arm; return what is known of them, or why there is none."""
        tasks = rate_tasks(arm, self.checked.spec, self.checked.n_rows["train"])
        outcomes = {task.label: self.runner.run(task) for task in tasks}
        nll: dict[str, float | None] = {}
        for task in tasks:
            is_done = outcomes[task.label].status == "done"
            nll[task.label] = self._read(task, "result.json")["heldout"]["nll"] if is_done else None
        seconds = (self.study.facts["runs"][task.folder]["seconds"] or 0.0 for task in tasks)
        facts: Facts = {"grid": list(arm.rates), "nll": nll, "cost_s": round(sum(seconds), 3)}
        reason = _why_no_rate(outcomes)
        if reason is None:
            pairs = ((t.spec.train.learning_rate, nll[t.label]) for t in tasks)
            measured = {rate: value for rate, value in pairs if value is not None}
            chosen = min(measured, key=lambda rate: measured[rate])
            facts |= {"chosen": chosen, "at_edge": rate_beyond(arm.rates, chosen) is not None}
        return facts, reason

    def _tell_board(self) -> None:
        """Tell the board of all runs that are to come, as far as they are known."""
        spec, n_rows = self.checked.spec, self.checked.n_rows["train"]
        arms = [arm for arm in self.arms if arm.name in self.wanted]
        identify = {task.folder: task for task in identify_tasks(arms).values()}
        short = [task for arm in arms for task in rate_tasks(arm, spec, n_rows)]
        runs = run_tasks(arms, {arm.name: arm.rates[0] for arm in arms}, n_rows)
        self.board.plan([*identify.values(), *short, *runs, *beam_tasks(runs, spec)])

    def _end_phase(self, phase: str) -> None:
        """Record the seconds of a phase's runs, of all times that the study ran."""
        runs = self.study.facts["runs"].values()
        seconds = sum(run["seconds"] or 0.0 for run in runs if run["phase"] == phase)
        phases_s = {**self.study.facts.get("phases_s", {}), phase: round(seconds, 3)}
        self.study.record(phases_s=phases_s)

    def _read(self, task: Task, name: str) -> Facts:
        path: Path = self.study.folder / task.folder / name
        try:
            return read_json(path)
        except UserError as error:
            raise UserError(f"{path} cannot be read; remove its folder to run it again") from error


def _why_no_rate(outcomes: dict[str, Outcome]) -> str | None:
    """Say why no rate can be chosen among runs by rate, or None; rates may be too high."""
    for label, outcome in outcomes.items():
        if outcome.status != "done" and not outcome.has_diverged:
            return f"the rate {label} could not be tried: {outcome.reason}"
    if all(outcome.has_diverged for outcome in outcomes.values()):
        return "every rate of its grid is too high: the loss is not finite"
    return None
