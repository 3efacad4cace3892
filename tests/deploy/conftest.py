"""The Hub in memory, and folders that can be published."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from tests.cli.conftest import rows, small, swlora
from tests.support.adapters import attach, randomise
from tests.support.hub_stand_in import TOKEN, HubStandIn

from swlora import hub
from swlora.adapters.saved import save_adapter
from swlora.config import AdapterSpec

__all__ = ["rows", "small", "swlora"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """A Hub of this test alone, with a login; without Xet, whose client has its own network."""
    for name in hub.OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between tries
    hub.hub_reachable.cache_clear()
    there = HubStandIn()
    huggingface_hub.set_client_factory(there.client)
    yield there
    huggingface_hub.set_client_factory(_http.default_client_factory)
    hub.hub_reachable.cache_clear()


@pytest.fixture
def adapter(make_model, tiny_tokenizer, tmp_path) -> Path:
    """The folder of an adapter with swlora's own card."""
    peft_model = attach(make_model("llama"), AdapterSpec(rank=2), [0, 2], seed=1)
    randomise(peft_model, 0.1)
    facts = {"base_model": "mary/tiny", "base_on_hub": True, "base_revision": "a" * 40}
    facts |= {"base_read_from": "the Hugging Face Hub", "base_weights_sample_sha256": "b" * 64}
    facts |= {"layers": [0, 2], "layer_policy": "0,2", "method": "lora", "targets": ["all-linear"]}
    save_adapter(peft_model, tmp_path / "adapter", facts, tiny_tokenizer)
    return tmp_path / "adapter"


@pytest.fixture
def merged(make_model, tiny_tokenizer, tmp_path) -> Path:
    """A plain model in several shards."""
    folder = tmp_path / "merged"
    make_model("llama").save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    return folder
