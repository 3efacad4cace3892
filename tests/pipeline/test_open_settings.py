"""The learning rate of a training that is given none: of its method and layers, kept for later."""

import json
from types import SimpleNamespace
from typing import get_args

import pytest
from tests.support.small_runs import Heard
from tests.support.whole_jobs import StopsIn, make_spec, resume, run_in, same_adapters

from swlora import pipeline
from swlora.config import AdapterSpec, MethodName, RunSpec, default_rate, dump_yaml, load_spec
from swlora.config.rates import DEFAULT_RATE, RATES
from swlora.job import Job
from swlora.open_settings import settle
from swlora.progress import Silent
from swlora.run_record import MemoryRecord
from swlora.runs import Run, read_run

pytestmark = pytest.mark.usefixtures("no_drawings")


def open_spec(model, rows, **changes):
    """Settings without a learning rate, for a model of three layers."""
    return make_spec(model, rows, **changes, train__learning_rate=None)


def settled(spec):
    """Return the settings that a training has, and what it says of them."""
    job = Job(spec, MemoryRecord(), Silent())
    lines = settle(job)
    return job.spec, lines


@pytest.mark.parametrize(
    ("adapter", "n_adapted", "expected"),
    [
        ({}, 30, 1e-3),
        ({}, 29, 1.0e-3),  # 1.017e-3
        ({}, 15, 1.4e-3),
        ({}, 4, 2.7e-3),
        ({}, 1, 5.5e-3),  # 1e-3 * sqrt(30) = 5.477e-3
        ({"method": "dora"}, 30, 1e-3),
        ({"method": "full"}, 30, 5e-5),
        ({"method": "full"}, 1, 2.7e-4),
        ({"method": "pissa"}, 4, 8.2e-4),
        ({"method": "lora+"}, 30, 5e-5),
        ({"method": "lora+", "lora_plus_ratio": 1}, 30, 8e-4),  # B's is 8e-4 with every ratio
        ({"method": "lora+", "lora_plus_ratio": 4}, 30, 2e-4),
    ],
)
def test_rates_by_hand(adapter, n_adapted, expected):
    assert default_rate(AdapterSpec(**adapter), n_adapted=n_adapted, n_layers=30) == expected


def test_every_rate_is_that_of_a_method():
    assert set(RATES) < set(get_args(MethodName))


@pytest.mark.parametrize("method", get_args(MethodName))
def test_a_method_has_its_rate_unless_one_is_given(model_folder, rows, method):
    model = model_folder("llama")
    layers = {"adapter__layers": "all"}
    spec, lines = settled(open_spec(model, rows, method=method, **layers))
    expected = RATES.get(method, DEFAULT_RATE)
    assert spec.train.learning_rate == expected
    said = f"learning rate {expected:g}, for {method} in all layers (--learning-rate sets another)"
    assert lines == ([said] if method in RATES else [])
    rate = {"train__learning_rate": DEFAULT_RATE}  # as given as any other
    given, lines = settled(make_spec(model, rows, method=method, **layers, **rate))
    assert given.train.learning_rate == DEFAULT_RATE
    far = f"learning rate 0.001 is far above 5e-05, the default of {method} in all layers"
    assert lines == ([far] if method in ("full", "lora+") else [])


@pytest.mark.parametrize(
    ("rate", "layers", "said"),
    [
        (1e-4, "all", "learning rate 0.0001 is far below 0.001, the default of lora in all layers"),
        (1.1e-4, "all", None),
        (9e-3, "all", None),
        (1.6e-4, "0", "learning rate 0.00016 is far below 0.0017, the default of lora in 1 of 3"),
        (0.01, "0", None),
    ],
)
def test_a_given_rate_that_is_far_off_is_kept_and_said(model_folder, rows, rate, layers, said):
    settings = {"adapter__layers": layers, "train__learning_rate": rate}
    spec, lines = settled(make_spec(model_folder("llama"), rows, **settings))
    assert spec.train.learning_rate == rate
    assert [line.startswith(said or "-") for line in lines] == ([True] if said else [])


@pytest.mark.parametrize(
    ("layers", "n_adapted", "expected"),
    [
        ("2", 1, 1.7e-3),
        ("last:2", 2, 1.2e-3),
        ("0,2", 2, 1.2e-3),
        ("every:3", 3, 1e-3),
    ],
)
def test_few_layers_have_a_higher_one(model_folder, rows, layers, n_adapted, expected):
    spec, lines = settled(open_spec(model_folder("llama"), rows, adapter__layers=layers))
    assert spec.train.learning_rate == expected
    said = f"learning rate {expected:g}, for lora in {n_adapted} of 3 layers (--learning-rate sets"
    assert lines == ([f"{said} another)"] if expected != DEFAULT_RATE else [])


@pytest.mark.parametrize("layers", ["super", "super+removal", "auto:0.5"])
def test_layers_that_are_searched_for_have_none_yet(model_folder, rows, layers):
    spec, lines = settled(open_spec(model_folder("llama"), rows, adapter__layers=layers))
    assert (spec.train.learning_rate, lines) == (None, [])


@pytest.fixture
def found_layers(monkeypatch):
    """A function (layers): a search for super weights finds these, of which some repair."""

    def find(*layers):
        found = SimpleNamespace(layers=list(layers), removal_layers=list(layers))
        monkeypatch.setattr(pipeline, "identify", lambda _job: found)

    return find


@pytest.mark.parametrize(
    ("policy", "layers", "rate"),
    [("super", [1], 1.7e-3), ("super", [0, 2], 1.2e-3), ("super+removal", [1], 1.7e-3)],
)
def test_layers_that_are_found_have_the_rate_of_as_many(
    model_folder, rows, tmp_path, monkeypatch, found_layers, policy, layers, rate
):
    """It is what the same layers come to when they are named, also stopped and gone on with."""
    found_layers(*layers)
    model = model_folder("llama")
    searched = open_spec(model, rows, adapter__layers=policy)
    named = open_spec(model, rows, adapter__layers=",".join(map(str, layers)))
    for name, spec in (("searched", searched), ("named", named)):
        with Run.prepare(tmp_path / name, spec, "train") as run:
            pipeline.train(Job(spec, run, heard := Heard()))
        said = f"learning rate {rate:g}, for lora in {len(layers)} of 3 layers (--learning-rate"
        assert sum(line.startswith(said) for line in heard.lines) == 1
        assert run.read_result()["train"]["learning_rate"] == rate
    assert same_adapters(tmp_path / "searched", tmp_path / "named")
    for n, name in ((1, "before"), (3, "within")):  # the first step, or the third
        with pytest.raises(KeyboardInterrupt):
            run_in(tmp_path / name, searched, "train", StopsIn("train", n))
        with monkeypatch.context() as another:
            another.setitem(RATES, "lora", 0.5)  # as another version might have it
            resume(tmp_path / name)
        assert read_run(tmp_path / name)["fitted"]["learning_rate"] == rate
        assert load_spec(tmp_path / name / "config.yaml", {}).train.learning_rate is None
        assert same_adapters(tmp_path / name, tmp_path / "named")


@pytest.mark.parametrize("command", ["train", "train-eval"])
def test_a_given_rate_of_found_layers_is_kept_and_said_once_where_far(
    model_folder, rows, tmp_path, found_layers, command
):
    found_layers(1)
    spec = make_spec(model_folder("llama"), rows, adapter__layers="super")
    run_in(tmp_path / "run", spec, command, heard := Heard())
    far = "learning rate 0.02 is far above 0.0017, the default of lora in 1 of 3 layers"
    assert heard.lines.count(far) == 1
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["train"]["learning_rate"] == 0.02
    assert "learning_rate" not in read_run(tmp_path / "run")["fitted"]


def test_null_in_a_file_leaves_it_open_and_a_run_writes_what_it_became(
    model_folder, rows, tmp_path
):
    (tmp_path / "c.yaml").write_text(dump_yaml(open_spec(model_folder("llama"), rows)))
    assert load_spec(tmp_path / "c.yaml", {}).train.learning_rate is None
    (tmp_path / "settled.yaml").write_text(
        dump_yaml(settled(load_spec(tmp_path / "c.yaml", {}))[0])
    )
    assert load_spec(tmp_path / "settled.yaml", {}).train.learning_rate == DEFAULT_RATE


def test_a_run_goes_on_with_the_rate_that_it_chose(model_folder, rows, tmp_path, monkeypatch):
    tree = make_spec(model_folder("llama"), rows).model_dump(mode="json", exclude_unset=True)
    del tree["train"]["learning_rate"]
    tree |= {"adapter": {"method": "pissa", "layers": "last:1"}}
    spec = RunSpec.model_validate(tree)

    def train(name, progress):
        with Run.prepare(tmp_path / name, spec, "train") as run:
            pipeline.train(Job(spec, run, progress))

    train("whole", heard := Heard())
    assert sum("learning rate 0.00052, for pissa in 1 of 3" in line for line in heard.lines) == 1
    with pytest.raises(KeyboardInterrupt):
        train("stopped", StopsIn("train", 3))
    monkeypatch.setitem(RATES, "pissa", 0.5)  # as another version might have it
    resume(tmp_path / "stopped")
    for name in ("whole", "stopped"):
        written = load_spec(tmp_path / name / "config.yaml", {}).train.learning_rate
        assert written == 5.2e-4  # 3e-4 * sqrt(3)
    assert same_adapters(tmp_path / "whole", tmp_path / "stopped")
