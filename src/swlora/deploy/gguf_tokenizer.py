"""A tokenizer as a GGUF file has it: its tokens, what kind each is, and how they are merged.

llama.cpp knows two kinds that matter here: byte-level BPE, whose way of cutting a text into words
is known by a name, and SentencePiece's BPE, which has scores in the place of merges. Both are read
off the fast tokenizer's own description. A cut that has no name is refused, since another one gives
other tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swlora.deploy.gguf_texts import wants_space
from swlora.errors import UserError
from swlora.models.gguf_cuts import GPT2, GPT4O, LLAMA3, QWEN2, TEKKEN
from swlora.models.gguf_tokenizer import SPACE

# How a text is cut, step by step, and llama.cpp's name for it. Where merges are passed over for a
# word that is a token (ignore_merges), llama.cpp has another name.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    (("digits", GPT2), False): "smollm",
    (("punctuation", GPT2, "numbers", "[0-9][0-9][0-9]"), False): "falcon",
    ((QWEN2,), False): "qwen2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class GgufTokens:
    """The fields of a tokenizer, without its chat template and special tokens.

    `model` is "gpt2" for byte-level BPE, with merges and a name of its cut (`pre`), or "llama" for
    SentencePiece, with scores.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    add_space_prefix: bool


def read_tokens(tokenizer: Any, n_embeddings: int, *, for_chats: bool = True) -> GgufTokens:
    """Return a fast tokenizer's tokens, one for each embedding of a model.

    for_chats: see `wants_space`. Raises UserError for one that llama.cpp has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the tokenizer has no fast form, which a GGUF file is written from")
    facts = json.loads(backend.to_str())
    model = facts["model"]
    if model["type"] != "BPE":
        raise UserError(f"tokenizers of the kind {model['type']} are not exported, only BPE")
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if not merges:
        raise UserError("the tokenizer has no merges, and llama.cpp reads none without")
    _check_steps(facts)
    names = _names(tokenizer, n_embeddings)
    types = _types(tokenizer, names, facts["added_tokens"])
    if _is_sentencepiece(facts):
        prefixed = wants_space(tokenizer, for_chats=for_chats)
        scores = _scores(names, merges)
        return GgufTokens("llama", "default", names, types, [], scores, prefixed)
    pre = PRE_TOKENIZERS.get((_cuts(facts["pre_tokenizer"]), bool(model.get("ignore_merges"))))
    if pre is None:
        raise UserError(
            "llama.cpp has no name that is known here for how this tokenizer cuts a text into "
            "words, so no GGUF file is written; give the model's own file with --base-gguf"
        )
    joined = [" ".join(pair) for pair in merges]
    return GgufTokens("gpt2", pre, names, types, joined, [], add_space_prefix=False)


def write_tokenizer(
    writer: Any, tokenizer: Any, n_embeddings: int, ends: Sequence[int], *, for_chats: bool
) -> None:
    """Add a tokenizer to a `gguf.GGUFWriter`: tokens, special ones, the chat template.

    ends: the ids of all tokens that end a text. for_chats: see `wants_space`.
    """
    tokens = read_tokens(tokenizer, n_embeddings, for_chats=for_chats)
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.types)
    if tokens.merges:
        writer.add_token_merges(tokens.merges)
    if tokens.scores:
        writer.add_token_scores(tokens.scores)
    writer.add_add_space_prefix(tokens.add_space_prefix)
    for token_id, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token_id is not None and token_id < n_embeddings:
            add(token_id)
    others = [token_id for token_id in ends if token_id != tokenizer.eos_token_id]
    for token_id, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id)):  # noqa: B905 - llama.cpp has two more places
        add(token_id)
    token_ids = tokenizer("x").input_ids
    writer.add_add_bos_token(token_ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(token_ids[-1] == tokenizer.eos_token_id)
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, dict):  # as some tokenizers have another one for chats with tools
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    if templates:
        writer.add_chat_template(templates)


def _names(tokenizer: Any, n_embeddings: int) -> list[str]:
    """Return a name for each embedding; those beyond the vocabulary get one that no text has."""
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    return [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(n_embeddings)]


def _types(tokenizer: Any, names: Sequence[str], added: Sequence[dict[str, Any]]) -> list[int]:
    known = set(tokenizer.get_vocab().values())
    types = [NORMAL if token_id in known else UNUSED for token_id in range(len(names))]
    for token_id, name in enumerate(names):
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            types[token_id] = BYTE
    for token in added:
        if token["id"] < len(types):
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown < len(types) and names[unknown] in ("<unk>", "[UNK]"):
        types[unknown] = UNKNOWN
    return types


def _check_steps(facts: dict[str, Any]) -> None:
    """Refuse what is done to a text or its words that llama.cpp does not do.

    NFC is let pass, though llama.cpp does not compose letters: texts have them composed, by far
    most of them, and all files of Qwen's models are so.
    """
    is_spm = _is_sentencepiece(facts)
    unknown = [
        step["type"]
        for step in _flat(facts["normalizer"], "normalizers")
        if not (_is_space(step) if is_spm else step["type"] == "NFC")
    ]
    if is_spm:
        steps = _flat(facts["pre_tokenizer"], "pretokenizers")
        unknown += [step["type"] for step in steps if not _cuts_nothing(step)]
    model = facts["model"]
    own = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    unknown += [name for name in own if model.get(name)]
    if unknown:
        raise UserError(
            f"the tokenizer has a step that llama.cpp has not ({', '.join(unknown)}): the file "
            "would give other tokens, so none is written"
        )


def _flat(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """Return the single steps of a step, which may be a sequence of them under the key `parts`."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [single for part in step[parts] for single in _flat(part, parts)]
    return [step]


def _is_space(step: dict[str, Any]) -> bool:
    """Say whether a normalizer only writes spaces as SentencePiece does."""
    if step["type"] == "Prepend":
        return bool(step["prepend"] == SPACE)
    is_replace = step["type"] == "Replace" and step["pattern"] == {"String": " "}
    return bool(is_replace and step["content"] == SPACE)


def _cuts_nothing(step: dict[str, Any]) -> bool:
    """Say whether a pre-tokenizer leaves a SentencePiece text whole: there are no spaces in it."""
    if step["type"] == "Metaspace":
        return bool(step["replacement"] == SPACE and not step.get("split", True))
    return bool(step["type"] == "Split" and step["pattern"] == {"String": " "})


def _is_sentencepiece(facts: dict[str, Any]) -> bool:
    return bool(facts["model"].get("byte_fallback")) or SPACE in json.dumps(
        [facts["normalizer"], facts["pre_tokenizer"]], ensure_ascii=False
    )


def _scores(names: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return scores that rank what is merged as the merges do: the earlier, the higher.

    The order of scores is all that llama.cpp looks at.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(name, len(merges))) for name in names]


def _cuts(step: dict[str, Any] | None) -> tuple[str, ...]:
    """Return how a text is cut into words, step by step; "?" for a step that is not known."""
    if step is None:
        return ("?",)
    kind = step["type"]
    if kind == "Sequence":
        return tuple(cut for part in step["pretokenizers"] for cut in _cuts(part))
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            return ("?",)
        return (GPT2,) if step.get("use_regex", True) else ()
    if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
        return (str(step["pattern"].get("Regex", "?")),)
    if kind == "Split" and step["behavior"] == "Removed" and step.get("invert"):  # the same
        return (str(step["pattern"].get("Regex", "?")),)
    if kind == "Digits":
        return ("digits" if step["individual_digits"] else "numbers",)
    if kind == "Punctuation" and step["behavior"] == "Contiguous":
        return ("punctuation",)
    return ("?",)
