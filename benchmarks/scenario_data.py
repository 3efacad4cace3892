"""The rows of the scenarios, made from a seed: words of a small grammar, cut to exact lengths.

Texts are token ids of whole sentences; a piece of n tokens is the first n of as many sentences as
it takes, so every length below is met exactly whatever the words. Turns are written as the embedded
model's chat template writes them. What rows share is what is given to them in common; beyond that
only the words with which texts happen to begin.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.token_rows import TokenRows

SUBJECTS = (
    *("the old harbour", "our second train", "a quiet engineer", "the committee", "her garden"),
    *("this small engine", "every visitor", "the northern office", "a late report", "the river"),
    *("one of the pilots", "the new library", "his first letter", "the mountain road"),
    *("a careful reader", "the winter market"),
)
VERBS = (
    *("opens", "follows", "describes", "keeps", "measures", "leaves", "repairs", "carries"),
    *("remembers", "crosses", "supports", "answers", "delays", "replaces"),
)
OBJECTS = (
    *("the long bridge", "two heavy boxes", "a plan for the summer", "the question of cost"),
    *("several older houses", "the signal at the gate", "a map of the coast", "the last meeting"),
    *("what was agreed in spring", "the price of copper", "a short list of names"),
    *("the windows on the east side", "three hundred pages", "the work of a year"),
)
ENDS = (
    *("before noon", "without a word", "in the rain", "for the third time", "near the station"),
    *("as the law demands", "with great patience", "after the storm", "every other week"),
    *("at the edge of town", "for no clear reason", "while others wait"),
)

SYSTEM_TOKENS = 300  # of the shared system prompt, with what the template writes around it
ANSWERS, ANSWERED_TOKENS = 8, 512  # answers to a prompt; tokens of the prompt
TEMPLATE_TOKENS = 150
LABELS = (" yes", " no", " maybe")  # one token each; the end of the turn is the second
FIRST_UNIQUE = 1000  # tokens from here on open rows that share nothing
END = "<|im_end|>"

Parts = list[tuple[list[int], bool]]


class Writer:
    """Writes pieces of exact length with the tokenizer of the embedded model."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.random = random.Random(seed)
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Tokenise `text` as it stands; names of roles become their own tokens."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def words(self, n: int) -> list[int]:
        """Return n tokens of sentences drawn at random."""
        ids: list[int] = []
        while len(ids) < n:
            parts = [self.random.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, ENDS)]
            ids += self.ids(f" {' '.join(parts).capitalize()}.")
        return ids[:n]

    def about(self, least: int, most: int) -> list[int]:
        """Return `least` to `most` tokens of sentences."""
        return self.words(self.random.randint(least, most))

    def turn(self, role: str, words: list[int]) -> list[int]:
        """Return a turn that is not trained, as the chat template writes it."""
        return self.ids(f"<|im_start|>{role}\n") + words + self.ids(f"{END}\n")

    def turn_of(self, role: str, n: int) -> list[int]:
        """Return a turn of n tokens, those of the template among them."""
        return self.turn(role, self.words(n - len(self.turn(role, []))))

    def answer(self, words: list[int]) -> Parts:
        """Return the turn of the model: its words and the end of the turn are trained."""
        return [(self.ids("<|im_start|>assistant\n"), False), (words + self.ids(END), True)]


def system_prompt(n: int, writer: Writer) -> list[Parts]:
    """One system prompt of 300 tokens before short questions and answers."""
    system = writer.turn_of("system", SYSTEM_TOKENS)
    return [
        [(system + writer.turn("user", writer.about(8, 24)), False),
         *writer.answer(writer.about(10, 26))]
        for _ in range(n)
    ]  # fmt: skip


def several_turns(n: int, writer: Writer) -> list[Parts]:
    """Chats of four questions, of which every answer is trained; a short system prompt."""
    system = writer.turn_of("system", 40)
    chats: list[Parts] = []
    for _ in range(n):
        chat: Parts = [(system, False)]
        for _turn in range(4):
            chat.append((writer.turn("user", writer.about(40, 80)), False))
            chat += [*writer.answer(writer.about(60, 110)), (writer.ids("\n"), False)]
        chats.append(chat[:-1])  # nothing follows the last answer
    return chats


def eight_answers(n: int, writer: Writer) -> list[Parts]:
    """Eight answers to each prompt of 512 tokens, next to each other."""
    n_header = len(writer.answer([])[0][0])
    rows: list[Parts] = []
    while len(rows) < n:
        prompt = writer.turn_of("user", ANSWERED_TOKENS - n_header)
        rows += [[(prompt, False), *writer.answer(writer.about(32, 96))] for _ in range(ANSWERS)]
    return rows[:n]


def unshared(tokens: int) -> Callable[[int, Writer], list[Parts]]:
    """Return what makes instructions of `tokens` tokens, a fifth of them the trained answer."""
    n_answer = tokens // 5

    def rows(n: int, writer: Writer) -> list[Parts]:
        return [
            [([FIRST_UNIQUE + i, *writer.words(tokens - n_answer - 1)], False),
             (writer.words(n_answer - 1) + writer.ids(END), True)]
            for i in range(n)
        ]  # fmt: skip

    return rows


def labels(n: int, writer: Writer) -> list[Parts]:
    """One template, a text of its own in every row, and a label of two tokens."""
    template, question, end = writer.words(TEMPLATE_TOKENS), writer.ids("\nLabel:"), writer.ids(END)
    return [
        [(template + writer.about(30, 60) + question, False),
         (writer.ids(writer.random.choice(LABELS)) + end, True)]
        for _ in range(n)
    ]  # fmt: skip


@dataclass(frozen=True)
class Amount:
    """Steps that are timed, after one to warm up."""

    ours: int
    flat: int
    peers: int


@dataclass(frozen=True)
class Scenario:
    """What people train on: how its rows are made (None: E2E) and how many a step takes.

    Where much is shared, peers take fewer rows a step than ours: what they cannot share costs
    memory, and on E2E PEFT is faster with 16 rows than with 32.
    """

    name: str
    title: str
    make: Callable[[int, Writer], list[Parts]] | None
    ours_batch: int
    peer_batch: int
    quick: Amount
    full: Amount

    def amount(self, arm: str, quick: bool) -> tuple[int, int]:
        """Return (rows a step, rows that are timed) of an arm."""
        steps = self.quick if quick else self.full
        if arm.startswith("ours"):
            n_steps = steps.flat if arm == "ours-flat" else steps.ours
            return self.ours_batch, self.ours_batch * n_steps
        return self.peer_batch, self.peer_batch * steps.peers

    def n_rows(self, quick: bool) -> int:
        """Return the rows that the arm with most of them needs, the warm-up among them."""
        needs = [self.amount(arm, quick) for arm in ("ours", "ours-flat", "peft")]
        return max(batch + timed for batch, timed in needs)

    def rows(self, tokenizer: Any, quick: bool, seed: int = 0) -> TokenRows:
        """Make the rows that all arms of the scenario draw from."""
        assert self.make is not None, "E2E is read, not made"
        return TokenRows.from_parts(self.make(self.n_rows(quick), Writer(tokenizer, seed)))


_SCENARIOS = (
    Scenario("e2e", "E2E", None, 64, 16, Amount(3, 1, 4), Amount(16, 8, 16)),
    Scenario("system-prompt", "chats behind one system prompt of 300 tokens", system_prompt,
             32, 8, Amount(4, 1, 1), Amount(12, 3, 5)),
    Scenario("turns", "chats of four answers, all trained", several_turns,
             4, 4, Amount(1, 1, 1), Amount(6, 4, 5)),
    Scenario("answers", "eight answers to prompts of 512 tokens", eight_answers,
             16, 4, Amount(3, 1, 1), Amount(12, 3, 5)),
    Scenario("tokens-500", "instructions of 500 tokens, nothing shared", unshared(500),
             4, 4, Amount(2, 1, 1), Amount(6, 4, 5)),
    Scenario("tokens-2000", "instructions of 2,000 tokens, nothing shared", unshared(2000),
             1, 1, Amount(1, 1, 1), Amount(4, 3, 4)),
    Scenario("labels", "one template of 150 tokens, labels of two tokens", labels,
             32, 8, Amount(3, 1, 2), Amount(12, 4, 8)),
)  # fmt: skip
SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in _SCENARIOS}
