"""What is to be exported, and the mistakes in it that show before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from swlora.config import ModelSpec
from swlora.errors import UserError

TypeName = Literal["f32", "f16", "bf16", "q8_0"]
TYPES: tuple[TypeName, ...] = get_args(TypeName)


@dataclass(frozen=True)
class ExportRequest:
    """What is exported, and to where; `adapter` makes it a LoRA alone.

    `kind` None is f16 for a model and f32 for a LoRA. `base_gguf` gives its metadata.
    """

    model: ModelSpec
    output: Path
    adapter: Path | None = None
    kind: TypeName | None = None
    base_gguf: Path | None = None
    llama_cpp: Path | None = None


def export_request(
    model: ModelSpec,
    gguf: Path | None,
    gguf_lora: Path | None,
    adapter: Path | None,
    base_gguf: Path | None,
    llama_cpp: Path | None,
    *,
    kind: str | None,
) -> ExportRequest:
    """Return what flags, or keyword arguments, ask for; UserError where they do not agree."""
    output = gguf or gguf_lora
    if output is None or (gguf is not None and gguf_lora is not None):
        raise UserError("give either --gguf FILE for a model or --gguf-lora FILE for an adapter")
    if gguf_lora is not None and adapter is None:
        raise UserError("--gguf-lora needs the adapter: --adapter FOLDER")
    if gguf is not None and adapter is not None:
        raise UserError(
            "--gguf writes a model; merge the adapter into it first (swlora merge), or write the "
            "adapter alone with --gguf-lora"
        )
    if gguf_lora is not None and base_gguf is not None:
        raise UserError("--base-gguf goes with --gguf")
    if base_gguf is not None and not base_gguf.is_file():
        raise UserError(f"--base-gguf: there is no file {base_gguf}")
    if kind is not None and kind not in TYPES:
        raise UserError(f"--type is {', '.join(TYPES[:-1])} or {TYPES[-1]}, not {kind!r}")
    if adapter is not None:
        from swlora.adapters.on_base import adapted_spec
        from swlora.adapters.saved import adapter_folder

        model = adapted_spec(adapter_folder(adapter), model)
    return ExportRequest(model, output, adapter, kind, base_gguf, llama_cpp)
