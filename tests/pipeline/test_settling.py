"""The learning rate of a training that is given none: of its method and layers, kept for later."""

from typing import get_args

import pytest
from tests.support.small_runs import Heard
from tests.support.whole_jobs import StopsIn, make_spec, resume, same_adapters

from swlora import pipeline
from swlora.config import MethodName, RunSpec, default_rate, load_spec
from swlora.config.rates import DEFAULT_RATE, RATES
from swlora.job import Job
from swlora.progress import Silent
from swlora.run_record import MemoryRecord
from swlora.runs import Run
from swlora.settling import settle

pytestmark = pytest.mark.usefixtures("no_drawings")
N_LAYERS = 3  # of the small models


def settled(model, rows, *, rate=None, **changes):
    spec = make_spec(model, rows, **changes)
    tree = spec.model_dump(mode="json", exclude_unset=True)
    del tree["train"]["learning_rate"]
    if rate is not None:
        tree["train"]["learning_rate"] = rate
    heard = Heard()
    job = Job(RunSpec.model_validate(tree), MemoryRecord(), heard)
    settle(job)
    return job.spec, [line for line in heard.lines if not line.startswith("model: ")]


@pytest.mark.parametrize(
    ("method", "n_adapted", "expected"),
    [
        ("lora", 30, 1e-3),
        ("dora", 30, 1e-3),
        ("lora", 1, 5e-3),  # 1e-3 * sqrt(30) = 5.48e-3
        ("lora", 4, 3e-3),
        ("lora", 15, 1e-3),  # 1.41e-3
        ("full", 30, 5e-5),
        ("full", 1, 3e-4),
        ("pissa", 4, 8e-4),
    ],
)
def test_rates_by_hand(method, n_adapted, expected):
    assert default_rate(method, n_adapted=n_adapted, n_layers=30) == expected


def test_every_rate_is_that_of_a_method():
    assert set(RATES) < set(get_args(MethodName))
    assert all(0 < rate != DEFAULT_RATE for rate in RATES.values())


@pytest.mark.parametrize("method", get_args(MethodName))
def test_a_method_has_its_rate_unless_one_is_given(model_folder, rows, method):
    model = model_folder("llama")
    spec, lines = settled(model, rows, method=method)
    expected = RATES.get(method, DEFAULT_RATE)
    assert spec.train.learning_rate == expected
    said = f"learning rate {expected:g}, for {method} in all layers (--learning-rate sets another)"
    assert lines == ([said] if method in RATES else [])
    given, lines = settled(model, rows, method=method, rate=DEFAULT_RATE)
    assert given.train.learning_rate == DEFAULT_RATE and not lines


@pytest.mark.parametrize(
    ("layers", "n_adapted"),
    [("last:1", 1), ("0,2", 2), ("every:3", 3), ("super", 1), ("auto:0.5", N_LAYERS)],
)
def test_few_layers_have_a_higher_one(model_folder, rows, layers, n_adapted):
    spec, lines = settled(model_folder("llama"), rows, adapter__layers=layers)
    rate = default_rate("lora", n_adapted=n_adapted, n_layers=N_LAYERS)
    assert spec.train.learning_rate == rate
    assert [f"for lora in {n_adapted} of 3 layers" in line for line in lines] == (
        [True] if rate != DEFAULT_RATE else []
    )


def test_a_run_goes_on_with_the_rate_that_it_chose(model_folder, rows, tmp_path, monkeypatch):
    tree = make_spec(model_folder("llama"), rows).model_dump(mode="json", exclude_unset=True)
    del tree["train"]["learning_rate"]
    tree |= {"adapter": {"method": "pissa", "layers": "last:1"}}
    spec = RunSpec.model_validate(tree)

    def train(name, progress):
        with Run.prepare(tmp_path / name, spec, "train") as run:
            pipeline.train(Job(spec, run, progress))

    train("whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        train("stopped", StopsIn("train", 3))
    monkeypatch.setitem(RATES, "pissa", 0.5)  # as another version might have it
    resume(tmp_path / "stopped")
    for name in ("whole", "stopped"):
        written = load_spec(tmp_path / name / "config.yaml", {}).train.learning_rate
        assert written == pytest.approx(5e-4)
    assert same_adapters(tmp_path / "whole", tmp_path / "stopped")
