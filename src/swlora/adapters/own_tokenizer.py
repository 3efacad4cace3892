"""An adapter's own tokenizer beside that of a model which is loaded already, and stays.

An adapter that is loaded with its model brings its tokenizer (`on_base.adapted_spec`). Where
several share one model, as in a server and a chat, they share its tokenizer too, and one that was
trained with another would read other tokens. Files are compared, none is given to a library.
"""

from pathlib import Path
from typing import Any

from swlora.adapters.saved import TOKENIZER_CONFIG
from swlora.bounded_read import UnreadableError, read_bounded, read_json_object
from swlora.models.tokenizer_folder import MAX_FILE_BYTES, TOKENIZER

TEMPLATE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1 << 20


def other_tokens(
    folder: Path, tokenizer: Any, *, is_chat: bool, follow_links: bool = True
) -> str | None:
    """Say in what the adapter in `folder` was trained with other tokens than a tokenizer's.

    That is its vocabulary or, of one that was trained on chats, its chat template. None where both
    are the same, and for an adapter that brings no tokenizer.
    """
    if _has_other_vocabulary(folder, tokenizer, follow_links):
        what = "vocabulary"
    elif is_chat and _has_other_template(folder, tokenizer, follow_links):
        what = "chat template"
    else:
        return None
    return (
        f"it was trained with a tokenizer of another {what} than the one in use; start again with "
        "the adapter's folder as --tokenizer"
    )


def _has_other_template(folder: Path, tokenizer: Any, follow_links: bool) -> bool:
    """Say whether the adapter's template is another text; False where one has none, or several."""
    own: Any = _text(folder / TEMPLATE, follow_links)
    if not own:  # older versions of transformers had it here
        own = _object(folder / TOKENIZER_CONFIG, follow_links).get("chat_template")
    template = getattr(tokenizer, "chat_template", None)
    return isinstance(own, str) and isinstance(template, str) and own.strip() != template.strip()


def _has_other_vocabulary(folder: Path, tokenizer: Any, follow_links: bool) -> bool:
    """Say whether a token of the adapter's has another id; False where it has no tokenizer.json.

    More tokens on one side are no other ones: a .gguf file has one for every spare embedding.
    """
    own = _vocabulary(_object(folder / TOKENIZER, follow_links))
    known = tokenizer.get_vocab()
    return any(known.get(token, number) != number for token, number in own.items())


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return the ids of a tokenizer's tokens; {} for what is none."""
    if not isinstance(tokenizer.get("model"), dict):
        return {}
    vocab, added = tokenizer["model"].get("vocab"), tokenizer.get("added_tokens")
    if isinstance(vocab, list):  # Unigram's: [token, score]
        entries = [entry if isinstance(entry, list) and entry else [None] for entry in vocab]
        vocab = {str(entry[0]): k for k, entry in enumerate(entries)}
    found = dict(vocab) if isinstance(vocab, dict) else {}
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            found[str(token.get("content"))] = token.get("id")
    return found


def _text(path: Path, follow_links: bool) -> str:
    """Return the text of a template; "" where there is none that can be read."""
    try:
        content, is_whole = read_bounded(path, MAX_TEMPLATE_BYTES, follow_links=follow_links)
    except UnreadableError:
        return ""
    return content.decode("utf-8", "replace") if is_whole else ""


def _object(path: Path, follow_links: bool) -> dict[str, Any]:
    """Return the JSON object in a file; {} where there is none: whoever loads it says so."""
    try:
        return read_json_object(path, max_bytes=MAX_FILE_BYTES, follow_links=follow_links)
    except UnreadableError:
        return {}
