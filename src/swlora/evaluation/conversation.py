"""A conversation with a model: turns that are kept, answers that come piece by piece.

Every answer is a new text behind the whole conversation, written by the tokenizer's chat template.
"""

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from swlora.adapters.on_base import warn_of_other_base
from swlora.adapters.own_tokenizer import other_tokens
from swlora.adapters.saved import adapter_folder, read_facts
from swlora.adapters.temporary import adapter_on
from swlora.config import DecodeSpec
from swlora.decoding.batch import BatchDecoder, DecodeRequest
from swlora.decoding.sampling import Sampling
from swlora.errors import UserError
from swlora.evaluation.decode import chat_end_token_ids, generate, joins_batches
from swlora.evaluation.prompting import NOT_A_CHAT, Say, chat_ids
from swlora.evaluation.text_stream import Detokeniser
from swlora.models.identity import weights_sample_sha256
from swlora.models.load import LoadedModel
from swlora.progress import Silent
from swlora.threads import adapted_threads

ROOM_SHARE = 4  # an answer may always take one part in so many of the context


class Conversation:
    """One person's turns with one model, or an adapter on it; `close` gives the model back.

    `say` is told what a person should know. Raises UserError for a model without a chat template.
    """

    def __init__(self, loaded: LoadedModel, decode: DecodeSpec, seed: int, say: Say) -> None:
        if not getattr(loaded.tokenizer, "chat_template", None):
            raise UserError(
                "this model's tokenizer has no chat template: chat needs a model made for it; "
                "`swlora generate` continues a prompt"
            )
        self._loaded, self._decode, self._seed, self._say = loaded, decode, seed, say
        self._sample = weights_sample_sha256(loaded.model)
        self._ends = chat_end_token_ids(loaded)
        self._applied = ExitStack()
        self._model = loaded.model
        self._decoder: BatchDecoder | None = None
        self._n_answers = 0
        self.is_cut_off = False  # the newest answer, by max_new_tokens or the context
        self.adapter: Path | None = None
        self.system: str | None = None
        self.turns: list[tuple[str, str]] = []  # (role, content), without the system turn

    def use(self, adapter: Path | None) -> None:
        """Answer with the adapter in a folder (a run folder will do), or with None.

        The turns stay. Raises UserError, and goes on with what was there, where it does not fit.
        """
        folder = adapter_folder(adapter) if adapter else None
        facts = read_facts(folder) if folder else {}
        before = self.adapter
        try:
            self._switch(folder)
        except UserError:
            self._switch(before)
            raise
        if folder:
            warn_of_other_base(folder, self._loaded.source, self._sample, self._say)
            is_chat = facts.get("is_chat") is True
            if said := other_tokens(folder, self._loaded.tokenizer, is_chat=is_chat):
                self._say(f"warning: the adapter in {folder}: {said}")
        if facts.get("is_chat") is False:
            self._say(NOT_A_CHAT)

    def reset(self) -> None:
        """Forget all turns but the system turn."""
        self.turns.clear()

    def close(self) -> None:
        """Take the adapter off the model."""
        self._switch(None)

    def answer(self, text: str) -> Generator[str]:
        """Yield the answer to a user's turn, piece by piece; both are turns of the conversation.

        Whoever stops listening stops the computation; what was said until then is the answer.
        Raises UserError where the turn does not fit the model's context.
        """
        turns = [*self.turns, ("user", text)]
        prompt_ids, turns, n_new = self._fitted(turns)
        self._n_answers += 1
        self.is_cut_off = False
        said = ""
        try:
            for piece in self._pieces(prompt_ids, n_new):
                said += piece
                if piece:
                    yield piece
        finally:
            if said.strip():
                self.turns = [*turns, ("assistant", said.strip())]

    def _switch(self, folder: Path | None) -> None:
        self._applied.close()
        self.adapter, self._decoder, self._model = None, None, self._loaded.model
        if folder:
            self._model = self._applied.enter_context(adapter_on(self._loaded.model, folder))
            self.adapter = folder

    def _fitted(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[tuple[str, str]], int]:
        """Return (token ids, turns, new tokens), without the oldest turns that find no room."""
        context, left_out = self._loaded.context_tokens, 0
        wanted = min(self._decode.max_new_tokens, max(1, context // ROOM_SHARE))
        while True:
            prompt_ids = chat_ids(turns, self.system, self._loaded.tokenizer)
            if len(prompt_ids) + wanted <= context:
                break
            if len(turns) == 1:
                raise UserError(
                    f"this turn and the system turn have {len(prompt_ids):,} tokens, and the "
                    f"model's context of {context} has room for {context - wanted}; say less"
                )
            turns, left_out = turns[2:], left_out + 2
        if left_out:
            self._say(
                f"the model's context of {context} tokens is full: the oldest {left_out} turns are "
                "left out from here on"
            )
        return prompt_ids, turns, min(self._decode.max_new_tokens, context - len(prompt_ids))

    def _pieces(self, prompt_ids: list[int], n_new: int) -> Iterator[str]:
        """Yield a text as it is written, or at once where it cannot be had piece by piece."""
        words = np.random.SeedSequence([self._seed, self._n_answers]).generate_state(1)
        tokenizer, seed = self._loaded.tokenizer, int(words[0])
        if joins_batches(self._model):
            detokeniser = Detokeniser(tokenizer, prompt_ids)
            for token_id in self._tokens(prompt_ids, n_new, seed):
                yield detokeniser.add(token_id)
            yield detokeniser.finish()
            return
        decode = self._decode.model_copy(update={"max_new_tokens": n_new})
        ends = self._ends
        yield from generate(
            self._model, tokenizer, [prompt_ids], decode, Silent(), end_token_ids=ends, seed=seed
        )

    def _tokens(self, prompt_ids: list[int], n_new: int, seed: int) -> Iterator[int]:
        """Yield the tokens of an answer; an interruption may come at any moment."""
        sampling = Sampling(self._decode.temperature, self._decode.top_p, seed=seed)
        decoder = self._decoder or BatchDecoder(self._model, eos_token_ids=self._ends, max_slots=1)
        self._decoder = None  # one that is left in the middle is not used again
        decoder.admit([DecodeRequest(self._n_answers, prompt_ids, n_new, sampling)])
        reason = None
        with adapted_threads():
            while reason is None:
                for event in decoder.step():
                    reason = event.finish_reason
                    if reason != "eos":
                        yield event.token_id
        self.is_cut_off = reason == "length"
        self._decoder = decoder
