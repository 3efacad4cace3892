"""Studies whose runs never ran: a folder made by hand, processes that only pretend."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.support.data_files import write_rows

from swlora.config import RunSpec, dump_yaml
from swlora.evaluation.scores import SegmentStatistics
from swlora.evaluation.segments import Segments
from swlora.loss_sum import LossSum
from swlora.result_json import as_json
from swlora.study.compare import Request
from swlora.study.compare import compare as run_studies
from swlora.study.live import board_table
from swlora.study.spec import StudySpec

N_PROMPTS = 41
N_STEPS = 20
ROWS_A_STEP = 8


@pytest.fixture
def make_segments() -> Callable[..., Segments]:
    """A function (quality 0..1, nll, seed=0, n=41, meteor=True) -> Segments about as good."""

    def make(
        quality: float, nll: float, seed: int = 0, n: int = N_PROMPTS, meteor: bool = True
    ) -> Segments:
        rng, prompts = np.random.default_rng([seed, 9]), np.random.default_rng(8)
        length = prompts.integers(9, 30, n)  # of a prompt, the same in every run
        share = np.clip(quality + 0.1 * prompts.normal(size=n) + 0.02 * rng.normal(size=n), 0, 1)
        totals = np.stack([length - k for k in range(5)], axis=1).astype(float)
        hits = np.round(totals * share[:, None] ** np.arange(1, 6))
        lengths = np.stack([length, length], axis=1)
        rows = np.zeros((n, 23))
        rows[:, :2] = length[:, None]
        rows[:, 4:6] = hits[:, :1]
        rows[:, 20:] = hits[:, :1] / [3, 1, 1]
        statistics = SegmentStatistics(
            bleu=np.concatenate([hits[:, :4], totals[:, :4], lengths], axis=1),
            nist=np.concatenate([4 * hits, totals, lengths], axis=1),
            meteor=rows if meteor else None,
            rouge_l=share,
            cider=4 * share,
            meteor_reason=None if meteor else "Java is left out here",
            tokenizer="java" if meteor else "python",
        )
        tokens = 8 * length
        nats = tokens * (nll + 0.2 * prompts.normal(size=n) + 0.01 * rng.normal(size=n))
        nats *= nll / (nats.sum() / tokens.sum())
        losses = [LossSum(float(a), int(b)) for a, b in zip(nats, tokens, strict=True)]
        return Segments.of(statistics, losses)

    return make


class HandmadeStudy:
    """Writes study.yaml, study.json and run folders as a study leaves them."""

    def __init__(self, folder: Path, make_segments: Callable[..., Segments]) -> None:
        self.folder = folder
        self._make_segments = make_segments
        self.settings: dict[str, Any] = {
            "arms": [{"name": "lora", "layers": "all"}],
            "seeds": [0, 1],
            "controls": True,
            "rate": {"grid": [1e-3, 4e-3]},
        }
        self.facts: dict[str, Any] = {
            "status": "done",
            "study": "handmade",
            "machine": {"cpu": "a test's", "cores": 2},
            "data_source": "rows made by hand",
            "n_rows": {"train": N_STEPS * ROWS_A_STEP},
            "arms": {},
            "runs": {},
        }

    def save(self) -> Path:
        """Write the two files of the study."""
        self.folder.mkdir(parents=True, exist_ok=True)
        spec = StudySpec.model_validate(self.settings)
        (self.folder / "study.yaml").write_text(dump_yaml(spec))
        (self.folder / "study.json").write_text(json.dumps(self.facts))
        return self.folder

    def arm(self, name: str, policy: str, seeds: tuple[int, ...] = (0, 1), **facts: Any) -> None:
        """Announce an arm."""
        told = {"policy": policy, "seeds": list(seeds), "one_off_s": 0.0, "control_of": None}
        rate = {"chosen": 4e-3, "at_edge": False, "cost_s": 33.0}
        self.facts["arms"][name] = told | {"rate": rate} | facts

    def told(self, place: str, status: str, reason: str | None = None) -> None:
        """Note in study.json how a run ended."""
        self.facts["runs"][place] = {"status": status, "reason": reason}

    def run(
        self,
        arm: str,
        seed: int,
        *,
        quality: float = 0.7,
        nll: float = 1.3,
        step_s: float = 1.0,
        one_off_s: float = 5.0,
        held_out: bool = True,
        meteor: bool = True,
        phase: str = "runs",
        trained: dict[str, Any] | None = None,
        spec: RunSpec | None = None,
    ) -> Path:
        """Write a finished run, whose held-out loss falls in a straight line from 3 to `nll`."""
        place = f"{phase}/{arm}/seed-{seed}"
        folder = self.folder / place
        folder.mkdir(parents=True)
        self.told(place, "done")
        spec = spec or RunSpec(seed=seed)
        (folder / "config.yaml").write_text(dump_yaml(spec))
        segments = self._make_segments(quality, nll, seed, meteor=meteor)
        segments.write(folder)
        total = LossSum(float(segments.sum_nats.sum()), int(segments.n_tokens.sum()))
        evaluated = {
            **as_json(segments.statistics.scores()),
            "nll": total.nats_per_token,
            "nll_sum_nats": total.sum_nats,
            "n_tokens": total.n_tokens,
            "english_perplexity_before": 20.0,
            "english_perplexity": 22.0 + seed,
            "n_prompts": len(segments),
        }
        train_s = (N_STEPS + 8) * step_s
        result = {
            "layers": [0, 1, 2, 5],
            "n_trainable": 1234,
            "adapter_bytes": 5000,
            "peak_memory_bytes": 2_000_000_000 + seed,
            "train_s": train_s,
        }
        results: dict[str, Any] = {"eval": evaluated}
        if phase == "runs":
            results["train"] = result | (trained or {})
            lines = [self._line(step, step_s, nll, held_out) for step in range(1, N_STEPS + 1)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
        (folder / "result.json").write_text(json.dumps(results))
        timings = {"load_model": 100.0, "tokenise": 7.0, "loss": 9.0, "generate": 50.0}
        timings |= {"attach": one_off_s, "train": train_s + 0.5 * self._n_held_out(held_out)}
        facts = {
            "status": "done",
            "command": "train-eval" if phase == "runs" else "eval",
            "data_sha256": "the same",
            "timings_s": {**timings, "total": sum(timings.values()) + 3},
        }
        (folder / "run.json").write_text(json.dumps(facts))
        return folder

    @staticmethod
    def _n_held_out(held_out: bool) -> int:
        return N_STEPS // 5 if held_out else 0

    @staticmethod
    def _line(step: int, step_s: float, nll: float, held_out: bool) -> dict[str, Any]:
        """One line of metrics.jsonl; the first step took nine times as long as the others."""
        line = {
            "step": step,
            "loss": 3 - (3 - nll) * step / N_STEPS,
            "rows": step * ROWS_A_STEP,
            "elapsed_s": step * step_s + 8 * step_s,
        }
        if held_out and step % 5 == 0:
            line |= {"eval_sum_nats": 100 * line["loss"], "eval_n_tokens": 100, "eval_s": 0.5}
        return line


@pytest.fixture
def study(tmp_path: Path, make_segments: Callable[..., Segments]) -> HandmadeStudy:
    """An empty study to be filled."""
    return HandmadeStudy(tmp_path / "study", make_segments)


@pytest.fixture
def two_arms(study: HandmadeStudy) -> HandmadeStudy:
    """A baseline, and layers that were found in 12 s: twice as fast a step, as good, and reach."""
    study.arm("lora", "all")
    study.arm("super", "super", one_off_s=12.0)
    for seed in (0, 1):
        study.run("lora", seed, quality=0.8, nll=1.2 + 0.004 * seed, step_s=2.0)
        study.run("super", seed, quality=0.8, nll=1.0, step_s=1.0)
    return study


class FakeChildren:
    """Stands for the processes of a study's runs; `acts` says by folder what they do."""

    def __init__(self, folder: Path) -> None:
        self.acts: dict[str, dict[str, Any]] = {}
        self.calls_file = folder / "calls.jsonl"

    def __call__(self, task: Any, study: Path, config: Path, resume: bool) -> list[str]:
        """The command line, as `swlora.study.runner.child_command` makes the real one."""
        child, acts = Path(__file__).with_name("fake_child.py"), json.dumps(self.acts)
        folder = str(study / task.folder)
        return [sys.executable, str(child), task.folder, folder, str(config), str(resume), acts]

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What the processes saw, in their order."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [json.loads(line) for line in lines]

    def ran(self) -> list[str]:
        """The folders of the runs since the last time this was asked."""
        places = [call["place"] for call in self.calls]
        self.calls_file.unlink(missing_ok=True)
        return places


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeChildren:
    """Fake processes, to be handed to the runner as its command."""
    fake = FakeChildren(tmp_path)
    monkeypatch.setenv("FAKE_CALLS", str(fake.calls_file))
    return fake


class SilentView:
    """A view that keeps what it was told; it interrupts while a file of that name is there."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stop_at: str | None = None
        self.is_closed = False

    def say(self, message: str) -> None:
        """Keep one line."""
        self.lines.append(message)

    def show(self, board: Any, folder: Path) -> None:
        """Draw what a terminal would show; interrupt as Ctrl-C would."""
        board_table(board, folder)
        if self.stop_at and any((folder / run / self.stop_at).exists() for run in board.running):
            raise KeyboardInterrupt

    def close(self) -> None:
        """Note that it is over."""
        self.is_closed = True


@pytest.fixture
def view() -> SilentView:
    """A view for one study."""
    return SilentView()


@pytest.fixture
def settings(model_folder: Any, tmp_path: Path) -> dict[str, Any]:
    """A study of two arms and the controls of one, on a Llama of three layers."""
    lines = [{"prompt": f"prompt {k}\n", "completion": f"answer {k}."} for k in range(45)]
    rows = write_rows(tmp_path / "rows.jsonl", lines)
    return {
        "model": {"name": str(model_folder("llama")), "dtype": "float32"},
        "data": {"name": str(rows)},
        "decode": {"max_new_tokens": 8},
        "arms": ["lora", "super", {"name": "fixed", "layers": "0", "rates": [0.25], "seeds": [5]}],
        "seeds": [0, 5],
        "rate": {"grid": [0.5, 0.1], "train_rows": 20},
        "beam": {"arms": ["fixed", "lora"], "seeds": [5]},
    }


@pytest.fixture
def request_of(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Request]:
    """A function (**changes of the settings) -> Request; `only` and `overrides` are its own."""

    def make(only: Any = None, overrides: Any = None, **changes: Any) -> Request:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        return Request(path, tmp_path / "out", only, overrides or {})

    return make


@pytest.fixture
def compare(view: SilentView, children: FakeChildren) -> Callable[[Request], Any]:
    """A function request -> what came out, with fake processes."""
    return lambda request: run_studies(request, view, children)
