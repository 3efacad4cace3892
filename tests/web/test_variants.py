"""One model under many variants at once: nobody's text is touched by another's variant."""

import hashlib
import json
import os
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from swlora.adapters.saved import load_adapter
from swlora.config import ModelSpec
from swlora.kernels.linear import packed_weight
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.models.load import load_model

ZEROED_ID = "1:mlp.down_proj:7:11"
PROMPTS = ["Hello there", "x", "A longer prompt than the others, " * 3]


def digests(model) -> dict[str, str]:
    """sha256 of every weight of the base model, by the name it has without adapters."""
    return {
        name.replace(".base_layer", ""): hashlib.sha256(tensor.contiguous().numpy()).hexdigest()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def side(client, model: str, zeroed: bool, prompt: str, **body) -> str:
    """The text of one side of the page."""
    sides = [{"model": model, "zeroed": [ZEROED_ID] if zeroed else []}]
    return beside(client, sides, prompt, **body)[0]


def beside(client, sides: list[dict], prompt: str, **body) -> list[str]:
    """The texts of all sides."""
    asked = {"prompt": prompt, "sides": sides, "max_tokens": 40, "temperature": 0} | body
    response = client.post("/api/generate", json=asked)
    assert response.status_code == 200, response.text
    texts = [""] * len(sides)
    for line in response.text.split("\n"):
        if line.startswith("data: ") and line != "data: {}":
            news = json.loads(line.removeprefix("data: "))
            texts[news["side"]] += news["text"]
            assert "end" not in news or news["end"]["error"] is None
    return texts


VARIANTS = [(m, z) for m in ("tiny", "second.run", "study/first") for z in (False, True)]


@torch.no_grad()
def greedy(model, ids: list[int], n: int) -> list[int]:
    """The plainest greedy decoding there is."""
    ids = list(ids)
    start = len(ids)
    while len(ids) < start + n and ids[-1] != 257:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize(("name", "zeroed"), VARIANTS)
def test_a_variant_is_the_model_with_that_adapter_and_that_weight_at_zero(
    client, loaded, served_folder, runs, name, zeroed
):
    model = load_model(ModelSpec(name=str(served_folder), dtype="float32")).model
    if zeroed:
        Anatomy(model).weight_view(WeightAddress(1, "mlp.down_proj", 7, 11)).zero_()
    separator = ""
    if name != "tiny":
        model, separator = load_adapter(model, runs / name / "adapter"), "\n"
    ids = list((PROMPTS[0] + separator).encode())
    expected = loaded.tokenizer.decode(greedy(model, ids, 40), skip_special_tokens=True)
    assert side(client, name, zeroed, PROMPTS[0]) == expected


def test_all_variants_at_once_say_what_each_says_alone(client, loaded):
    before = digests(loaded.model)
    asked = [(*variant, prompt) for variant in VARIANTS for prompt in PROMPTS]
    alone = [side(client, *what) for what in asked]
    assert len(set(alone)) == len(asked)  # the weight and the adapters matter in every case
    for _ in range(2):
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(lambda what: side(client, *what), asked))
        assert together == alone
    assert digests(loaded.model) == before


def test_two_sides_are_streamed_beside_each_other(client):
    sides = [{"model": "tiny"}, {"model": "tiny", "zeroed": [ZEROED_ID]}]
    intact, broken = beside(client, sides, PROMPTS[0])
    assert intact != broken
    assert intact == side(client, "tiny", False, PROMPTS[0])
    assert broken == side(client, "tiny", True, PROMPTS[0])
    body = {"prompt": "Hello", "sides": sides, "max_tokens": 30, "temperature": 0}
    lines = client.post("/api/generate", json=body).text.split("\n")
    news = [json.loads(line[6:]) for line in lines if line.startswith('data: {"')]
    order = [entry["side"] for entry in news]
    assert sum(a != b for a, b in pairwise(order)) > 10  # not one by one


def test_a_text_that_began_intact_stays_so_when_a_broken_one_joins(client):
    alone = side(client, "tiny", False, PROMPTS[2], max_tokens=200)
    with ThreadPoolExecutor(4) as pool:
        intact = pool.submit(side, client, "tiny", False, PROMPTS[2], max_tokens=200)
        others = [pool.submit(side, client, "tiny", True, p, max_tokens=20) for p in PROMPTS]
        assert intact.result() == alone
        assert all(other.result() for other in others)


def test_adapters_that_are_loaded_leave_running_texts_alone(make, browse, served_folder):
    """Loading wraps the modules of the model that is at work."""
    names = ["tiny", "second.run", "study/first"]

    def write(client, name: str) -> str:
        return side(client, name, False, PROMPTS[2], max_tokens=200)

    with browse(make()) as client:
        alone = {name: write(client, name) for name in names}
    fresh = load_model(ModelSpec(name=str(served_folder), dtype="float32"))
    with browse(make(model=fresh)) as client, ThreadPoolExecutor(3) as pool:
        running = {}
        for name in names:  # each begins in the middle of those before
            running[name] = pool.submit(write, client, name)
            time.sleep(0.1)
        assert {name: text.result() for name, text in running.items()} == alone


def test_only_offered_weights_can_be_switched_off(client, loaded):
    for weight in ("1:mlp.down_proj:7:12", "0:mlp.down_proj:0:0", "../../etc/passwd", "1"):
        sides = [{"model": "tiny", "zeroed": [weight]}]
        response = client.post("/api/generate", json={"prompt": "Hi", "sides": sides})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "zeroed"


# Adapters on disk


def completion(client, model: str) -> str:
    body = {"model": model, "prompt": "Hello there", "max_tokens": 20, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    return response.json()["choices"][0]["text"] if response.status_code == 200 else response.text


def test_an_adapter_that_is_replaced_is_loaded_again(own_client, own_runs):
    before = {name: completion(own_client, name) for name in ("second.run", "study/first")}
    shutil.rmtree(own_runs / "second.run" / "adapter")
    shutil.copytree(own_runs / "study/first/adapter", own_runs / "second.run/adapter")
    (own_runs / "second.run/adapter/adapter_model.safetensors").touch()
    assert completion(own_client, "second.run") == before["study/first"] != before["second.run"]


def test_an_adapter_of_other_weights_is_served_and_logged(own_client, own_runs, caplog):
    """The log is the person's who serves; the shapes fit, so the texts are somebody's wish."""
    completion(own_client, "study/first")
    assert not [r for r in caplog.records if "was trained on" in r.getMessage()]
    facts = own_runs / "second.run" / "adapter" / "swlora.json"
    noted = {"base_model": "x/y", "base_read_from": "z", "base_weights_sample_sha256": "0" * 64}
    facts.write_text(json.dumps(json.loads(facts.read_text()) | noted | {"sha256": {}}))
    for _ in range(2):
        assert completion(own_client, "second.run")
    (record,) = [r for r in caplog.records if "was trained on" in r.getMessage()]
    assert "trained on x/y, read from z (sample of its weights: 0000" in record.getMessage()


def test_an_adapter_that_goes_is_not_offered_and_a_new_one_is(own_client, own_runs, loaded):
    completion(own_client, "second.run")
    (own_runs / "second.run").rename(own_runs / "renamed")
    assert "no such model" in completion(own_client, "second.run")
    assert completion(own_client, "renamed") != completion(own_client, "tiny")


def test_few_adapters_are_in_memory_at_a_time(own_client, own_runs, loaded, monkeypatch):
    monkeypatch.setattr("swlora.web.variants.MAX_LOADED", 2)
    before = digests(loaded.model)
    expected = completion(own_client, "second.run")
    base = completion(own_client, "tiny")
    for i in range(5):
        shutil.copytree(own_runs / "second.run", own_runs / f"copy{i}")
    for _ in range(2):
        for i in range(5):
            assert completion(own_client, f"copy{i}") == expected
            assert completion(own_client, "tiny") == base
    n_loaded = sum("lora_A" in name for name, _ in loaded.model.named_parameters())
    assert n_loaded == 2 * 7  # two adapters of one layer with seven projections
    assert digests(loaded.model) == before


def test_copies_of_weights_outlive_the_adapters_that_come_and_go(
    own_client, own_runs, loaded, monkeypatch
):
    monkeypatch.setattr("swlora.web.variants.MAX_LOADED", 1)
    head = loaded.model.get_output_embeddings()
    completion(own_client, "tiny")
    copy = weakref.ref(packed_weight._HELD[False, (id(head),)])
    packed = copy().tensor()
    for name in ("second.run", "study/first", "tiny", "second.run"):
        assert completion(own_client, name)
        assert copy().tensor() is packed


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "ADALORA"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"r": "many"},
    ],
)
def test_what_would_change_the_base_model_is_not_offered(own_client, own_runs, changes):
    change_config(own_runs / "second.run", **changes)
    assert "no such model" in completion(own_client, "second.run")


@pytest.mark.parametrize("damage", ["rank", "target", "torn"])
def test_an_adapter_that_does_not_fit_is_a_refusal_and_no_harm(
    own_client, own_runs, loaded, damage
):
    before = digests(loaded.model)
    base = completion(own_client, "tiny")
    if damage == "rank":
        change_config(own_runs / "second.run", r=5)
    elif damage == "target":
        change_config(own_runs / "second.run", target_modules=["c_attn"])
    else:
        weights = own_runs / "second.run/adapter/adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    said = completion(own_client, "second.run")
    assert "does not fit the model" in said
    assert str(own_runs) not in said
    assert completion(own_client, "tiny") == base
    assert completion(own_client, "study/first") != base
    assert digests(loaded.model) == before


def test_an_adapter_of_chats_in_another_template_is_refused(own_client, own_runs, tiny_tokenizer):
    """The server writes chats by its model's own, which would be other tokens."""
    folder = own_runs / "second.run/adapter"
    facts = json.loads((folder / "swlora.json").read_text())
    facts |= {"is_chat": True, "separator": ""}
    del facts["sha256"]
    (folder / "swlora.json").write_text(json.dumps(facts))
    tiny_tokenizer.save_pretrained(folder)
    assert "does not fit" not in completion(own_client, "second.run")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    later_s = time.time() + 10
    os.utime(folder / "adapter_model.safetensors", (later_s, later_s))  # as if saved again
    said = completion(own_client, "second.run")
    assert "a tokenizer of another chat template" in said and "--tokenizer" in said
    assert str(own_runs) not in said
