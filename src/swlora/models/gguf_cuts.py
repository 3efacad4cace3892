"""How byte-level tokenizers cut a text into words, by llama.cpp's names (`tokenizer.ggml.pre`).

The names and what they stand for are those of src/llama-vocab.cpp of v0.4.0.
"""

from typing import Any

from tokenizers import Regex, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = _WORDS + r"|\p{N}" + _REST
LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_CAPITALS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = "".join(_CAPITALS) + r"|\p{N}" + _PATHS
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = _CAPITALS[0] + _ENDING + _CAPITALS[1] + _ENDING + r"|\p{N}{1,3}" + _PATHS
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

# A word that is a token stays one, whatever the merges say (ignore_merges)
_LLAMA3_WHOLE = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "jina-v5-nano",
)
WHOLE_WORDS = frozenset((*_LLAMA3_WHOLE, "tekken"))

_GPT2_NAMES = frozenset(
    (
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"),
        *("gigachat", "a.x-4.0", "mellum"),
    )
)
_DIGITS_NAMES = frozenset(
    (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        "mellum2",
    )
)
_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    (QWEN2,): (
        *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"),
        *("solar-open", "grok-2"),
    ),
    (LLAMA3,): (*_LLAMA3_WHOLE, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    (TEKKEN,): ("tekken",),
    (GPT4O,): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    _DEFAULT: ("default",),
}
_EXPRESSIONS = {name: parts for parts, names in _NAMES.items() for name in names}


def pre_tokenizer(name: str | None) -> Any:
    """Return the step of `tokenizers` that cuts as llama.cpp does under a name.

    None stands for a file that gives no name. Raises KeyError for a name that is not known here.
    """
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's cut is in it
    if name in _GPT2_NAMES:
        return bytes_of_words
    if name in _DIGITS_NAMES:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, bytes_of_words])
    if name == "falcon":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation(behavior="contiguous"),
                bytes_of_words,
                pre_tokenizers.Digits(individual_digits=False),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
            ]
        )
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(expression), behavior="isolated")
        for expression in _EXPRESSIONS[name or "default"]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)
