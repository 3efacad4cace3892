"""What a model says while it is trained: the same prompts at every measurement, greedily.

Nothing of the training changes: no random number is drawn, and the model's mode is put back.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.adapters.methods import train_mode
from swlora.bounded_read import UnreadableError, read_bounded
from swlora.config import DecodeSpec, TrainSpec
from swlora.data.known_tokens import check_prompts
from swlora.errors import UserError
from swlora.evaluation.dealt import dealt_texts
from swlora.evaluation.decode import check_room, end_tokens, generate
from swlora.evaluation.prompting import prompt_ids
from swlora.models.anatomy import n_embeddings
from swlora.models.load import LoadedModel
from swlora.paths import may_be_path
from swlora.printable import escaped
from swlora.progress import Silent
from swlora.samples_file import Sample

MAX_PROMPTS = 64
MAX_FILE_BYTES = 1 << 20
FILE_ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".md")
SHOWN, SHOWN_CHARACTERS = 3, 100
Take = Callable[[list[Sample]], None]


def read_prompts(given: Sequence[str]) -> list[str]:
    """Return the prompts of --sample-prompts: texts, or the lines of files that they name.

    A line of a .jsonl file is a JSON string, or an object with a "prompt". Raises UserError for a
    file that is not there or holds none, and for more than MAX_PROMPTS.
    """
    prompts: list[str] = []
    for text in given:
        prompts += _lines(Path(text)) if _is_of_file(text) else [text]
    if len(prompts) > MAX_PROMPTS:
        raise UserError(f"--sample-prompts takes {MAX_PROMPTS} prompts at most, not {len(prompts)}")
    return prompts


def _is_of_file(text: str) -> bool:
    """Say that a text names a file, be it one that is not there."""
    may_be = "\n" not in text and may_be_path(text)
    return may_be and (text.endswith(FILE_ENDINGS) or Path(text).is_file())


def _lines(path: Path) -> list[str]:
    flag = "--sample-prompts"
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}")
    try:
        content, is_whole = read_bounded(path, MAX_FILE_BYTES)
        if not is_whole:
            raise UserError(f"{flag}: {path} is longer than {MAX_FILE_BYTES:,} bytes")
        # Not the text's: they end lines within JSON strings too, at U+2028 and its like.
        lines = [line.decode("utf-8") for line in content.removeprefix(BOM_UTF8).splitlines()]
    except (UnreadableError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: {path} cannot be read as text: {error}") from error
    found = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"{flag}: {path} holds no prompt")
    if path.suffix != ".jsonl":
        return [line for _, line in found]
    return [_prompt_of(line, f"{path}, line {number}") for number, line in found]


def _prompt_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or too deep
        row = None
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f'--sample-prompts: {place} is neither a JSON string nor has a "prompt"')
    return prompt


@dataclass(frozen=True)
class Sampler:
    """Generates what follows each prompt, for the model as it is after a step.

    `token_ids` are those of the `prompts`, as the training shows them; a text ends at any of
    `end_token_ids`. `take` is given the samples, in the first of several processes.
    """

    prompts: Sequence[str]
    token_ids: Sequence[list[int]]
    tokenizer: Any
    end_token_ids: Sequence[int]
    every: int
    n_tokens: int
    take: Take

    def __call__(self, model: Any, step: int, measurement: int) -> None:
        """Generate where it is time to, after the `measurement`-th one (counted from 1)."""
        if measurement % self.every:
            return
        model.eval()
        try:
            texts = self._texts(model)
        finally:
            train_mode(model)
        self.take([Sample(step, p, t) for p, t in zip(self.prompts, texts, strict=True)])

    def _texts(self, model: Any) -> list[str]:
        spec = DecodeSpec(max_new_tokens=self.n_tokens)

        def some(numbers: Sequence[int]) -> list[str]:
            return generate(
                model,
                self.tokenizer,
                self.token_ids,
                spec,
                Silent(),
                end_token_ids=self.end_token_ids,
                only=numbers,
            )

        return dealt_texts([len(ids) + self.n_tokens for ids in self.token_ids], some)


def make_sampler(
    loaded: LoadedModel, spec: TrainSpec, *, is_chat: bool, separator: str, take: Take
) -> Sampler | None:
    """Return what generates as `spec` asks; None where it asks for nothing.

    Prompts are written as in the training: as a user's turn, or with its separator. Raises
    UserError where one leaves no room for an answer.
    """
    if not (prompts := read_prompts(spec.sample_prompts)):
        return None
    ids = prompt_ids(prompts, loaded.tokenizer, is_chat=is_chat, separator=separator)
    check_prompts(ids, loaded.tokenizer, n_embeddings(loaded.model))
    check_room(loaded.model, ids, DecodeSpec(max_new_tokens=spec.sample_tokens))
    ends = end_tokens(loaded, is_chat=is_chat)
    every, n_tokens = spec.sample_every, spec.sample_tokens
    return Sampler(prompts, ids, loaded.tokenizer, ends, every, n_tokens, take)


def shown(samples: Sequence[Sample]) -> list[str]:
    """Return the first samples as lines for a person."""
    lines = [
        f"after step {s.step:,}: {_short(s.prompt)} → {_short(s.text) or '(nothing)'}"
        for s in samples[:SHOWN]
    ]
    n_more = len(samples) - SHOWN
    return [*lines, f"and {n_more} more"] if n_more > 0 else lines


def _short(text: str) -> str:
    text = escaped(" ".join(text.split()))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
