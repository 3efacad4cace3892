"""The GGUF files that go to Ollama: do they belong together."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swlora.deploy.gguf_layout import GGUF_FAMILIES
from swlora.errors import UserError
from swlora.models.anatomy import n_embeddings
from swlora.models.gguf_header import GgufHeader, read_gguf_table
from swlora.models.load import LoadedModel

EMBEDDING = "token_embd.weight"


def read_files(gguf: Path, lora: Path | None) -> GgufHeader:
    """Return what a model's file says of itself; UserError where an adapter's does not fit it."""
    header = _header(gguf)
    if header.facts.get("general.type") == "adapter":
        raise UserError(f"{gguf} is an adapter: give it as --gguf-lora, and its base as --gguf")
    if lora is not None:
        adapter = _header(lora)
        if adapter.facts.get("general.type") != "adapter":
            raise UserError(f"{lora} is no adapter; `swlora export --gguf-lora` makes one")
        if adapter.architecture != header.architecture:
            raise UserError(
                f"{lora} is for the architecture {adapter.architecture}, and {gguf} is "
                f"{header.architecture}"
            )
        if lora.name == gguf.name:
            raise UserError(f"both files are called {gguf.name}; rename one")
        _check_shapes(gguf, header, lora, adapter)
    return header


def _header(path: Path) -> GgufHeader:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*\.gguf", path.name):
        raise UserError(f"{path.name!r}: Ollama's files are letters, digits and .gguf; rename it")
    return read_gguf_table(path)


def _check_shapes(gguf: Path, header: GgufHeader, lora: Path, adapter: GgufHeader) -> None:
    """Refuse an adapter of another model, as llama.cpp would when it is loaded."""
    for name, stored in adapter.tensors.items():
        base, _, half = name.rpartition(".")
        weight = header.tensors.get(base)
        if weight is None:
            raise UserError(f"{lora} changes {base}, which {gguf} does not have: it is for another")
        side = {"lora_a": -1, "lora_b": -2}.get(half)  # A has the inputs, B the outputs
        if side is None or base == EMBEDDING:  # whose halves stand the other way round
            continue
        if len(weight.shape) < 2 or stored.shape[side] != weight.shape[side]:
            raise UserError(
                f"{lora} changes {base}, which has another shape in {gguf}: it is for another model"
            )


def check_same_model(
    gguf: Path, header: GgufHeader, loaded: LoadedModel, end_token_ids: set[int]
) -> None:
    """Refuse a file that was not made of the model whose tokenizer and template are taken.

    `end_token_ids` are all tokens that end a text or an answer of that model.
    """
    for what, in_file, in_model in _compared(header, loaded):
        if in_file is not None and in_file != in_model:
            raise UserError(
                f"{gguf} was not made of --model {loaded.name}: {what} {in_file} in the file and "
                f"{in_model} in the model; give the model that it was made of"
            )
    eos = header.facts.get("tokenizer.ggml.eos_token_id")
    if eos is not None and eos not in end_token_ids:
        known = ", ".join(map(str, sorted(end_token_ids))) or "none"
        raise UserError(
            f"{gguf} was not made of --model {loaded.name}: its texts end with token {eos}, the "
            f"model's with {known}; give the model that it was made of"
        )


def _compared(header: GgufHeader, loaded: LoadedModel) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is compared, as a file has it (None: it does not say) and as the model does."""
    config = loaded.model.config.get_text_config()
    if family := GGUF_FAMILIES.get(config.model_type):
        yield "the architecture is", header.architecture, family.arch
    of_file = header.facts.get(f"{header.architecture}.block_count")
    yield "the number of layers is", of_file, config.num_hidden_layers
    if embedding := header.tensors.get(EMBEDDING):
        yield "the number of tokens is", embedding.shape[0], n_embeddings(loaded.model)
        width = loaded.model.get_input_embeddings().weight.shape[1]
        yield "the size of an embedding is", embedding.shape[1], width


def has_other_template(header: GgufHeader, tokenizer: Any) -> bool:
    """Say whether the file carries another chat template than the tokenizer."""
    own = header.facts.get("tokenizer.chat_template")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return isinstance(own, str) and isinstance(template, str) and own.strip() != template.strip()
