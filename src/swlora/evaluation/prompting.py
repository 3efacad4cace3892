"""A person's prompt as training would have shown it: as plain text, or as a turn of a chat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.adapters.on_base import load_with_adapter
from swlora.config import RunSpec
from swlora.data.encode import encode_prompts, encode_turns
from swlora.data.examples import Example, Message
from swlora.errors import UserError
from swlora.evaluation.decode import end_tokens, generate
from swlora.models.load import LoadedModel
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
    check_form(prompt)
    loaded = load_with_adapter(spec.model, adapter, progress.say)
    return generate_texts(spec, [prompt], loaded, progress)[0]


def generate_texts(
    spec: RunSpec, prompts: Sequence[Prompt], loaded: LoadedModel, progress: Progress
) -> list[Generated]:
    """Continue or answer prompts, all in the form of the first, as `generate_text` does one."""
    check_form(prompts[0])
    is_chat, system = choose_form(prompts[0], loaded, progress.say), prompts[0].system
    texts = [prompt.text for prompt in prompts]
    separator = (loaded.adapter_facts or {}).get("separator", "")
    ids = prompt_ids(texts, loaded.tokenizer, is_chat=is_chat, separator=separator, system=system)
    generated = generate(
        loaded.model,
        loaded.tokenizer,
        ids,
        spec.decode,
        progress,
        end_token_ids=end_tokens(loaded, is_chat=is_chat),
        seed=spec.seed,
    )
    return [
        Generated(loaded.source, prompt, is_chat, system, text, spec.seed)
        for prompt, text in zip(texts, generated, strict=True)
    ]


def check_form(prompt: Prompt) -> None:
    """Raise UserError for a system turn of what is no chat."""
    if prompt.chat is False and prompt.system is not None:
        raise UserError("--system is a turn of a chat: leave out --no-chat")


def choose_form(prompt: Prompt, loaded: LoadedModel, say: Say) -> bool:
    """Return whether a prompt is written as a chat, and say so where a person could wonder.

    Raises UserError where a chat is asked for and the tokenizer has no template.
    """
    facts = loaded.adapter_facts
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


def prompt_ids(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    is_chat: bool,
    separator: str,
    system: str | None = None,
) -> list[list[int]]:
    """Return the token ids of prompts as a training shows them: users' turns, or with a separator.

    Raises UserError as `chat_ids` does.
    """
    if is_chat:
        return [chat_ids([("user", text)], system, tokenizer) for text in texts]
    return encode_prompts([Example(text, "") for text in texts], separator, tokenizer)


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
