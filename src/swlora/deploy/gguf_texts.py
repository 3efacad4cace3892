"""Texts that a GGUF file's tokenizer is held against, and what llama.cpp does at special tokens.

llama.cpp cuts a text at its special tokens and puts SentencePiece's space before every piece, or
before none (`add_space_prefix`). Tokenizers of the kind LlamaTokenizer put one before a whole text
alone, unless they are "legacy": no file can have both its plain texts and its chats. White space
behind special tokens is taken by them only in a model that is named as Phi-3 (`general.name`).
"""

import re
from collections.abc import Sequence
from typing import Any

from swlora.deploy.agreement import chat_texts
from swlora.models.gguf_tokenizer import PHI3_TOKENS, SPACE, is_named_phi3

# Digits, apostrophes, spaces and letters of several alphabets: what cuts differ in, and what NFKC
# or small letters would change
TEXTS = (
    "It's 2024: 12345 items, don't they'll?\n\n  Two  spaces.",
    "caf\u00e9, na\u00efve; \u4f60\u597d",
    "\u00c9COLE \uff21\uff22\u00bd \ufb01n \u00df\u0130 \u01c5",
    " x\t\ty \r\n z  ",
)


def compared_texts(*tokenizers: Any, has_space: bool) -> list[str]:
    """Return the plain texts that tokenizers are compared on; the first one is the model's.

    has_space: whether the file puts a space before texts. Where it does not, as chats need it, and
    the model's tokenizer does before whole texts, they stand behind a special token, as in a chat.
    None begins with a space where a tokenizer makes nothing of it, as Llama 2's does; llama.cpp
    makes a token of it.
    """
    is_lost = any(t.tokenize(" x") == t.tokenize("x") for t in tokenizers)
    texts = [text.lstrip(" ") if is_lost else text for text in TEXTS]
    if not has_space and has_space_at_first_only(tokenizers[0]):
        return [f"{_special_token(tokenizers[0])}{text}" for text in texts]
    return texts


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, without BOS or EOS."""
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def has_space_at_first_only(tokenizer: Any) -> bool:
    """Say whether a tokenizer puts a space before a whole text, and none behind a special token."""
    behind = tokenizer.tokenize(f"{_special_token(tokenizer)}x")[1:]
    return _puts_space(tokenizer) and bool(behind) and not behind[0].startswith(SPACE)


def wants_space(tokenizer: Any, *, for_chats: bool) -> bool:
    """Say whether llama.cpp is to put SentencePiece's space before the pieces of a text.

    for_chats: where one of both can be right, chats that begin with a special token shall be.
    """
    if not (for_chats and has_space_at_first_only(tokenizer)):
        return _puts_space(tokenizer)
    added = tokenizer.added_tokens_decoder
    chats = token_ids(tokenizer, chat_texts(tokenizer))
    return not chats or any(not ids or ids[0] not in added for ids in chats)


def notes_on_tokens(
    tokenizer: Any, *, has_space: bool, chats_equal: bool | None, is_lora: bool
) -> list[str]:
    """Return what a person should know of the tokens that llama.cpp makes of texts and chats.

    has_space: whether the file, or the base that a LoRA was checked on, puts a space before texts.
    """
    if chats_equal is False:
        return [
            "llama.cpp cuts chats into other tokens than the tokenizer does, at special tokens: "
            "the tokenizer puts a space before a text alone, llama.cpp behind each or nowhere"
        ]
    if has_space or not has_space_at_first_only(tokenizer):
        return []
    if is_lora:
        return [
            "the base's file must put no space before texts (tokenizer.ggml.add_space_prefix), as "
            "one of `swlora export --gguf` does: else llama.cpp cuts chats into other tokens"
        ]
    return [
        "the tokenizer puts a space before a text and none behind special tokens, llama.cpp before "
        "both or none: none here, as chats need, so a text that is no chat begins otherwise"
    ]


def name_in_file(tokenizer: Any, name: str) -> str:
    """Return the name for which llama.cpp takes white space behind special tokens, or keeps it.

    A model that is named as Phi-3 and lacks one of its tokens would not even be loaded.
    """
    takes = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if takes and tokenizer.get_vocab().keys() >= set(PHI3_TOKENS):
        return name if is_named_phi3(name) else f"{name} (phi-3)"
    return re.sub("(?i)(phi)-?3", r"\1_3", name)


def _puts_space(tokenizer: Any) -> bool:
    return bool(tokenizer.tokenize("x")[0].startswith(SPACE))


def _special_token(tokenizer: Any) -> str:
    return str(tokenizer.bos_token or tokenizer.eos_token)
