"""Models and adapters in the Hub's cache, where every file is a link: each command reads them."""

import json
from pathlib import Path

import gguf
import pytest
from tests.deploy.test_merge import adapter_of, assert_is_base_and_adapter, merged_from, refusal
from tests.support.gguf_files import write_gguf
from tests.support.gguf_models import save_tiny
from tests.support.hub_cache import COMMIT, into_hub_cache, use_hub_cache
from tests.support.llama_cpp import require_llama_cpp

from swlora.config import ModelSpec
from swlora.deploy import gguf_export, merged_folder
from swlora.deploy.gguf_export import ExportRequest
from swlora.deploy.merge_report import MERGE_REPORT
from swlora.errors import UserError
from swlora.models.identity import name_elsewhere
from swlora.progress import Silent
from swlora.web.service import public_name

PROMPT = ("--prompt", "p0", "--max-new-tokens", 4, "--temperature", 0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_hub_cache(monkeypatch, tmp_path / "hub")
    return tmp_path / "hub"


def test_a_model_is_trained_merged_exported_and_run_from_the_cache(swlora, rows, cache, tmp_path):
    """The base by its id, then the adapter and the merged model from folders of the cache too."""
    require_llama_cpp()
    save_tiny("llama", tmp_path / "model")
    into_hub_cache(tmp_path / "model", cache, "some/model")
    steps = ("--rank", 2, "--max-steps", 2, "--batch-size", 3, "--learning-rate", 0.05)
    run = ("--dtype", "float32", "--dataset", rows, *steps, "--output", "run")
    assert swlora("train", "--model", "some/model", *run).code == 0
    adapter = into_hub_cache(tmp_path / "run/adapter", cache, "some/adapter")

    assert swlora("merge", "--adapter", adapter, "--output", "merged").code == 0
    assert json.loads(Path("merged", MERGE_REPORT).read_text())["base"]["name"] == "some/model"
    into_hub_cache(tmp_path / "merged", cache, "some/merged")
    assert swlora("export", "--gguf", "x.gguf", "--model", "some/merged", "--type", "f32").code == 0
    name = gguf.GGUFReader("x.gguf").fields["general.name"].contents()
    assert name == "some/merged"
    lora = ("--gguf-lora", "lora.gguf", "--adapter", adapter)
    assert swlora("export", *lora).code == 0

    with_adapter, merged = ("--adapter", adapter), ("--model", "some/merged")
    texts = [swlora("generate", *which, *PROMPT).out for which in (with_adapter, merged)]
    assert texts[0] == texts[1] and texts[0].strip()
    data = ("--dataset", rows, "--max-new-tokens", 2)
    for number, which in enumerate((with_adapter, merged)):
        assert swlora("eval", *which, *data, "--output", f"eval{number}").code == 0


def test_folders_of_the_cache_are_merged_as_they_are_by_their_paths(model_folder, cache, tmp_path):
    base = into_hub_cache(model_folder("llama"), cache, "some/model")
    adapter = into_hub_cache(adapter_of(base, tmp_path / "a"), cache, "some/adapter")
    merged_from(base, adapter, tmp_path / "m")
    assert_is_base_and_adapter(base, adapter, tmp_path / "m")
    again = into_hub_cache(tmp_path / "m", cache, "some/merged")
    assert name_elsewhere(str(again)) == public_name(str(again)) == "some/merged"
    assert json.loads((again / MERGE_REPORT).read_text())["base"]["revision"] == COMMIT


def test_a_merged_model_of_the_cache_says_how_its_adapter_was_trained(
    make_model, tiny_tokenizer, swlora, cache, tmp_path
):
    model = make_model("llama")
    model.save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    write_gguf(model, tiny_tokenizer, tmp_path / "x.gguf")
    Path("model", MERGE_REPORT).write_text('{"adapter": {"is_chat": false}}')
    folder = into_hub_cache(tmp_path / "model", cache, "some/merged")
    for named, output in ((folder, "a"), ("some/merged", "b")):
        flags = ("--gguf", "x.gguf", "--model", named, "--output", output)
        assert "passed on as they are" in swlora("package", "--ollama", *flags).out


def test_what_is_beside_the_weights_is_read_before_any_are_written(
    model_folder, tmp_path, monkeypatch
):
    base, written = model_folder("llama"), []
    adapter = adapter_of(base, tmp_path / "a")

    def damaged(_base: object) -> dict[str, object]:
        raise UserError("it cannot be read")

    monkeypatch.setattr(merged_folder, "base_generation_config", damaged)
    monkeypatch.setattr(merged_folder, "_written", lambda name, *_: written.append(name))
    assert refusal(base, adapter, tmp_path / "m") == "it cannot be read"
    assert not written


def test_a_gguf_file_of_the_cache_has_the_name_of_its_link(cache, tmp_path):
    """Not that of the blob, which is a hash."""
    require_llama_cpp()
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "files").mkdir()
    model = ModelSpec(name=str(tmp_path / "model"))
    gguf_export.export(ExportRequest(model, tmp_path / "files/x.gguf"), Silent())
    own = into_hub_cache(tmp_path / "files", cache, "some/files") / "x.gguf"
    request = ExportRequest(ModelSpec(name=str(own)), tmp_path / "again.gguf", kind="f16")
    exported = gguf_export.export(request, Silent())
    assert exported.model == exported.metadata_from == public_name(str(own)) == "x.gguf"
