"""The weights that may be switched off: found in this very model, and restored bit for bit."""

import json

import pytest
import torch
from tests.support.adapters import attach

from swlora.config import AdapterSpec
from swlora.files import write_json
from swlora.models.anatomy import WeightAddress
from swlora.web.folders import RunFolders
from swlora.web.weights import ServedWeights, weight_id


def served(model, root, name="some/model") -> ServedWeights:
    return ServedWeights(model, name, RunFolders(root))


def note_finding(root, address, value, **more) -> None:
    folder = root / f"run-{weight_id(address).replace(':', '-')}"
    write_json(folder / "run.json", {"status": "done", "command": "identify"})
    candidate = {**vars(address), "weight": value, **more}
    write_json(folder / "result.json", {"identify": {"candidates": [candidate]}})


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_right_scalar_is_switched_off_under_an_adapter(model_type, make_model, tmp_path):
    """GPT-2 stores [in, out]; a wrapper put around it later hides that."""
    model = make_model(model_type)
    module = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj"}[model_type]
    address = WeightAddress(1, module, 5, 33)  # in >= 24 > out: nothing lies there transposed
    weights = served(model, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, AdapterSpec(rank=2), [0, 1, 2], seed=0)
    with weights.switched_off([address]):
        now = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
        changed = {n: (now[n] != t).nonzero().tolist() for n, t in before.items()}
        place = [33, 5] if model_type == "gpt2" else [5, 33]
        found = {name: places for name, places in changed.items() if places}
        assert [places for places in found.values()] == [[place]]
        assert module in next(iter(found))
    now = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_a_finding_of_another_model_is_not_offered(make_model, tmp_path):
    model = make_model("llama")
    weights = served(model, tmp_path)
    here, elsewhere, outside = (WeightAddress(1, "mlp.down_proj", 7, k) for k in (3, 4, 4000))
    value = float(weights.weight_view(here))
    note_finding(tmp_path, here, value * 1.002, ratio=3.0, verdict="strong")  # bf16 rounds
    note_finding(tmp_path, elsewhere, value)
    note_finding(tmp_path, outside, value)
    (offered,) = weights.offered().values()
    assert offered.address == here
    assert offered.public() == {
        "id": "1:mlp.down_proj:7:3",
        **vars(here),
        "weight": value,
        "ratio": 3.0,
        "verdict": "strong",
        "source": "run run-1-mlp.down_proj-7-3",
        "run": "run-1-mlp.down_proj-7-3",
    }


def test_a_weight_that_is_off_just_now_is_still_offered(make_model, tmp_path):
    weights = served(make_model("llama"), tmp_path)
    address = WeightAddress(0, "mlp.up_proj", 9, 1)
    note_finding(tmp_path, address, float(weights.weight_view(address)))
    before = weights.offered()
    assert list(before) == ["0:mlp.up_proj:9:1"]
    with weights.switched_off([address]):
        assert weights.offered() == before


def test_the_best_proof_comes_first(make_model, tmp_path):
    weights = served(make_model("llama"), tmp_path)
    addresses = [WeightAddress(layer, "mlp.down_proj", 2, 2) for layer in range(3)]
    for address, ratio in zip(addresses, (1.0, 40.0, 3.0), strict=True):
        note_finding(tmp_path, address, float(weights.weight_view(address)), ratio=ratio)
    assert [w.ratio for w in weights.offered().values()] == [40.0, 3.0, 1.0]


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "{}",
        '{"identify": 3}',
        '{"identify": {"candidates": 3}}',
        '{"identify": {"candidates": [3, {}, {"layer": "x"}, {"layer": null}]}}',
        json.dumps({"identify": {"candidates": [{"layer": 10**400}]}}),
    ],
)
def test_a_damaged_finding_is_no_finding(make_model, tmp_path, content):
    write_json(tmp_path / "run/run.json", {"status": "done", "command": "identify"})
    (tmp_path / "run/result.json").write_text(content)
    assert served(make_model("llama"), tmp_path).offered() == {}


def test_published_weights_are_offered_where_the_model_has_them(make_model, tmp_path, monkeypatch):
    from swlora.superweights.known import KnownWeight

    address = WeightAddress(2, "mlp.down_proj", 1, 2)
    published = [
        KnownWeight(address, ("a paper",)),
        KnownWeight(WeightAddress(2, "mlp.down_proj", 3, 4), ("a paper",), misprint="typo"),
    ]
    monkeypatch.setattr("swlora.web.weights.known_weights", lambda _: published)
    (offered,) = served(make_model("llama"), tmp_path).offered().values()
    assert (offered.address, offered.source, offered.ratio) == (address, "a paper", None)


def test_the_finding_in_the_embedded_model_is_offered_for_it_alone(
    make_model, tmp_path, monkeypatch
):
    model, address = make_model("llama"), WeightAddress(1, "mlp.down_proj", 5, 7)
    value = float(served(model, tmp_path).weight_view(address))
    finding = {**vars(address), "weight": value}
    monkeypatch.setattr("swlora.web.weights.BUILTIN_FINDING", finding)
    monkeypatch.setattr("swlora.web.weights.unpacked_folder", lambda: tmp_path / "builtin")
    (found,) = served(model, tmp_path, str(tmp_path / "builtin")).offered().values()
    assert (found.address, found.source) == (address, "swlora identify --model builtin")
    assert served(model, tmp_path, "another/model").offered() == {}


def test_the_finding_in_the_embedded_model_is_there(builtin_dir, tmp_path):
    from safetensors import safe_open

    from swlora.web.weights import BUILTIN_FINDING

    with safe_open(builtin_dir / "model.safetensors", "pt") as file:
        weight = file.get_slice("model.layers.11.mlp.down_proj.weight")
        value = float(weight[507:508, 1229:1230])
    assert value == pytest.approx(BUILTIN_FINDING["weight"], rel=1e-3)
