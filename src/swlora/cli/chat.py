"""`swlora chat`: a conversation on a terminal, or line by line from a file.

Answers go to stdout, everything else to stderr.
"""

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.config import DecodeSpec, RunSpec
from swlora.errors import UserError
from swlora.paths import expanded
from swlora.progress import Progress

if TYPE_CHECKING:
    from swlora.evaluation.conversation import Conversation

DEFAULTS = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 512}  # livelier than evaluation
COMMANDS = """\
/adapter DIR   answer with the adapter in DIR, an adapter or run folder
/base          answer with the model alone
/system TEXT   begin with this system turn; without TEXT, with none
/reset         forget all turns but the system turn
/help          show this
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""


def talk(
    spec: RunSpec, adapter: Path | None, system: str | None, progress: Progress
) -> dict[str, Any]:
    """Hold a conversation over stdin and stdout; return its turns and what they came from."""
    decode = chat_settings(spec.decode)
    from swlora.adapters.on_base import adapted_spec
    from swlora.adapters.saved import adapter_folder
    from swlora.evaluation.conversation import Conversation
    from swlora.models.load import load_model

    model = spec.model
    if adapter:  # a mistyped one shall not cost a model's loading
        model = adapted_spec(adapter_folder(adapter), model)
    with progress.task("load the model"):
        loaded = load_model(model)
    progress.say(f"model: {loaded.source}")
    with closing(Conversation(loaded, decode, spec.seed, progress.say)) as conversation:
        conversation.system = system
        if adapter:
            conversation.use(adapter)
        if sys.stdin.isatty():
            progress.say("/help lists the commands, /quit ends")
        converse(conversation, is_terminal=sys.stdin.isatty())
        return {
            "model": loaded.source,
            "adapter": conversation.adapter and str(conversation.adapter),
            "system": conversation.system,
            "turns": [{"role": role, "content": text} for role, text in conversation.turns],
            "seed": spec.seed,
        }


def chat_settings(decode: DecodeSpec) -> DecodeSpec:
    """Return the settings with chat's own defaults for what was left open.

    Raises UserError for what a text that is shown as it is written cannot have.
    """
    for name in ("num_beams", "length_penalty", "no_repeat_ngram_size"):
        if getattr(decode, name) != DecodeSpec.model_fields[name].default:
            raise UserError(
                f"chat shows an answer as it is written: leave decode.{name} out of --config"
            )
    left_open = {n: value for n, value in DEFAULTS.items() if n not in decode.model_fields_set}
    return decode.model_copy(update=left_open)


def converse(conversation: "Conversation", *, is_terminal: bool) -> None:
    """Take lines from stdin until they end or /quit.

    On a terminal a mistake is said and the conversation goes on, and Ctrl-C stops an answer only;
    lines of a file stop at a mistake (UserError), since what follows was written for its success.
    """
    for line in _lines(is_terminal):
        try:
            if line.startswith("/"):
                if not _obey(conversation, line):
                    return
            elif line.strip():
                _answer(conversation, line)
        except UserError as error:
            if not is_terminal:
                raise
            _say(str(error))
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _say("(stopped)")


def _lines(is_terminal: bool) -> Iterator[str]:
    if not is_terminal:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  gives input() a history and editing
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _say("/quit or Ctrl-D ends")


def _obey(conversation: "Conversation", line: str) -> bool:
    """Do what a command says; False where the conversation is to end."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/quit":
        return False
    if command == "/help":
        _say(COMMANDS)
    elif command == "/reset":
        conversation.reset()
        _say("the conversation begins anew")
    elif command == "/base":
        conversation.use(None)
        _say("answers now come from the model alone")
    elif command == "/system":
        conversation.system = rest or None
        _say("the system turn is set" if rest else "there is no system turn")
    elif command == "/adapter" and rest:
        conversation.use(expanded(rest))
        _say(f"answers now come from {conversation.adapter}")
    elif command == "/adapter":
        raise UserError("/adapter needs a folder: /adapter runs/mine")
    else:
        raise UserError(
            f"there is no command {command}; /help lists them (a space before it: text)"
        )
    return True


def _answer(conversation: "Conversation", text: str) -> None:
    """Print an answer as it is written."""
    begun = False
    try:
        with closing(conversation.answer(text)) as pieces:
            for piece in pieces:
                begun = True
                print(piece, end="", flush=True)
    finally:
        if begun:
            print(flush=True)
    if not begun:
        _say("(an empty answer)")
    if conversation.is_cut_off:
        _say("(the answer was cut off there: see --max-new-tokens)")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
