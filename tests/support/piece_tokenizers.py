"""Tokenizers that take texts apart in the ways of well-known families, with merges of white space.

Those of `OVER_LINES` do not take line breaks apart, and have learnt tokens that reach over some.
"""

import random
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PIECES = [
    *(
        "word",
        "Word",
        "don't",
        " of",
        " a",
        "12345",
        "x1",
        "é",
        "中文",
        "の",
        "ـع",
        "e\u0301",
        "🙂",
    ),
    *(".", ",", '."', "。", "!", "…", "”", "“", "- ", "# ", "(", "/", "//", "{", "'s", "\u00a0"),
    *("\n", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n", "\r\n\r\n", "\n  \n", " \n", "\n\t", "\n    "),
    *(" ", "  ", "\t", "\u2028", "\u3000", "</s>", "word" * 9, "ab" * 20, "7" * 40),
]
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'ll)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'ll)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def text_of_pieces(seed: int, n: int) -> str:
    """Return a text in which anything may stand beside a line break."""
    return "".join(random.Random(seed).choices(PIECES, k=n))


def _by_bytes(*steps: Any) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return core


def _split(pattern: str) -> Tokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _by_bytes(pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level)


def _marked(normalizer: Any, pre_tokenizer: Any = None) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    return core


_SPACES = normalizers.Replace(" ", "▁")
_MAKERS = {
    "GPT-2": lambda: _by_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "GPT-2 with a mark": lambda: _by_bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "SmolLM": lambda: _by_bytes(
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "Llama 3": lambda: _split(_LLAMA_3),
    "GPT-4o": lambda: _split(_GPT_4O),
    "Gemma, over lines": lambda: _marked(_SPACES, pre_tokenizers.Split("▁", "merged_with_next")),
    "Llama 2, over lines": lambda: _marked(
        normalizers.Sequence([normalizers.Prepend("▁"), _SPACES])
    ),
    "Unigram, over lines": lambda: _unigram(),
}
OVER_LINES = [name for name in _MAKERS if name.endswith("over lines")]


def _unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    return core


def _trained(core: Tokenizer) -> PreTrainedTokenizerFast:
    is_unigram = isinstance(core.model, models.Unigram)
    options: dict[str, Any] = {"vocab_size": 700, "special_tokens": ["<unk>", "</s>"]}
    if is_unigram:
        trainer: Any = trainers.UnigramTrainer(unk_token="<unk>", show_progress=False, **options)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet, **options)
    core.train_from_iterator([text_of_pieces(seed, 200) for seed in range(40)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {name: _trained(make()) for name, make in _MAKERS.items()}
