"""The tokenizer of a .gguf file, which cuts texts as the file says that they are cut.

transformers' tables (5.23) know the cuts of some names in `tokenizer.ggml.pre` and take GPT-2's for
all others, and never pass over merges for a word that is a token. Both are set here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers

from swlora.library_noise import quiet_libraries
from swlora.models.gguf_header import read_gguf_table


def _smollm() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _falcon() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )


_CUTS: dict[str, Callable[[], Any]] = {"smollm": _smollm, "falcon": _falcon}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token stays one


def read_gguf_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a .gguf file; what transformers' reader raises passes through."""
    from transformers import AutoTokenizer

    pre = read_gguf_table(path).facts.get("tokenizer.ggml.pre")
    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if pre in _CUTS:
        tokenizer.backend_tokenizer.pre_tokenizer = _CUTS[pre]()
    if pre in _WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer
