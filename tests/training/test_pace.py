"""How fast steps are: what was run, the work that it needed, and who else uses the cores."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swlora import matrix_peak
from swlora.adapters.methods import adapt
from swlora.config import AdapterSpec, TrainSpec
from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.models.anatomy import Anatomy
from swlora.threads import CpuClock, OthersShare
from swlora.training.necessary_work import FlopCounter, Work, necessary_flops
from swlora.training.pace import MeanPace, Pace, mean_pace
from swlora.training.step import make_step

SEQUENCES = TokenSequences.from_lists([([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([7], [8, 9])])


def step_of(model: Any, engine: str, layers: list[int], **settings: Any) -> Any:
    adapted = adapt(model, AdapterSpec(rank=2), layers, seed=0, n_steps=3)
    spec = TrainSpec(engine=engine, **settings)
    return make_step(adapted.model, SEQUENCES, spec, print)


@pytest.mark.parametrize("engine", ["tree", "plain"])
def test_a_step_counts_what_it_runs(make_model, engine):
    step = step_of(make_model("llama"), engine, [0, 1, 2])
    for n_done in (1, 2):
        step([np.array([0, 1]), np.array([2])])
        assert step.work.n_tokens == n_done * (5 + 4 + 3)
        # Of a tree all but last tokens, shared ones once; padded: three rows of five
        assert step.work.n_nodes == n_done * (15 if engine == "plain" else 4 + 2)
    step.close()
    if engine == "plain":
        assert step.work.flops is None
    else:
        trees = [build_tree(SEQUENCES, ids) for ids in (np.array([0, 1]), np.array([2]))]
        anatomy = Anatomy(make_model("llama"))
        needed = sum(
            necessary_flops(
                anatomy, 0, len(t.token_ids), len(set(t.target_position)), prefix_read=False
            )
            for t in trees
        )
        assert step.work.flops == pytest.approx(2 * needed, rel=1e-12)


def test_kept_states_are_no_work(make_model, fresh_cache):
    step, groups = step_of(make_model("llama"), "tree", [2]), [np.array([0, 1, 2])]
    step(groups)
    first = step.work.flops
    step(groups)
    step.close()
    assert 0 < step.work.flops - first < first


def test_flops_by_hand(make_model):
    """One block of weights P, all of it adapted: all products forward, those behind the entry
    back; queries and what follows at scored nodes only.
    """
    model = make_model("llama", num_hidden_layers=1)
    d, inner, q, kv, vocabulary = 24, 40, 4 * 8, 2 * 8, 264
    entry, rest = d * q + 2 * d * kv, q * d + 3 * d * inner
    by_hand = 2 * (2 * d * kv * 10 + (d * q + rest) * 3) + 2 * rest * 3 + 4 * d * vocabulary * 3
    assert necessary_flops(Anatomy(model), 0, 10, 3, prefix_read=False) == by_hand
    assert FlopCounter(Anatomy(model), 0)(10, 3, prefix_read=False) == by_hand
    assert entry == d * q + 2 * d * kv


@pytest.mark.parametrize("prefix_read", [False, True])
def test_flops_of_three_blocks_by_hand(make_model, prefix_read):
    """The second is the lowest adapted one: below it forward alone, above it both ways."""
    d, inner, q, kv, vocabulary, n_nodes, n_scored = 24, 40, 4 * 8, 2 * 8, 264, 10, 3
    entry, rest = d * q + 2 * d * kv, q * d + 3 * d * inner
    below = 0 if prefix_read else 2 * (entry + rest) * n_nodes
    lowest = 2 * (entry + rest) * n_nodes + 2 * rest * n_nodes
    last = 4 * (2 * d * kv * n_nodes + (d * q + rest) * n_scored)
    by_hand = below + lowest + last + 4 * d * vocabulary * n_scored
    anatomy = Anatomy(make_model("llama"))
    assert necessary_flops(anatomy, 1, n_nodes, n_scored, prefix_read=prefix_read) == by_hand
    assert FlopCounter(anatomy, 1)(n_nodes, n_scored, prefix_read=prefix_read) == by_hand


def test_experts_are_not_counted(make_model):
    assert FlopCounter(Anatomy(make_model("mixtral")), 0)(10, 3, prefix_read=False) is None


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = CpuClock(0.0, 0.0, 0.0)

    def __call__(self) -> CpuClock:
        return self.now


def test_what_others_use(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("swlora.threads.time.monotonic", lambda: clock.now.wall_s)
    others = OthersShare(clock, n_cores=4)
    assert others.look() is None
    clock.now = CpuClock(0.4, 0.4, 0.8)
    assert others.look() is None  # too short a time
    clock.now = CpuClock(1.0, 1.5, 2.5)
    assert others.look() == 0.25
    clock.now = CpuClock(1.2, 1.5, 9.9)
    assert others.look() == 0.25
    clock.now = CpuClock(2.0, 4.0, 4.5)  # clocks that do not agree
    assert others.look() == 0.0


def test_no_memory_for_the_peak_does_not_end_a_training(monkeypatch, fresh_cache):
    asked: list[Any] = []

    def full(*how: Any) -> float:
        asked.append(how)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(matrix_peak, "matrix_flops", full)
    others: Any = SimpleNamespace(look=lambda: 0.0)
    pace = Pace(SimpleNamespace(work=Work()), torch.zeros(1), others)
    for _ in range(3):
        pace.begin()
        assert "peak_share" not in pace.of_step(15.0)
    assert len(asked) == 1


@pytest.mark.parametrize("in_the_way", ["", matrix_peak.PEAKS])
def test_a_peak_that_cannot_be_kept_is_measured_all_the_same(in_the_way, monkeypatch, fresh_cache):
    """Where the cache folder is none, or the file in it cannot be replaced."""
    if in_the_way:
        (fresh_cache / in_the_way).mkdir(parents=True)
    else:
        fresh_cache.write_text("a file")
    monkeypatch.setattr(matrix_peak, "matrix_flops", lambda *_: 1000.0)
    function = SimpleNamespace(work=Work())
    pace = Pace(function, torch.zeros(1), SimpleNamespace(look=lambda: 0.0))
    pace.begin()
    function.work.flops += 2e4
    assert pace.of_step(40.0)["peak_share"] == 0.5
    assert matrix_peak.known_peak(torch.float32) is None


def test_the_peak_is_measured_once_and_late(monkeypatch, fresh_cache):
    asked: list[Any] = []
    monkeypatch.setattr(matrix_peak, "matrix_flops", lambda *how: asked.append(how) or 1000.0)
    quiet = SimpleNamespace(look=lambda: 0.0)
    function = SimpleNamespace(work=Work())

    def stepped(pace: Pace, seconds: float) -> dict[str, Any]:
        pace.begin()
        function.work.n_nodes += 10
        function.work.n_tokens += 30
        function.work.flops += 4000.0
        return pace.of_step(seconds)

    busy = Pace(function, torch.zeros(1), SimpleNamespace(look=lambda: 0.5))
    assert "peak_share" not in stepped(busy, 1e3)  # a measurement would be too small
    pace = Pace(function, torch.zeros(1), quiet)
    found = stepped(pace, 10.0)
    assert found == {
        **{"busy_share": 0.0, "nodes": 10, "tokens": 30},
        **{"nodes_per_s": 1.0, "tokens_per_s": 3.0},
    }
    assert asked == []
    assert stepped(pace, 11.0)["peak_share"] == pytest.approx(4000 / 11 / 1000)
    assert stepped(pace, 8.0)["peak_share"] == 0.5
    assert stepped(Pace(function, torch.zeros(1), None), 4.0)["peak_share"] == 1.0  # it is kept
    assert len(asked) == 1
    other = Pace(function, torch.zeros(1, dtype=torch.bfloat16), quiet)
    assert "peak_share" not in stepped(other, 1.0)  # of another dtype


def test_a_peak_that_a_step_exceeds_was_disturbed_and_is_measured_again(monkeypatch, fresh_cache):
    rates = iter([100.0, 2000.0, 4000.0])
    monkeypatch.setattr(matrix_peak, "matrix_flops", lambda *_: next(rates))
    assert matrix_peak.measured_peak(torch.float32) == 100.0  # beside other programs, say
    function = SimpleNamespace(work=Work())
    pace = Pace(function, torch.zeros(1), SimpleNamespace(look=lambda: 0.0))
    shares = []
    for flops in (4e4, 4e4, 8e4, 4e4):  # in 40 s each
        pace.begin()
        function.work.flops += flops
        shares.append(pace.of_step(40.0).get("peak_share"))
    assert shares == [None, 0.5, 1.0, 0.5]
    assert matrix_peak.known_peak(torch.float32) == 2000.0


def test_a_step_function_without_work():
    pace = Pace(lambda _groups: None, torch.zeros(1), None)
    pace.begin()
    assert pace.of_step(1.0) == {}


def test_the_most_that_was_measured_counts(monkeypatch, fresh_cache):
    rates = iter([5.0, 3.0, 8.0])
    monkeypatch.setattr(matrix_peak, "matrix_flops", lambda *_: next(rates))
    assert matrix_peak.known_peak(torch.float32) is None
    assert [matrix_peak.measured_peak(torch.float32) for _ in range(3)] == [5.0, 5.0, 8.0]
    assert matrix_peak.known_peak(torch.float32) == 8.0
    (fresh_cache / matrix_peak.PEAKS).write_text("[")
    assert matrix_peak.known_peak(torch.float32) is None


def test_products_are_timed(monkeypatch):
    monkeypatch.setattr(matrix_peak, "N_CPU", 64)
    state = torch.get_rng_state()
    assert matrix_peak.matrix_flops(torch.float32, enough_s=0.001) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_means_are_by_seconds():
    rows = [
        {"elapsed_s": 1.0, "nodes_per_s": 10.0, "tokens_per_s": 20.0},
        {"elapsed_s": 4.0, "nodes_per_s": 20.0, "tokens_per_s": 20.0, "busy_share": 0.5},
    ]
    assert mean_pace(rows) == MeanPace(17.5, 20.0, None, 0.5)
    assert mean_pace([]) == MeanPace(None, None, None, None)
