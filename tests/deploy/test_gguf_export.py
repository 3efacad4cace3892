"""The export of a model: run, or read back, and kept only where it computes what the model does."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.support.gguf_models import save_tiny
from tests.support.llama_cpp import require_llama_cpp

from swlora.config import ModelSpec
from swlora.deploy import gguf_export, gguf_write
from swlora.deploy.gguf_export import Exported, ExportRequest
from swlora.deploy.gguf_layout import GgufLayout, Place
from swlora.errors import RunFailedError, UserError
from swlora.progress import Silent


def export(folder: Path, name: str = "x.gguf", **settings: Any) -> Exported:
    spec = ModelSpec(name=settings.pop("model", str(folder / "model")), device="cpu")
    return gguf_export.export(ExportRequest(spec, folder / name, **settings), Silent())


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "find_llama_cpp", lambda _: None)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_every_type_is_near_the_model_rounded_to_it(
    model_type: str, kind: Any, tmp_path: Path
) -> None:
    require_llama_cpp()
    sizes = {"n_embd": 64, "n_inner": 96} if model_type == "gpt2" else {"hidden_size": 64}
    sizes |= {} if model_type == "gpt2" else {"intermediate_size": 96}
    save_tiny(model_type, tmp_path / "model", **sizes)
    exported = export(tmp_path, kind=kind)
    assert exported.check.tokens_equal
    assert exported.check.agreement.n_continuations == 9  # eight prompts and a chat
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind.upper()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    report = json.loads((tmp_path / "x.gguf.report.json").read_text())
    assert report["type"] == kind and "llama.cpp" in report["check"]["by"]


@pytest.mark.usefixtures("no_llama_cpp")
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_without_llama_cpp_it_is_read_back(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "model")
    check = export(tmp_path, kind="f16").check
    assert "not run in llama.cpp" in check.by and check.tokens_equal is None
    assert check.agreement.n_equal_continuations == check.agreement.n_continuations == 9
    assert check.agreement.largest_logit_difference < 1e-4


@pytest.mark.usefixtures("no_llama_cpp")
def test_without_llama_cpp_what_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    save_tiny("olmo2", tmp_path / "model")
    with pytest.raises(UserError, match="olmo2 model can only be checked"):
        export(tmp_path)


def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_llama_cpp()
    save_tiny("llama", tmp_path / "model")
    place = GgufLayout.place

    def in_the_models_order(self: GgufLayout, name: str) -> Place:
        found = place(self, name)
        return Place(found.name, None, found.is_transposed, found.adds_one, found.expert)

    monkeypatch.setattr(GgufLayout, "place", in_the_models_order)
    with pytest.raises(RunFailedError, match=r"x\.gguf was not written, because llama\.cpp"):
        export(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_write, "encoded", full)
    with pytest.raises(RunFailedError, match=r"cannot write \S+x\.gguf: No space left on device"):
        export(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("no_llama_cpp")
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_a_disk_without_room_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """The bytes that are foreseen are those of the file's tensors."""
    save_tiny("llama", tmp_path / "model", hidden_size=64, intermediate_size=96)
    export(tmp_path, kind=kind)
    n_bytes = sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors)
    usage = shutil.disk_usage(tmp_path)._replace(free=int(n_bytes))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    export(tmp_path, "just.gguf", kind=kind)
    usage = usage._replace(free=int(n_bytes) - 1)
    with pytest.raises(UserError, match=f"tensors of the type {kind}\\), and its disk has"):
        export(tmp_path, "not.gguf", kind=kind)


def test_metadata_of_a_base_file_is_copied_and_tensors_are_the_models(tmp_path: Path) -> None:
    require_llama_cpp()
    save_tiny("llama", tmp_path / "model", seed=1)
    export(tmp_path, "base.gguf", kind="f32")
    save_tiny("llama", tmp_path / "other", seed=2)
    own = {"model": str(tmp_path / "other"), "base_gguf": tmp_path / "base.gguf"}
    assert export(tmp_path, kind="f16", **own).metadata_from == "base.gguf"
    base, made = (gguf.GGUFReader(tmp_path / name).fields for name in ("base.gguf", "x.gguf"))
    assert base.keys() == made.keys()
    changed = {key for key in base if base[key].contents() != made[key].contents()}
    assert changed == {"general.file_type"}
    # a .gguf file is its own base
    x = str(tmp_path / "x.gguf")
    assert export(tmp_path, "again.gguf", model=x, kind="f16").metadata_from == "x.gguf"
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path, "x.gguf", model=x)


def test_weights_that_lie_quantised_in_a_file_are_dequantised_for_the_check(tmp_path: Path) -> None:
    require_llama_cpp()
    save_tiny("llama", tmp_path / "model", hidden_size=64, intermediate_size=96)
    export(tmp_path, "q.gguf", kind="q8_0")
    spec = ModelSpec(name=str(tmp_path / "q.gguf"), device="cpu", frozen="gguf")
    request = ExportRequest(spec, tmp_path / "x.gguf", kind="f32")
    assert gguf_export.export(request, Silent()).check.agreement.kl_nats_per_token < 1e-6


def test_a_base_file_of_another_model_is_refused(tmp_path: Path) -> None:
    require_llama_cpp()
    save_tiny("llama", tmp_path / "model")
    export(tmp_path, "base.gguf", kind="f32")
    for model_type, changes, expected in (
        ("qwen3", {}, "no qwen3 model"),
        ("llama", {"intermediate_size": 48}, "another model: blk.0.ffn"),
    ):
        folder = tmp_path / f"{model_type}-other"
        save_tiny(model_type, folder, **changes)
        with pytest.raises(UserError, match=expected):
            export(tmp_path, model=str(folder), base_gguf=tmp_path / "base.gguf")


@pytest.mark.slow
def test_the_embedded_model_writes_the_same_text_in_llama_cpp(
    builtin_dir: Path, tmp_path: Path
) -> None:
    require_llama_cpp()
    exported = export(tmp_path, model=str(builtin_dir))
    assert exported.check.agreement.n_equal_continuations == 9
    assert exported.check.agreement.kl_nats_per_token < 2e-5
