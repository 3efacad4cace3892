"""The tokenizer of a .gguf file, which makes of a text what llama.cpp makes of it.

transformers' tables (5.23) know the cuts of some names in `tokenizer.ggml.pre` and take GPT-2's for
all others, never pass over merges for a word that is a token, put a space before each text whether
the file says so or not, and BOS only where a byte-level file says it. All four are set here.
"""

from pathlib import Path
from typing import Any

from tokenizers import decoders, normalizers

from swlora.errors import UserError, panic_named
from swlora.library_noise import quiet_libraries
from swlora.models.gguf_cuts import WHOLE_WORDS, pre_tokenizer
from swlora.models.gguf_header import GgufHeader, read_gguf_table

SPACE = "\u2581"  # SentencePiece's
# Where a file does not say whether BOS comes first, llama.cpp puts it there for these kinds of
# tokenizers, and among the byte-level ones for these ways of cutting a text (src/llama-vocab.cpp of
# v0.4.0); Ollama leaves it to llama.cpp.
_BOS_BY_KIND = ("llama", "bert")
_BYTE_LEVEL = ("gpt2", "hybriddna", "whitespace")
_BOS_BY_CUT = WHOLE_WORDS | {"chameleon"}
_BOS_ALWAYS = ("gemma4", "granite-embed-multi-311m")  # also where the file says no


def read_gguf_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a .gguf file.

    Raises UserError for a way of cutting a text that is not known here; what transformers' reader
    raises passes through.
    """
    from transformers import AutoTokenizer

    header = read_gguf_table(path)
    with quiet_libraries(), panic_named(f"the tokenizer in {path} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if header.facts.get("tokenizer.ggml.model") == "gpt2":
        _set_cut(path, tokenizer, header.facts.get("tokenizer.ggml.pre"))
    elif header.facts.get("tokenizer.ggml.add_space_prefix") is False:
        _set_no_prefix(tokenizer.backend_tokenizer)
    if tokenizer.bos_token is not None and tokenizer.add_bos_token != adds_bos(header):
        tokenizer.add_bos_token = adds_bos(header)
    return tokenizer


def adds_bos(header: GgufHeader) -> bool:
    """Say whether llama.cpp, and so Ollama, puts BOS before every prompt."""
    facts = header.facts
    kind, cut = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    is_byte_level = kind in _BYTE_LEVEL
    if kind == "gemma4" or (is_byte_level and cut in _BOS_ALWAYS):
        return True
    noted = facts.get("tokenizer.ggml.add_bos_token")
    if noted is not None:
        return bool(noted)
    return kind in _BOS_BY_KIND or (is_byte_level and cut in _BOS_BY_CUT)


def _set_cut(path: Path, tokenizer: Any, name: str | None) -> None:
    try:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(name)
    except KeyError as error:
        raise UserError(
            f"{path} cuts a text into words in a way that is not read from GGUF files "
            f"(tokenizer.ggml.pre: {name}): give --model the safetensors model that it was made of"
        ) from error
    if name in WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True


def _set_no_prefix(backend: Any) -> None:
    """Put no space before a text, and take none from before an answer."""
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
