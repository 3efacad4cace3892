"""The export of a model: run, or read back, and kept only where it computes what the model does."""

import errno
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests.support.gguf_models import add_old_buffers, save_tiny
from tests.support.llama_cpp import require_llama_cpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from swlora.config import ModelSpec
from swlora.deploy import gguf_export, gguf_write
from swlora.deploy.agreement import Agreement, compare_logits
from swlora.deploy.gguf_export import Exported, ExportRequest
from swlora.deploy.gguf_layout import GgufLayout, Place
from swlora.errors import RunFailedError, UserError
from swlora.models.gguf_weights import GgufWeights
from swlora.progress import Silent
from swlora.superweights.ablate import text_windows


def export(folder: Path, name: str = "x.gguf", **settings: Any) -> Exported:
    spec = ModelSpec(name=settings.pop("model", str(folder / "model")), device="cpu")
    return gguf_export.export(ExportRequest(spec, folder / name, **settings), Silent())


def cost_of_rounding(folder: Path, kind: str) -> Agreement:
    """Compare the saved model with the one that the exported file is, as transformers has it."""
    own = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    back = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    weights = GgufWeights(folder / "x.gguf", back)
    with torch.no_grad():
        for name in weights.names:
            back.state_dict()[name].copy_(weights.tensor(name))
        windows = text_windows(AutoTokenizer.from_pretrained(folder / "model"), None, 4, 128)
        pairs = [(own(row[None]).logits, back(row[None]).logits) for row in windows]
    parts = [compare_logits(*pair) for pair in pairs]
    assert sum(part.kl_sum_nats for part in parts) > 0
    return sum(parts[1:], start=parts[0])


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
    rounding = exported.check.rounding
    assert (rounding is None) == (kind == "f32")
    assert rounding is None or rounding == cost_of_rounding(tmp_path, kind)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind.upper()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    report = json.loads((tmp_path / "x.gguf.report.json").read_text())
    assert report["type"] == kind and "llama.cpp" in report["check"]["by"]


def test_buffers_that_nothing_reads_are_not_exported(tmp_path: Path) -> None:
    require_llama_cpp()
    save_tiny("gpt_neox", tmp_path / "model")
    add_old_buffers(tmp_path / "model")
    assert export(tmp_path).check.agreement.n_equal_continuations == 9


@pytest.mark.usefixtures("no_llama_cpp")
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_without_llama_cpp_it_is_read_back(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "model")
    check = export(tmp_path, kind="f16").check
    assert "not run in llama.cpp" in check.by and check.tokens_equal
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


def damaged(name: str, value: Any) -> Any:
    """Return a method of gguf's writer that writes another value than it was given."""
    own = getattr(gguf.GGUFWriter, name)

    def method(self: gguf.GGUFWriter, given: Any) -> None:
        own(self, value(given) if callable(value) else value)

    return method


@pytest.mark.usefixtures("no_llama_cpp")
@pytest.mark.parametrize(
    ("model_type", "method", "value", "named"),
    [
        ("llama", "add_rope_freq_base", 2e4, "rope_theta"),
        ("llama", "add_layer_norm_rms_eps", lambda eps: 2 * eps, "rms_norm_eps = 2e-06, not 1e-06"),
        ("gpt2", "add_layer_norm_eps", lambda eps: 2 * eps, "layer_norm_epsilon = 2e-05"),
        ("llama", "add_context_length", 128, "max_position_embeddings = 128, not 256"),
        ("gemma3_text", "add_rope_freq_base_swa", 2e4, "sliding_attention"),
        ("gemma3_text", "add_sliding_window", 15, "sliding_window = 15, not 16"),
        ("gemma2", "add_final_logit_softcapping", 29.0, "final_logit_softcapping = 29"),
        ("qwen3", "add_key_length", 4, r"attention\.value_length = 8, and heads"),
        ("qwen3_moe", "add_expert_used_count", 1, "num_experts_per_tok = 1, not 2"),
        ("llama", "add_bos_token_id", 5, "the BOS token is 5 in it, and 262"),
        ("llama", "add_eos_token_id", 5, "the EOS token is 5 in it, and 263"),
        ("llama", "add_add_bos_token", True, "add_bos_token"),
        ("llama", "add_token_merges", lambda merges: merges[:-3], "other tokens"),
        ("llama", "add_tokenizer_pre", "qwen2", "other tokens"),
    ],
)
def test_without_llama_cpp_a_setting_that_was_written_wrong_is_found_by_name(
    model_type: str,
    method: str,
    value: Any,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_tiny(model_type, tmp_path / "model")
    monkeypatch.setattr(gguf.GGUFWriter, method, damaged(method, value))
    with pytest.raises(RunFailedError, match=named):
        export(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("method", "value", "named"),
    [
        ("add_bos_token_id", 263, "the BOS token is 263 in it, and 262"),
        ("add_eos_token_id", 262, "the EOS token is 262 in it, and 263"),
        ("add_add_bos_token", True, "add_bos_token"),
    ],
)
def test_special_tokens_of_llama_cpp_are_those_of_the_tokenizer(
    method: str, value: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_llama_cpp()
    save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(gguf.GGUFWriter, method, damaged(method, value))
    with pytest.raises(RunFailedError, match=named):
        export(tmp_path)


@pytest.mark.usefixtures("no_llama_cpp")
def test_metadata_of_a_base_file_is_compared_key_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "model")
    export(tmp_path, "base.gguf")
    own = gguf.GGUFWriter.add_key_value

    def other_template(self: gguf.GGUFWriter, key: str, value: Any, *kinds: Any) -> None:
        own(self, key, "no" if key == "tokenizer.chat_template" else value, *kinds)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", other_template)
    with pytest.raises(RunFailedError, match=r"tokenizer\.chat_template is not that of base\.gguf"):
        export(tmp_path, base_gguf=tmp_path / "base.gguf")


@pytest.mark.usefixtures("no_llama_cpp")
def test_empty_lists_and_traces_of_quantising_are_not_copied(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    export(tmp_path, "base.gguf")
    insert_fields(tmp_path / "base.gguf")
    assert "general.tags" in gguf.GGUFReader(tmp_path / "base.gguf").fields
    export(tmp_path, base_gguf=tmp_path / "base.gguf")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert not {"general.tags", "quantize.imatrix.file"} & fields.keys()


def insert_fields(path: Path) -> None:
    """Put an empty list and the name of an importance matrix into a file, byte by byte."""
    raw = path.read_bytes()
    (n_fields,) = struct.unpack_from("<Q", raw, 16)
    added = _key("general.tags") + struct.pack("<IIQ", 9, 8, 0) + _key("quantize.imatrix.file")
    text = b"i" * (-(len(added) + 12) % 32)  # so that the tensors stay aligned
    added += struct.pack("<IQ", 8, len(text)) + text
    path.write_bytes(raw[:16] + struct.pack("<Q", n_fields + 2) + added + raw[24:])


def _key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def test_another_version_of_the_package_is_said_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = require_llama_cpp()
    save_tiny("llama", tmp_path / "model")
    other = replace(found, version="3.0.0")
    monkeypatch.setattr(gguf_export, "find_llama_cpp", lambda _: other)
    said: list[str] = []
    monkeypatch.setattr(Silent, "say", lambda _, text: said.append(text))
    assert export(tmp_path).check.node_llama_cpp == "3.0.0"
    assert "note: node-llama-cpp 3.0.0 was found; swlora is tested with 3.21.1" in said
    said.clear()
    monkeypatch.setattr(gguf_export, "find_llama_cpp", lambda _: found)
    export(tmp_path, "again.gguf")
    assert not [text for text in said if "was found" in text]
