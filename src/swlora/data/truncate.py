"""Sequences that are longer than the context: what is left of them, so that the answer stays.

A chat loses its oldest turns, a system turn stays. Then a prompt loses its middle: its beginning
says what is asked for, its end what is answered. Only where the answer leaves no room for a quarter
of the context does its own tail go too, its end with it.
"""

from collections.abc import Callable, Sequence

from swlora.data.chat_encode import Weighted
from swlora.data.examples import Example

LEAST_PROMPT = 4  # a prompt keeps 1 / LEAST_PROMPT of the context at least, where it has so much


def is_long(sequences: Sequence[Weighted], context_tokens: int) -> bool:
    """Say whether one of the sequences does not fit."""
    return any(len(ids) > context_tokens for ids, _ in sequences)


def cut(sequence: Weighted, context_tokens: int) -> Weighted:
    """Return a sequence with at most `context_tokens` >= 2 tokens, one of them trained.

    Between the tokens that are left, those before the first trained one lost their middle.
    """
    ids, runs = sequence
    if len(ids) <= context_tokens:
        return sequence
    weights = [weight for n, weight in runs for _ in range(n)]
    n_prompt = next((i for i, weight in enumerate(weights) if weight), len(ids))
    n_least = min(n_prompt, max(1, context_tokens // LEAST_PROMPT))
    n_kept = min(n_prompt, max(n_least, context_tokens - (len(ids) - n_prompt)))
    n_head = (n_kept + 1) // 2
    chosen = [*range(n_head), *range(n_prompt - (n_kept - n_head), len(ids))][:context_tokens]
    return [ids[i] for i in chosen], [(1, weights[i]) for i in chosen]


def without_oldest_turns(
    chat: Example,
    found: list[Weighted],
    encode: Callable[[Example], list[Weighted] | str],
    context_tokens: int,
) -> list[Weighted]:
    """Return the sequences of a chat without as many of its oldest turns as need be, then cut.

    What is left begins with its system turn, if it had one, and a turn of the user, and an answer
    in it is trained; of a prompt, in which nothing is, the last question is left.
    """
    turns = chat.messages
    system = turns[:1] if turns[0].role in ("system", "developer") else ()
    starts = [i for i, turn in enumerate(turns) if turn.role == "user"]

    def beginning_with(start: int) -> list[Weighted] | str:
        return encode(Example.chat((*system, *turns[start:]), chat.tools))

    while starts:
        shortest = beginning_with(starts[-1])
        if not isinstance(shortest, str):
            found = shortest
            break
        starts.pop()  # behind it, nothing is trained, or the template refuses it
    low, high = 0, len(starts) - 1  # between those that are too long and one that is `found`
    while low < high:
        middle = (low + high) // 2
        longer = beginning_with(starts[middle])
        if isinstance(longer, str) or is_long(longer, context_tokens):
            low = middle + 1
        else:
            high, found = middle, longer
    return [cut(_with_last_answer(sequence, context_tokens), context_tokens) for sequence in found]


def _with_last_answer(sequence: Weighted, context_tokens: int) -> Weighted:
    """Return a sequence of which only the last answer is trained, where not all would stay."""
    ids, runs = sequence
    trained = [i for i, (_, weight) in enumerate(runs) if weight]
    if not trained:
        return sequence
    n_prompt = sum(n for n, _ in runs[: trained[0]])
    n_kept = min(n_prompt, max(1, context_tokens // LEAST_PROMPT))  # of the prompt at least
    if n_kept + len(ids) - n_prompt <= context_tokens:
        return sequence
    return ids, [*((n, 0.0) for n, _ in runs[: trained[-1]]), *runs[trained[-1] :]]
