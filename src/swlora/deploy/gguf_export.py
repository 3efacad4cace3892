"""`swlora export`: a model or a LoRA as a GGUF file, checked before it gets its name."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swlora.adapters.on_base import with_adapter
from swlora.adapters.saved import adapter_folder, read_config
from swlora.config import ModelSpec
from swlora.deploy.agreement import held_texts
from swlora.deploy.export_request import ExportRequest, TypeName
from swlora.deploy.gguf_check import (
    Checked,
    check_in_llama_cpp,
    check_metadata,
    effect_of_adapter,
    require,
    round_and_compare,
)
from swlora.deploy.gguf_hyperparameters import context_tokens
from swlora.deploy.gguf_layout import GgufLayout, gguf_family
from swlora.deploy.gguf_lora import lora_refusal, read_pairs, write_lora
from swlora.deploy.gguf_read_back import check_by_reading
from swlora.deploy.gguf_texts import has_space_at_first_only, notes_on_tokens
from swlora.deploy.gguf_write import ModelParts, n_tensors, tensor_bytes, write_gguf
from swlora.deploy.llama_cpp import INSTALL, TESTED_VERSION, LlamaCpp, Question, find_llama_cpp
from swlora.deploy.merge_report import (
    gguf_report,
    merged_adapter_sha256,
    was_trained_on_chats,
)
from swlora.disk_space import Need, check_space
from swlora.errors import RunFailedError, UserError
from swlora.files import atomic_path, check_writable, write_json
from swlora.hub import cached_file
from swlora.models.gguf_header import read_gguf_table
from swlora.models.gguf_tokenizer import puts_space
from swlora.models.identity import name_elsewhere
from swlora.models.load import LoadedModel, load_model, load_skeleton
from swlora.models.weight_source import open_weights
from swlora.progress import Progress
from swlora.result_json import IF_ANY, as_json

OTHER_DISK = "write it to another disk"


@dataclass(frozen=True)
class Exported:
    """A written file: the model and adapter that it was made from, and what its check found.

    `notes` are for a person to read. `merged_adapter_sha256` is the hash of the adapter's weights
    that were merged into the model.
    """

    file: str
    model: str
    adapter: str | None
    architecture: str
    type: TypeName
    n_bytes: int
    metadata_from: str | None
    check: Checked
    notes: list[str] | None = field(default=None, metadata=IF_ANY)
    merged_adapter_sha256: str | None = field(default=None, metadata=IF_ANY)


def export(request: ExportRequest, progress: Progress) -> Exported:
    """Write a GGUF file and its report FILE.report.json; nothing is left where its check fails.

    Raises UserError for what llama.cpp cannot hold, RunFailedError where the file computes
    something else than the model, or cannot be written.
    """
    if request.output.suffix != ".gguf":
        raise UserError(f"{request.output} is no name of a GGUF file; end it with .gguf")
    if request.output.exists():
        raise UserError(f"{request.output} exists already; choose another name, or remove it")
    check_writable(request.output.parent, "--gguf")
    llama_cpp = find_llama_cpp(request.llama_cpp)
    if llama_cpp is not None and llama_cpp.version != TESTED_VERSION:
        progress.say(f"note: {llama_cpp.name} was found; swlora is tested with {TESTED_VERSION}")
    _check_before_loading(request, llama_cpp)
    with progress.task("load the model"):
        loaded = load_model(_dequantised(request.model), dtype="float32")
    work = _export_model if request.adapter is None else _export_lora
    exported = work(request, loaded, llama_cpp, progress)
    write_json(gguf_report(request.output), as_json(exported))
    return exported


def _dequantised(spec: ModelSpec) -> ModelSpec:
    """Return a model of plain weights on the CPU, which are rounded as the file is."""
    is_gguf = spec.name.endswith(".gguf")
    frozen = {"frozen": "dequantised"} if is_gguf else {}
    return spec.model_copy(update={"device": "cpu", **frozen})


def _check_before_loading(request: ExportRequest, llama_cpp: LlamaCpp | None) -> None:
    """Refuse what is known to fail before anything large is read."""
    family = gguf_family(load_skeleton(request.model).model.config.model_type)
    if llama_cpp is None and (request.adapter is not None or not family.is_read_back):
        what = f"the file of a {family.arch} model" if request.adapter is None else "a LoRA as GGUF"
        raise UserError(
            f"{what} can only be checked in llama.cpp, and none was found: `{INSTALL}`, "
            "then --llama-cpp FOLDER"
        )
    if request.adapter is None:
        return
    if request.kind == "q8_0":
        raise UserError("a LoRA is not written as q8_0: its rank is no multiple of 32; use f16")
    folder = adapter_folder(request.adapter)
    if reason := lora_refusal(read_config(folder)):
        raise UserError(
            f"llama.cpp cannot apply the adapter in {folder}: {reason}; merge it instead "
            f"(swlora merge --adapter {request.adapter}), then swlora export --gguf"
        )


def _export_model(
    request: ExportRequest, loaded: LoadedModel, llama_cpp: LlamaCpp | None, progress: Progress
) -> Exported:
    kind: TypeName = request.kind or "f16"
    path = _weights_path(loaded)
    base = request.base_gguf or (path if path.suffix == ".gguf" else None)
    layout, config = GgufLayout(loaded.model.config), loaded.model.config
    parts = _parts(loaded, path, base, for_chats=was_trained_on_chats(loaded))
    need = Need(f"tensors of the type {kind}", tensor_bytes(parts, kind))
    check_space(request.output.parent, [need], OTHER_DISK)
    with _checked_file(request.output) as scratch:
        with progress.task("write the file", n_tensors(parts)) as task:
            write_gguf(parts, scratch, kind, name_elsewhere(loaded.name), task)
        with progress.task("check the file"):
            own, name = (loaded.model, loaded.tokenizer), str(request.output)
            if base is not None:
                check_metadata(scratch, base, name)
            length = context_tokens(config)
            windows = held_texts(loaded.tokenizer, length).windows
            rounding = round_and_compare(loaded.model, layout, kind, windows)
            if llama_cpp is None:
                checked = check_by_reading(scratch, *own, name)
            else:
                question = Question(scratch)
                checked = check_in_llama_cpp(llama_cpp, question, *own, kind, length, name)
        checked = replace(checked, rounding=rounding)
        require(checked, name, for_chats=_must_have_chats(parts))
        notes = _token_notes(loaded, checked, scratch, progress, is_lora=False)
    return _exported(request, loaded, layout, kind, checked, base, notes)


def _export_lora(
    request: ExportRequest, loaded: LoadedModel, llama_cpp: LlamaCpp | None, progress: Progress
) -> Exported:
    """Write an adapter; it is checked on a float32 file of its base, which is removed again."""
    assert request.adapter is not None and llama_cpp is not None
    kind: TypeName = request.kind or "f32"
    folder, path = adapter_folder(request.adapter), _weights_path(loaded)
    layout, config = GgufLayout(loaded.model.config), loaded.model.config
    base = path if path.suffix == ".gguf" else None
    loaded = with_adapter(loaded, folder, progress.say)
    adapted, facts = loaded.model, loaded.adapter_facts or {}
    parts = _parts(loaded, path, base, for_chats=facts.get("is_chat") is not False)
    need = Need("the base in float32, on which the LoRA is checked", tensor_bytes(parts, "f32"))
    check_space(request.output.parent, [need], OTHER_DISK)
    windows = held_texts(loaded.tokenizer, context_tokens(config)).windows
    with _checked_file(request.output) as scratch, _scratch_beside(request.output) as beside:
        effect_nats = effect_of_adapter(adapted, windows)
        write_lora(layout, read_pairs(adapted), scratch, kind, folder.resolve().name)
        with progress.task("write the base for the check", n_tensors(parts)) as task:
            write_gguf(parts, beside / "base.gguf", "f32", name_elsewhere(loaded.name), task)
        with progress.task("check the file"):
            question, name = Question(beside / "base.gguf", scratch), str(request.output)
            own, length = (adapted, loaded.tokenizer), context_tokens(config)
            checked = check_in_llama_cpp(llama_cpp, question, *own, kind, length, name)
        by = f"{checked.by}, on the base in float32"
        checked = replace(checked, by=by, adapter_kl_nats_per_token=effect_nats)
        require(checked, str(request.output), for_chats=_must_have_chats(parts))
        notes = _token_notes(loaded, checked, beside / "base.gguf", progress, is_lora=True)
    return _exported(request, loaded, layout, kind, checked, None, notes)


def _parts(loaded: LoadedModel, path: Path, base: Path | None, *, for_chats: bool) -> ModelParts:
    weights, generation = open_weights(path), _generation(path)
    config = loaded.model.config
    return ModelParts(config, loaded.tokenizer, weights, generation, base, for_chats)


def _must_have_chats(parts: ModelParts) -> bool:
    """Say whether a file that cuts chats otherwise is refused: where none is right, it is noted."""
    return parts.for_chats and not has_space_at_first_only(parts.tokenizer)


def _token_notes(
    loaded: LoadedModel, checked: Checked, path: Path, progress: Progress, *, is_lora: bool
) -> list[str]:
    """Return and say what a person should know of the tokens that the file at `path` makes."""
    notes = notes_on_tokens(
        loaded.tokenizer,
        has_space=puts_space(read_gguf_table(path)),
        chats_equal=checked.chat_tokens_equal,
        is_lora=is_lora,
    )
    for note in notes:
        progress.say(f"note: {note}")
    return notes


def _exported(
    request: ExportRequest,
    loaded: LoadedModel,
    layout: GgufLayout,
    kind: TypeName,
    checked: Checked,
    base: Path | None,
    notes: list[str],
) -> Exported:
    return Exported(
        file=request.output.name,
        model=name_elsewhere(loaded.name),
        adapter=request.adapter.resolve().name if request.adapter else None,
        architecture=layout.family.arch,
        type=kind,
        n_bytes=request.output.stat().st_size,
        metadata_from=base.name if base else None,
        check=checked,
        notes=notes or None,
        merged_adapter_sha256=merged_adapter_sha256(Path(loaded.name)),
    )


@contextmanager
def _checked_file(output: Path) -> Iterator[Path]:
    """Yield a scratch path that ends in .gguf; it becomes `output` where the body succeeds."""
    with atomic_path(output) as final, _scratch_beside(output) as beside:
        scratch = beside / "scratch.gguf"
        yield scratch
        scratch.replace(final)


@contextmanager
def _scratch_beside(output: Path) -> Iterator[Path]:
    """Yield a folder on the same disk, removed afterwards; a full disk is said in one line."""
    folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        yield folder
    except OSError as error:
        raise RunFailedError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _weights_path(loaded: LoadedModel) -> Path:
    """Return the folder or .gguf file that a model was loaded from."""
    path = Path(loaded.name)
    if path.exists():
        return path
    config = cached_file(loaded.name, "config.json", loaded.revision)
    if config is None:
        raise UserError(f"the files of {loaded.name} are not in the Hub's cache")
    return Path(config).parent


def _generation(path: Path) -> Any:
    from transformers import GenerationConfig

    if not (path / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(path)
