"""The tokenizer of a .gguf file, which makes of a text what llama.cpp makes of it.

transformers' tables (5.23) know the cuts of some names in `tokenizer.ggml.pre` and take GPT-2's for
all others, never pass over merges for a word that is a token, put a space before a whole text alone
whether the file says so or not, and BOS only where a byte-level file says it, and know nothing of
special tokens that take the white space behind them. All five are set here.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, normalizers

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
# llama.cpp has special tokens take the white space behind them where general.name holds one of
# these, in any letters; all but three. Such a file is not loaded where it lacks one of four tokens.
PHI3_NAMES = ("phi-3", "phi3")
PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")  # the white space behind them
PHI3_TOKENS = ("</s>", *PHI3_KEEPS)
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
    elif not puts_space(header):
        _set_no_prefix(tokenizer.backend_tokenizer)
    elif header.facts.get("tokenizer.ggml.model") == "llama":
        _set_prefix(tokenizer.backend_tokenizer)
    named = is_named_phi3(str(header.facts.get("general.name", "")))
    _set_white_space(tokenizer.backend_tokenizer, is_taken=named)
    if tokenizer.bos_token is not None and tokenizer.add_bos_token != adds_bos(header):
        tokenizer.add_bos_token = adds_bos(header)
    return tokenizer


def puts_space(header: GgufHeader) -> bool:
    """Say whether llama.cpp puts SentencePiece's space before a text, as it does by default."""
    return header.facts.get("tokenizer.ggml.add_space_prefix") is not False


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


def is_named_phi3(name: str) -> bool:
    """Say whether llama.cpp takes a model of this name for a Phi-3 as it reads its tokenizer."""
    return any(part in name.lower() for part in PHI3_NAMES)


def _set_white_space(backend: Any, *, is_taken: bool) -> None:
    """Have special tokens take the white space behind them, or leave it there.

    transformers has those of the architecture phi3 take it, whatever the file is called.
    """
    for token in backend.get_added_tokens_decoder().values():
        takes = is_taken and token.content not in PHI3_KEEPS
        if token.rstrip != takes:
            like = {"special": token.special, "normalized": token.normalized}
            backend.add_special_tokens([AddedToken(token.content, rstrip=takes, **like)])


def _set_prefix(backend: Any) -> None:
    """Put a space before a text, and before what stands behind a special token."""
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.pre_tokenizer = None


def _set_no_prefix(backend: Any) -> None:
    """Put no space before a text, and take none from before an answer."""
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
