"""Adapters on disk: a standard PEFT folder, with what training noted beside it in swlora.json."""

import json
import shutil
from pathlib import Path
from typing import Any

from swlora.adapters.methods import quiet_peft
from swlora.errors import RunFailedError, UserError
from swlora.files import write_json

FACTS = "swlora.json"
WEIGHTS = "adapter_model.safetensors"


def save_adapter(model: Any, folder: Path, facts: dict[str, Any]) -> int:
    """Save a PeftModel's adapter as safetensors; return the bytes of its weights.

    `folder` is replaced by a complete one. Raises RunFailedError where the disk is full.
    """
    from safetensors import SafetensorError

    scratch = folder.with_name(f".{folder.name}-saving")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        with quiet_peft():
            model.save_pretrained(str(scratch), save_embedding_layers=False)
        (scratch / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        write_json(scratch / FACTS, facts)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)
        return (folder / WEIGHTS).stat().st_size
    except (OSError, SafetensorError) as error:
        raise RunFailedError(f"cannot write {folder}: {error}") from error


def load_adapter(model: Any, folder: Path) -> Any:
    """Wrap `model` with the saved adapter in `folder`, frozen; UserError where it does not fit."""
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is no adapter folder: it holds no adapter_config.json")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}; other formats are not read")
    try:
        with quiet_peft():
            peft_model = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
            n_extra, n_missing = _unmatched(peft_model, folder / WEIGHTS)
    except Exception as error:  # PEFT, torch and safetensors raise many kinds
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter in {folder} does not fit this model: {detail}") from error
    if n_extra or n_missing:
        raise UserError(
            f"the adapter in {folder} does not fit this model: {n_extra} of its tensors have no "
            f"place and {n_missing} are missing"
        )
    if peft_model.peft_config["default"].peft_type == "ADALORA":
        _undo_rounding(peft_model, folder / WEIGHTS)
    return peft_model.eval().requires_grad_(False)  # PEFT leaves some free on bfloat16 models


def _unmatched(peft_model: Any, weights: Path) -> tuple[int, int]:
    """Count the saved tensors without a place in the model, and the places without a tensor."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        saved = set(file.keys())
    places = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    return len(saved - places), len(places - saved)


def _undo_rounding(peft_model: Any, weights: Path) -> None:
    """Put the saved tensors back as they are.

    PEFT rounds them to the model's dtype where it cuts an AdaLoRA to the ranks that were left.
    """
    from safetensors.torch import load_file

    for name, tensor in load_file(weights, device=str(peft_model.device)).items():
        peft_model.get_parameter(f"{name}.default").data = tensor


def adapter_folder(path: Path) -> Path:
    """Return the adapter folder that `path` is, or, for a run folder, holds."""
    if not path.is_dir():
        raise UserError(f"there is no adapter folder {path}")
    inside = path / "adapter"
    return inside if (inside / "adapter_config.json").is_file() else path


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what training noted beside the adapter; empty for an adapter from elsewhere."""
    path = folder / FACTS
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
