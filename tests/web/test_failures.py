"""What fails ends its own requests only: the model is whole afterwards, and /ready knows of it."""

import hashlib
import pkgutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tests.support.adapters import move

from swlora.config import ModelSpec
from swlora.models.load import load_model
from swlora.models.module_tree import ModuleTree

GREEDY = {"prompt": "Hello there", "max_tokens": 20, "temperature": 0}
WIDE = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}


def ask(client, model: str = "tiny", **body):
    return client.post("/v1/completions", json={"model": model, **GREEDY} | body)


def text(client, model: str = "tiny", **body) -> str:
    response = ask(client, model, **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def digest(model) -> str:
    """sha256 of the base model's numbers, in the order of their names without adapters."""
    tensors = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    parts = [tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def save_plain(served_folder: Path, folder: Path, **settings) -> None:
    """An adapter saved by PEFT alone, with random numbers."""
    model = load_model(ModelSpec(name=str(served_folder), dtype="float32")).model
    model = peft.get_peft_model(model, LoraConfig(r=3, task_type="CAUSAL_LM", **settings))
    move((p for p in model.parameters() if p.requires_grad), 0.2, seed=5)
    model.save_pretrained(str(folder))


@pytest.fixture
def host(own_client):
    return own_client.app.app.state.service.scheduler._host


# Adapters of embeddings and head


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        WIDE,
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 5}},
    ],
)
def test_adapters_that_peft_saved_are_served_exactly(
    own_client, own_runs, served_folder, loaded, settings
):
    before = digest(loaded.model)
    alone = {name: text(own_client, name) for name in ("tiny", "second.run")}
    save_plain(served_folder, own_runs / "wide", **settings)
    model = load_model(ModelSpec(name=str(served_folder), dtype="float32")).model
    plain = peft.PeftModel.from_pretrained(model, str(own_runs / "wide")).eval()
    ids = list(b"Hello there")
    with torch.no_grad():
        while len(ids) < 31 and ids[-1] != 257:
            logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    expected = loaded.tokenizer.decode(ids[11:], skip_special_tokens=True)
    assert expected != alone["tiny"]
    assert text(own_client, "wide") == expected
    names = ["tiny", "wide", "second.run", "tiny", "wide"]
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(lambda name: text(own_client, name), names))
    assert together == [({"wide": expected} | alone)[name] for name in names]
    assert digest(loaded.model) == before
    assert own_client.get("/ready").status_code == 200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "it replaces whole modules (modules_to_save)"),
        ({"trainable_token_indices": [1]}, "it replaces embeddings of tokens"),
        ({"bias": "all"}, "it has biases of its own (bias)"),
        ({"init_lora_weights": "pissa"}, "its start changed the model's own weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "it repeats layers"),
    ],
)
def test_what_is_not_served_has_a_reason(own_client, own_runs, served_folder, settings, reason):
    save_plain(served_folder, own_runs / "other", target_modules=["q_proj"], **settings)
    described = own_client.get("/api/models").json()
    (entry,) = described["not_served"]
    assert entry["name"] == "other"
    assert reason in entry["reason"]
    assert "other" not in [adapter["name"] for adapter in described["adapters"]]
    refused = ask(own_client, "other")
    assert refused.status_code == 404
    assert f"not served, since {entry['reason']}" in refused.json()["error"]["message"]


def test_an_adapter_under_the_name_of_the_base_model_is_not_served(own_client, own_runs):
    base = own_client.get("/api/models").json()["base"]
    (own_runs / "second.run").rename(own_runs / base)
    described = own_client.get("/api/models").json()
    (entry,) = described["not_served"]
    assert entry["name"] == base and "rename it" in entry["reason"]
    assert base not in [adapter["name"] for adapter in described["adapters"]]
    assert ask(own_client, base).status_code == 200  # it is the base model


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_holds_what_is_no_number_is_refused(own_client, own_runs, served_folder):
    save_plain(served_folder, own_runs / "other", target_modules=["q_proj"])
    weights = own_runs / "other" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[sorted(tensors)[0]][0, 0] = torch.nan
    save_file(tensors, weights)
    refused = ask(own_client, "other").json()["error"]["message"]
    assert "it holds numbers that are not finite, 1 in base_model" in refused


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_brings_other_embeddings_is_refused(
    own_client, own_runs, served_folder, loaded
):
    """PEFT would write them into the model that everybody uses."""
    before, base = digest(loaded.model), text(own_client)
    save_plain(served_folder, own_runs / "wide", **WIDE)
    weights = own_runs / "wide" / "adapter_model.safetensors"
    tensors = load_file(weights)
    (brought,) = [name for name in tensors if "embed_tokens" in name and "lora" not in name]
    tensors[brought] = tensors[brought] + 1
    save_file(tensors, weights, {"format": "pt"})
    assert "brings other numbers for the model's own tensors" in ask(own_client, "wide").text
    hidden = "base_model.model.model.layers.0.mlp.down_proj.weight"
    del tensors[brought]
    save_file(tensors | {hidden: torch.zeros(64, 96)}, weights, {"format": "pt"})
    assert "brings other numbers for the model's own tensors" in ask(own_client, "wide").text
    assert text(own_client) == base
    assert digest(loaded.model) == before


# Failures inside the work


def failing(*_args, **_kwargs):
    raise RuntimeError("out of memory, say")


def test_a_failing_adapter_ends_its_own_requests_only(own_client, host, loaded, monkeypatch):
    before = digest(loaded.model)
    alone = {name: text(own_client, name, max_tokens=120) for name in ("tiny", "second.run")}
    text(own_client, "study/first")
    layer = loaded.model.model.layers[0].mlp.down_proj

    def fails_under_it(_module, _inputs):
        _, inner_name = host._loaded.get("study/first", (0, None))
        if layer.active_adapters == [inner_name] and not layer.disable_adapters:
            failing()

    handle = layer.register_forward_pre_hook(fails_under_it)
    with ThreadPoolExecutor(3) as pool:
        names = ["tiny", "study/first", "second.run"]
        answers = list(pool.map(lambda name: ask(own_client, name, max_tokens=120), names))
    handle.remove()
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert answers[1].json()["error"]["message"] == "the server failed; its log says why"
    for name, answer in zip(names, answers, strict=True):
        if name in alone:
            assert answer.json()["choices"][0]["text"] == alone[name]
    assert own_client.get("/ready").status_code == 200
    assert digest(loaded.model) == before
    assert text(own_client, "study/first") not in alone.values()


@pytest.mark.parametrize(
    ("place", "n_good"),
    [
        ("peft.tuners.lora.Linear.set_adapter", 2),
        ("peft.PeftModelForCausalLM.load_adapter", 0),
        ("peft.tuners.lora.Linear.update_layer", 2),
        ("peft.tuners.lora.Linear.enable_adapters", 2),
        ("swlora.web.variants.BatchDecoder.__init__", 0),
        ("swlora.web.variants.BatchDecoder.__init__", 1),
        ("swlora.web.variants.ModelHost.switched", 2),
        ("swlora.web.variants.BatchDecoder.admit", 2),
        ("swlora.decoding.batch.BatchDecoder.step", 2),
    ],
)
def test_a_failure_anywhere_on_the_way_leaves_the_model_whole(
    own_client, loaded, monkeypatch, place, n_good
):
    """Every call after the first ones fails for a while: switching may stop half-way."""
    base, before = text(own_client), digest(loaded.model)
    expected = text(own_client, "second.run")
    text(own_client)
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    own, n_calls = getattr(owner, name), [0]

    def fails_later(*args, **kwargs):
        n_calls[0] += 1
        return failing() if n_calls[0] > n_good else own(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails_later)
    answers = [ask(own_client, model) for model in ("study/first", "second.run", "study/first")]
    monkeypatch.setattr(owner, name, own)
    assert n_calls[0] > n_good
    assert {answer.status_code for answer in answers} <= {200, 400, 500, 503}
    assert any(answer.status_code != 200 for answer in answers)
    _until_ready(own_client)
    assert text(own_client) == base
    assert text(own_client, "second.run") == expected
    assert digest(loaded.model) == before


def _until_ready(client) -> None:
    start_s = time.monotonic()
    while client.get("/ready").status_code != 200:
        assert time.monotonic() - start_s < 10
        time.sleep(0.02)


def test_a_model_that_does_not_come_back_is_not_ready(own_client, loaded, until):
    """One that is damaged for good takes nothing on; one that comes back is ready again."""
    base = text(own_client)
    handle = loaded.model.model.norm.register_forward_pre_hook(failing)
    loaded.model.model.norm.__dict__["forward"] = failing  # also where hooks are taken away
    weight = loaded.model.model.embed_tokens.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
    assert ask(own_client).status_code == 500
    until(lambda: own_client.get("/ready").status_code == 503)
    assert "does not answer as it did" in own_client.get("/ready").json()["error"]["message"]
    assert ask(own_client).status_code == 503
    assert own_client.get("/health").status_code == 200
    with torch.no_grad():
        weight.copy_(kept)
    until(lambda: own_client.get("/ready").status_code == 200)
    assert text(own_client) == base
    handle.remove()


def test_a_failing_sweep_is_no_end_of_the_thread(own_client, monkeypatch, until):
    from swlora.decoding.batch import BatchDecoder

    base = text(own_client)
    own = BatchDecoder.drop
    monkeypatch.setattr(BatchDecoder, "drop", failing)
    body = {"model": "tiny", **GREEDY, "max_tokens": 400, "stop": ["e", "a", "o", " "]}
    own_client.post("/v1/completions", json=body)  # the text stops before the model does
    monkeypatch.setattr(BatchDecoder, "drop", own)
    scheduler = own_client.app.app.state.service.scheduler
    until(lambda: scheduler.n_active == 0)
    assert text(own_client) == base


def test_a_module_tree_is_put_together_again(make_model):
    model = make_model("llama")
    names = [name for name, _ in model.named_modules()]
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    tree = ModuleTree(model)
    wrapped = peft.get_peft_model(model, LoraConfig(init_lora_weights=False, **WIDE))
    model.model.norm.forward = failing
    model.model.layers[0].register_forward_hook(failing)
    assert wrapped.get_base_model() is model
    tree.restore()
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(ids).logits, expected)
    assert not hasattr(model, "peft_config")
