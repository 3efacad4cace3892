"""A person's prompt as training would have shown it: as plain text, or as a turn of a chat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.adapters.card import Facts
from swlora.adapters.saved import adapter_folder, read_facts, with_adapter
from swlora.config import RunSpec
from swlora.data.encode import encode_prompts, encode_turns
from swlora.data.examples import Example, Message
from swlora.errors import UserError
from swlora.evaluation.decode import chat_end_token_ids, generate
from swlora.models.load import LoadedModel, load_model
from swlora.progress import Progress

Say = Callable[[str], None]
NOT_A_CHAT = "the adapter was trained on prompts with completions, not on chats"


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or (`chat`) a user's turn to answer, behind a `system` turn if any.

    `chat` None leaves it to the adapter: one that was trained on chats wants a chat.
    """

    text: str
    chat: bool | None = None
    system: str | None = None


@dataclass(frozen=True)
class Generated:
    """A text, what it continues or answers (`chat`), and what it came from."""

    model: str
    prompt: str
    chat: bool
    system: str | None
    text: str
    seed: int


def generate_text(
    spec: RunSpec, prompt: Prompt, adapter: Path | None, progress: Progress
) -> Generated:
    """Continue or answer one prompt with the base model or an adapter.

    An adapter that was trained here gets its prompt as in training: through the chat template, or
    with its separator.
    """
    folder = adapter_folder(adapter) if adapter else None
    if prompt.chat is False and prompt.system is not None:
        raise UserError("--system is a turn of a chat: leave out --no-chat")
    loaded = load_model(spec.model)
    progress.say(f"model: {loaded.source}")
    facts = read_facts(folder) if folder else {}
    is_chat = choose_form(prompt, None if folder is None else facts, loaded, progress.say)
    if folder:
        loaded = with_adapter(loaded, folder, progress.say)
    if is_chat:
        prompt_ids = chat_ids([("user", prompt.text)], prompt.system, loaded.tokenizer)
    else:
        separator = facts.get("separator", "")
        (prompt_ids,) = encode_prompts([Example(prompt.text, "")], separator, loaded.tokenizer)
    (text,) = generate(
        loaded.model,
        loaded.tokenizer,
        [prompt_ids],
        spec.decode,
        progress,
        end_token_ids=chat_end_token_ids(loaded) if is_chat else loaded.end_token_ids,
        seed=spec.seed,
    )
    return Generated(loaded.source, prompt.text, is_chat, prompt.system, text, spec.seed)


def choose_form(prompt: Prompt, facts: Facts | None, loaded: LoadedModel, say: Say) -> bool:
    """Return whether a prompt is written as a chat, and say so where a person could wonder.

    `facts` are those of the adapter, None without one. Raises UserError where a chat is asked for
    and the tokenizer has no template.
    """
    has_template = bool(getattr(loaded.tokenizer, "chat_template", None))
    trained_on_chats = (facts or {}).get("is_chat")
    asked = True if prompt.system is not None else prompt.chat
    is_chat = bool(trained_on_chats if asked is None else asked)
    if is_chat and not has_template:
        advice = "use --no-chat" if asked is None else "leave out --chat and --system"
        raise UserError(f"this model's tokenizer has no chat template: {advice}")
    if is_chat and asked is None:
        say("the adapter was trained on chats: the prompt is a user's turn (--no-chat: plain text)")
    elif is_chat and trained_on_chats is False:
        say(NOT_A_CHAT)
    elif not is_chat and trained_on_chats:
        say("the adapter was trained on chats, but the prompt is plain text here")
    elif asked is None and facts is None and has_template:
        say("the prompt is plain text; --chat writes it as a user's turn by the chat template")
    return is_chat


def chat_ids(turns: Sequence[tuple[str, str]], system: str | None, tokenizer: Any) -> list[int]:
    """Return the token ids of a chat whose answer is to come; `turns` are (role, content).

    Raises UserError where the template refuses the turns, or leaves the system turn out in silence.
    """

    def ids(*before: tuple[str, str]) -> list[int]:
        return encode_turns([Message(*turn) for turn in (*before, *turns)], tokenizer)

    if system is None:
        return ids()
    shown = ids(("system", system))
    if shown == ids(("system", f"{system} x")):
        raise UserError("this model's chat template has no place for a system turn: leave it out")
    return shown
