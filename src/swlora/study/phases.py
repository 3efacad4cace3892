"""The phases of a study: find layers, choose rates, measure, search with beams.

The run folders are the truth: layers and rates that were chosen are read from them each time, so a
study that was interrupted anywhere comes out as one that was not. An arm that cannot go on is noted
with its reason and left behind; the others go on. That a model has no super weight is no failure
but an answer: its arm has no layers, and no runs.
"""

from dataclasses import dataclass, field, replace

from swlora.study.arms import Arm, add_controls, arms_of, same_runs
from swlora.study.check import Checked
from swlora.study.folder import StudyFolder
from swlora.study.live import Board, View
from swlora.study.overview import arms_before
from swlora.study.plan import Task, beam_tasks, identify_tasks, rate_tasks, run_tasks
from swlora.study.rates import RateChoices
from swlora.study.runner import Runner


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
    same_as: dict[str, str] = field(default_factory=dict)  # arms that have the runs of another
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
        known = [self._with_its_rates(arm) for arm in found]
        self.arms, serving = add_controls(known, spec, n_layers)
        begun = {run["arm"] for run in self.study.facts["runs"].values() if run["phase"] == "runs"}
        same = same_runs(known, spec)
        self.same_as = {name: other for name, other in same.items() if name not in begun}
        for arm in self.arms:
            served = dict.fromkeys(serving.get(arm.name, {}).values())
            self._record_arm(arm, [name for name in served if name != arm.name])
        pairs = [pair for each in serving.values() for pair in each.items()]
        for name, other in (*pairs, *self.same_as.items()):
            if name in self.wanted and other != name:
                self.view.say(f"{name}: {other} has the same layers and serves as it")
                self.wanted.append(other)
        self._tell_board()
        running = [arm for arm in self._with_runs() if arm.name in self.wanted and arm.layers]
        n_rows = self.checked.n_rows["train"]
        choices = RateChoices(spec, n_rows, self.study, self.runner, self.view)
        self.rates = choices.choose(running)
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
        arms = [a for a in self._with_runs() if told["arms"].get(a.name, {}).get("layers") != []]
        runs = run_tasks(arms, {arm.name: arm.rates[0] for arm in arms}, 1)
        tasks = [*runs, *beam_tasks(runs, self.checked.spec)]
        return all(told["runs"].get(t.folder, {}).get("status") == "done" for t in tasks)

    def _with_runs(self) -> list[Arm]:
        """Return the arms that have runs of their own."""
        return [arm for arm in self.arms if arm.name not in self.same_as]

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
        choice = self.study.read_run_value(task.folder, "result.json", "choice")
        seconds = self.study.read_run_value(task.folder, "run.json", "timings_s", "choose_layers")
        found = {"layers": choice["layers"], "reason": choice["reason"], "one_off_s": seconds}
        self.study.record_arm(arm.name, **found)
        self.view.say(f"{arm.name}: layers {choice['layers'] or 'none'}")
        return replace(arm, layers=tuple(choice["layers"])) if choice["layers"] else arm

    def _with_its_rates(self, arm: Arm) -> Arm:
        """Return the arm with the open rates that it began with: another version has others."""
        before = self.study.facts["arms"].get(arm.name, {}).get("open_rates")
        if arm.fixed_rates is not None or arm.layers is None:
            return arm
        if before is None or before["layers"] != list(arm.layers):
            before = {"layers": list(arm.layers), "rates": list(arm.rates)}
            self.study.record_arm(arm.name, open_rates=before)
        return replace(arm, fixed_rates=tuple(before["rates"]))

    def _is_needed(self, arm: Arm, task: Task) -> bool:
        """Say whether the arm or a control of it is wanted, or its layers are there already."""
        parents = [
            each.control_of for each in arms_before(self.checked) if each.name in self.wanted
        ]
        told = self.study.facts["runs"].get(task.folder, {})
        return arm.name in (*self.wanted, *parents) or told.get("status") == "done"

    def _record_arm(self, arm: Arm, controls: list[str]) -> None:
        known = self.study.facts["arms"].get(arm.name, {})
        if arm.name in self.same_as and known.get("rate"):  # it began to choose its own
            self.study.record_arm(arm.name, rate=None, learning_rate=None)
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
            same_as=self.same_as.get(arm.name),
            one_off_s=known.get("one_off_s", 0.0),
            reason=known.get("reason") if arm.layers is None else None,
        )

    def _tell_board(self) -> None:
        """Tell the board of all runs that are to come, as far as they are known."""
        spec, n_rows = self.checked.spec, self.checked.n_rows["train"]
        arms = [arm for arm in self._with_runs() if arm.name in self.wanted]
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
