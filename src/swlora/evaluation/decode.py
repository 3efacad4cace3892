"""Text from a model: one generation a prompt.

Rows share a cache, and the place of what is finished goes to the next prompt: greedy and sampled
rows (`swlora.decoding.batch`), beams and n-gram blocking (`swlora.decoding.beams`). Beam
search as in the LoRA paper has num_beams 10, length_penalty 0.9 and no_repeat_ngram_size 4 (arXiv
2106.09685, table 11). Families whose attention cannot be replaced, adapters of more than
projections, and samples without repeated n-grams are left to `generate` of transformers, prompts
of similar length together. A sampled text depends on the seed and on its prompt's number, never on
its company.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import takewhile
from typing import Any

import torch

from swlora.adapters.reach import is_covered
from swlora.config import DecodeSpec
from swlora.data.chat_end import end_of_turn_tokens
from swlora.data.encode import encode_prompts
from swlora.data.examples import Example
from swlora.data.known_tokens import check_prompts
from swlora.decoding.batch import BatchDecoder, DecodeRequest
from swlora.decoding.beams import BeamDecoder, BeamSettings
from swlora.decoding.sampling import OwnDraws, Sampling, own_seed
from swlora.errors import UserError
from swlora.kernels.forwards import fast_forwards
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.rotary import RotaryLengths
from swlora.models.anatomy import context_tokens, family_of, n_embeddings
from swlora.models.load import LoadedModel
from swlora.plural import counted
from swlora.progress import Progress
from swlora.threads import adapted_threads

REFILL_SHARE = 8  # prompts wait until one place in so many is free: they are cheaper together
Prompts = Mapping[int, Sequence[int]]  # token ids by the prompt's number


@adapted_threads()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    spec: DecodeSpec,
    progress: Progress,
    *,
    end_token_ids: Collection[int],
    seed: int = 0,
    only: Sequence[int] | None = None,
) -> list[str]:
    """Return the generated text for every prompt (token ids), in their order.

    `only` numbers the prompts for which there is to be one, where not all; others have "".

    Generation stops at any of `end_token_ids`, which is not part of the text.
    Raises UserError where a prompt leaves no room in the model's context, or holds a token that it
    does not know.
    """
    check_prompts(prompts, tokenizer, n_embeddings(model))
    check_room(model, prompts, spec)
    ends = frozenset(end_token_ids)
    texts = [""] * len(prompts)
    wanted = {i: prompts[i] for i in (range(len(prompts)) if only is None else only)}
    with progress.task("generate", len(wanted)) as task:
        for i, token_ids in _token_ids(model, ends, wanted, spec, seed):
            texts[i] = tokenizer.decode(token_ids, skip_special_tokens=True)
            task.advance()
    return texts


def chat_end_token_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Return the tokens that end an answer in a chat: the model's, and what its template ends in.

    Training teaches the template's; a base model's configuration need not name them.
    """
    return tuple(sorted(end_of_turn_tokens(loaded.tokenizer).union(loaded.end_token_ids)))


def end_tokens(loaded: LoadedModel, *, is_chat: bool) -> tuple[int, ...]:
    """Return what ends a text that is generated: after chats, also the end of a turn."""
    return chat_end_token_ids(loaded) if is_chat else loaded.end_token_ids


def _token_ids(
    model: Any, ends: frozenset[int], prompts: Prompts, spec: DecodeSpec, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield (prompt, its new tokens) as they end.

    Where rotary frequencies change with a text's length, each prompt whose text may grow so long is
    left to `generate` of transformers by itself, unless rows can do it.
    """
    generate_each, rotary = _choose_generator(model, spec), RotaryLengths(model)
    beyond = {}
    if generate_each is not _in_slots:
        beyond = {i: p for i, p in prompts.items() if rotary.side(len(p) + spec.max_new_tokens)}
    if together := {i: prompt for i, prompt in prompts.items() if i not in beyond}:
        yield from generate_each(model, ends, together, spec, seed)
    for i, prompt in beyond.items():
        yield from _by_batches(model, ends, {i: prompt}, spec, seed)


def _choose_generator(
    model: Any, spec: DecodeSpec
) -> Callable[..., Iterator[tuple[int, list[int]]]]:
    """Return how texts are made: a function that yields (prompt, its new tokens) as they end."""
    if not joins_batches(model):
        return _by_batches
    if spec.num_beams == 1 and spec.no_repeat_ngram_size == 0:
        return _in_slots
    return _by_beams if spec.temperature == 0 else _by_batches


def joins_batches(model: Any) -> bool:
    """Say whether BatchDecoder continues texts of this model, adapter included."""
    return family_of(model.config.model_type).has_attention_interface and is_covered(model)


def fitting_prompts(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    separator: str,
    spec: DecodeSpec,
    *,
    truncate: bool,
) -> list[list[int]]:
    """Encode prompts that leave room for new tokens; UserError for one that does not.

    With `truncate` such a prompt is shortened instead, as in training.
    """
    room = max(2, context_tokens(model) - spec.max_new_tokens) if truncate else None
    prompts = encode_prompts(examples, separator, tokenizer, most_tokens=room)
    check_room(model, prompts, spec)
    return prompts


def check_room(model: Any, prompts: Sequence[Sequence[int]], spec: DecodeSpec) -> None:
    """Raise UserError where a prompt and `max_new_tokens` exceed the model's context."""
    longest, room = max(len(prompt) for prompt in prompts), context_tokens(model)
    if longest + spec.max_new_tokens > room:
        raise UserError(
            f"a prompt of {counted(longest, 'token')} and {spec.max_new_tokens} new ones exceed "
            f"the model's context of {room}; lower --max-new-tokens or shorten the prompt"
        )


def _in_slots(
    model: Any, ends: frozenset[int], prompts: Prompts, spec: DecodeSpec, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield (prompt, its new tokens) as rows finish; neighbours share what they begin with."""
    n_slots = min(spec.batch_size, len(prompts))
    decoder = BatchDecoder(model, eos_token_ids=ends, max_slots=n_slots)
    waiting = deque(sorted(prompts, key=lambda i: tuple(prompts[i])))
    token_ids: dict[int, list[int]] = {}
    while waiting or token_ids:
        n_new = min(len(waiting), decoder.n_free)
        if n_new >= min(len(waiting), max(1, n_slots // REFILL_SHARE)):
            chosen = [waiting.popleft() for _ in range(n_new)]
            token_ids |= {i: [] for i in chosen}
            decoder.admit([_request(i, prompts[i], spec, seed) for i in chosen])
        for event in decoder.step():
            if event.finish_reason != "eos":
                token_ids[event.request_id].append(event.token_id)
            if event.finish_reason:
                yield event.request_id, token_ids.pop(event.request_id)


def _request(i: int, prompt: Sequence[int], spec: DecodeSpec, seed: int) -> DecodeRequest:
    """Return prompt i's request; its randomness depends on the seed and on i."""
    return DecodeRequest(i, prompt, spec.max_new_tokens, _sampling(i, spec, seed))


def _sampling(i: int, spec: DecodeSpec, seed: int) -> Sampling:
    return Sampling(temperature=spec.temperature, top_p=spec.top_p, seed=own_seed(seed, i))


def _by_beams(
    model: Any, ends: frozenset[int], prompts: Prompts, spec: DecodeSpec, _seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield (prompt, its best beam) as prompts are done; neighbours share what they begin with."""
    n_at_once = min(len(prompts), max(1, spec.batch_size // spec.num_beams))
    settings = BeamSettings(
        spec.num_beams, spec.max_new_tokens, spec.length_penalty, spec.no_repeat_ngram_size
    )
    decoder = BeamDecoder(model, settings, eos_token_ids=ends, max_prompts=n_at_once)
    waiting = deque(sorted(prompts, key=lambda i: tuple(prompts[i])))
    while waiting or decoder.n_free < n_at_once:
        n_new = min(len(waiting), decoder.n_free)
        if n_new >= min(len(waiting), max(1, n_at_once // REFILL_SHARE)) > 0:
            chosen = [waiting.popleft() for _ in range(n_new)]
            yield from decoder.admit({i: prompts[i] for i in chosen})
        yield from decoder.step()


def _by_batches(
    model: Any, ends: frozenset[int], prompts: Prompts, spec: DecodeSpec, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield (prompt, its new tokens), batch by batch from the shortest prompts on."""
    order = sorted(prompts, key=lambda i: len(prompts[i]))
    n_at_once = max(1, spec.batch_size // spec.num_beams)
    forwards = patched_forwards(fast_forwards(model)) if is_covered(model) else nullcontext()
    with forwards:
        for start in range(0, len(order), n_at_once):
            chunk = order[start : start + n_at_once]
            samplings = [_sampling(i, spec, seed) for i in chunk] if spec.temperature else []
            texts = _generate_batch(model, ends, [prompts[i] for i in chunk], spec, samplings)
            for i, token_ids in zip(chunk, texts, strict=True):
                yield i, list(takewhile(lambda token_id: token_id not in ends, token_ids))


@torch.inference_mode()
def _generate_batch(
    model: Any,
    ends: frozenset[int],
    prompts: list[Sequence[int]],
    spec: DecodeSpec,
    samplings: list[Sampling],
) -> list[list[int]]:
    config = generation_config(spec, ends)
    length = max(len(prompt) for prompt in prompts)
    token_ids = torch.full((len(prompts), length), config.pad_token_id)
    attention_mask = torch.zeros_like(token_ids)
    for b, prompt in enumerate(prompts):
        token_ids[b, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[b, length - len(prompt) :] = 1
    out = model.generate(
        input_ids=token_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=config,
        logits_processor=[OwnDraws(samplings)] if samplings else [],
    )
    return out[:, length:].tolist()  # type: ignore[no-any-return]


def generation_config(spec: DecodeSpec, end_token_ids: Collection[int]) -> Any:
    """Translate a DecodeSpec into the transformers object; what fills ended rows is an end token.

    The likeliest token is taken: what is drawn, `OwnDraws` makes the likeliest. What it leaves
    open, transformers takes from the model, which `load_model` has made to say nothing.
    """
    from transformers import GenerationConfig

    beams: dict[str, Any] = {}
    if spec.num_beams > 1:
        beams = {"num_beams": spec.num_beams, "length_penalty": spec.length_penalty}
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=spec.max_new_tokens,
        no_repeat_ngram_size=spec.no_repeat_ngram_size,
        eos_token_id=sorted(end_token_ids),
        pad_token_id=min(end_token_ids),
        **beams,
    )
