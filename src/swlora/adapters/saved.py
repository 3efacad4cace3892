"""Adapters on disk: a standard PEFT folder that means the same on every machine.

    adapter_config.json, adapter_model.safetensors    PEFT's; the base model by a name of the Hub
    tokenizer*.json, chat_template.jinja              the tokenizer that it was trained with
    swlora.json                                       what training noted (swlora.adapters.card),
                                                      and sha256s of that and of PEFT's files
    README.md                                         the same for people, as a model card

Adapters from elsewhere, with PEFT's two files alone, are loaded too.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swlora.adapters.adapted import NAME
from swlora.adapters.card import Facts, model_card
from swlora.adapters.methods import quiet_peft
from swlora.adapters.reach import HARMLESS_STARTS, refusal
from swlora.bounded_read import UnreadableError, read_json_object
from swlora.errors import RunFailedError, UserError
from swlora.files import (
    make_folder,
    replace_folder,
    scratch_folder,
    sha256_of,
    write_json,
    write_text,
)
from swlora.models.finite import not_finite
from swlora.models.model_folder import check_regular_files, read_model_json
from swlora.paths import may_be_path

CONFIG = "adapter_config.json"
FACTS = "swlora.json"
DIGESTS = "sha256"
WEIGHTS = "adapter_model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_JSON_BYTES = 16 << 20


def save_adapter(model: Any, folder: Path, facts: Facts, tokenizer: Any = None) -> int:
    """Save a PeftModel's adapter as safetensors; return the bytes of its weights.

    `facts` are what `training_facts` gave, and more; the README.md is made from them. `folder` is
    replaced by a complete one; a kill leaves the old or the new one. Raises RunFailedError where
    the disk is full or a weight is no finite number.
    """
    from safetensors import SafetensorError

    scratch = scratch_folder(folder)
    try:
        make_folder(folder.parent)
        shutil.rmtree(scratch, ignore_errors=True)
        with quiet_peft():
            model.save_pretrained(str(scratch), save_embedding_layers=False)
        _check_finite(scratch / WEIGHTS)
        config = _portable_config(scratch / CONFIG, facts)
        if tokenizer is not None:
            save_tokenizer(tokenizer, scratch)
        digests = {name: sha256_of(scratch / name) for name in (CONFIG, WEIGHTS)}
        digests[FACTS] = _sha256_of_facts(facts)
        write_json(scratch / FACTS, facts | {DIGESTS: digests})
        write_text(scratch / "README.md", model_card(facts, config))  # in place of PEFT's template
        replace_folder(scratch, folder)
        return (folder / WEIGHTS).stat().st_size
    except (OSError, SafetensorError) as error:
        raise RunFailedError(f"cannot write {folder}: {error}") from error
    finally:  # on a full disk, above all
        shutil.rmtree(scratch, ignore_errors=True)


def _check_finite(weights: Path) -> None:
    """Raise RunFailedError where a file of weights holds a number that is not finite."""
    if said := what_is_not_finite(weights):
        raise RunFailedError(
            f"the adapter is not saved: it {said}; train again with a lower --learning-rate"
        )


def what_is_not_finite(weights: Path) -> str:
    """Say how many numbers of a file's first such tensor are not finite; "" where all are."""
    from safetensors.torch import load_file

    for name, n in not_finite(load_file(weights).items()).items():
        return f"holds numbers that are not finite, {n:,} in {name}"
    return ""


def _portable_config(path: Path, facts: Facts) -> dict[str, Any]:
    """Put the base model's own name where PEFT wrote the path from which it was loaded."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "base_model" in facts:
        config["base_model_name_or_path"] = facts["base_model"]
        config["revision"] = facts.get("base_revision")
        write_json(path, config)
    return config


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer without the paths of this machine; OSError where that fails."""
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # the tokenizers library has one kind for everything
        raise OSError(f"the tokenizer: {error}") from error
    path = folder / TOKENIZER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for local in ("is_local", "local_files_only", "name_or_path"):  # of this machine alone
        config.pop(local, None)
    write_json(path, config)


def load_adapter(model: Any, folder: Path) -> Any:
    """Wrap `model` with the saved adapter in `folder`, frozen; UserError where it does not fit."""
    peft_model = _load(model, folder, {}, is_trainable=False)
    if peft_model.peft_config[NAME].peft_type == "ADALORA":
        _undo_rounding(peft_model, folder / WEIGHTS)
    return peft_model.eval().requires_grad_(False)  # PEFT leaves some free on bfloat16 models


def load_trainable(model: Any, folder: Path, changes: Mapping[str, Any]) -> Any:
    """Wrap `model` with the saved adapter in `folder`, to be trained; `changes` are of its config.

    Raises UserError where it does not fit.
    """
    return _load(model, folder, changes, is_trainable=True)


def _load(model: Any, folder: Path, changes: Mapping[str, Any], *, is_trainable: bool) -> Any:
    from peft import PeftConfig, PeftModel

    _check(folder)
    try:
        with quiet_peft():
            config = PeftConfig.from_pretrained(str(folder))
            for name, value in changes.items():
                setattr(config, name, value)
            peft_model = PeftModel.from_pretrained(
                model,
                str(folder),
                is_trainable=is_trainable,
                config=config,
                use_safetensors=True,
            )
            n_extra, n_missing = _unmatched(peft_model, folder / WEIGHTS)
    except Exception as error:  # PEFT, torch and safetensors raise many kinds
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter in {folder} does not fit this model: {detail}") from error
    if said := what_is_not_finite(folder / WEIGHTS):
        raise UserError(f"the adapter in {folder} is not loaded: it {said}")
    if n_extra or n_missing:
        raise UserError(
            f"the adapter in {folder} does not fit this model: {n_extra} of its tensors have no "
            f"place and {n_missing} are missing"
        )
    return peft_model


def starts_from_the_weights(folder: Path) -> bool:
    """Say whether loading the adapter in `folder` may write into the model's own weights."""
    return read_config(folder).get("init_lora_weights", True) not in HARMLESS_STARTS


def read_config(folder: Path) -> dict[str, Any]:
    """Return what PEFT's configuration of the adapter in `folder` says; UserError without one."""
    return read_model_json(folder / CONFIG, max_bytes=MAX_JSON_BYTES)


def _unmatched(peft_model: Any, weights: Path) -> tuple[int, int]:
    """Count the saved tensors without a place in the model, and the places without a tensor.

    Beside an adapter of embeddings or head, PEFT saves the model's own; they may be missing.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        saved = set(file.keys())
    needed, known = (
        set(get_peft_model_state_dict(peft_model, save_embedding_layers=embeddings))
        for embeddings in (False, True)
    )
    return len(saved - known), len(needed - saved)


def _undo_rounding(peft_model: Any, weights: Path) -> None:
    """Put the saved tensors back as they are.

    PEFT rounds them to the model's dtype where it cuts an AdaLoRA to the ranks that were left.
    """
    from safetensors.torch import load_file

    for name, tensor in load_file(weights, device=str(peft_model.device)).items():
        if name.endswith((".lora_A", ".lora_B", ".lora_E")):
            peft_model.get_parameter(f"{name}.{NAME}").data = tensor


def adapter_folder(path: Path) -> Path:
    """Return the adapter folder that `path` is, or, for a run folder, holds.

    Raises UserError where it holds no adapter, so that this is known before a model is loaded.
    """
    if not (may_be_path(path) and path.is_dir()):
        raise UserError(f"there is no adapter folder {path}")
    inside = path / "adapter"
    folder = inside if (inside / CONFIG).is_file() else path
    _check(folder)
    return folder


def _check(folder: Path) -> None:
    check_regular_files(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no adapter folder: it holds no {CONFIG}")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}; other formats are not read")
    if reason := refusal(read_config(folder)):
        raise UserError(f"the adapter in {folder} is not supported: {reason}")
    if name := changed_file(folder):
        raise UserError(
            f"{folder / name} is not as it was saved: it is damaged, or was changed since; if you "
            f"changed it, remove {DIGESTS!r} from {FACTS}"
        )


def changed_file(folder: Path) -> str | None:
    """Return which file is not as it was saved here: PEFT's two, or what is noted beside them.

    None where all are. Adapters from elsewhere note nothing of theirs.
    """
    noted = _read_noted(folder).get(DIGESTS)
    for name, digest in noted.items() if isinstance(noted, dict) else ():
        if name == FACTS and _sha256_of_facts(read_facts(folder)) != digest:
            return FACTS
        if name in (CONFIG, WEIGHTS) and sha256_of(folder / name) != digest:
            return str(name)
    return None


def _sha256_of_facts(facts: Facts) -> str:
    """Return a hash of facts as they are read back, whatever the order and the white space."""
    text = json.dumps(json.loads(json.dumps(facts)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_facts(folder: Path) -> Facts:
    """Return what training noted beside the adapter; empty for an adapter from elsewhere."""
    return {name: value for name, value in _read_noted(folder).items() if name != DIGESTS}


def _read_noted(folder: Path) -> Facts:
    path = folder / FACTS
    if not path.exists():
        return {}
    try:
        return read_json_object(path, max_bytes=MAX_JSON_BYTES)
    except UnreadableError as error:
        raise UserError(f"{path} is damaged: {error}") from error
