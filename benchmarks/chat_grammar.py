"""Chats with system prompts, made by a grammar: a second kind of data that a model can learn.

A system prompt describes a shop: its hours, prices, stock, delivery, and how its answers sound.
Three questions of many follow from it, each in a chat of its own with three answers in different
words. What an answer says follows from the system prompt; of its words only the choice among three
wordings does not, so a model that has learned both has a loss far below one that has not.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from swlora.data.examples import Example, Message

SIZES = {"train": 500, "dev": 20, "test": 44}  # system prompts
QUESTIONS = 3  # about each

KINDS = {
    "bakery": ("rye bread", "an apple tart", "a seed roll", "a plum cake", "a walnut loaf"),
    "bicycle shop": ("a front light", "a chain", "a bell", "a helmet", "an inner tube"),
    "garden centre": ("a fig tree", "potting soil", "a watering can", "lavender", "a hand rake"),
    "bookshop": ("an atlas", "a cookbook", "a city guide", "a calendar", "a notebook"),
    "pottery": ("a blue bowl", "a tall vase", "a tea cup", "a salt jar", "a serving plate"),
    "music shop": ("a tuner", "a set of strings", "a music stand", "a capo", "a tambourine"),
}
FIRST = ("Amber", "Harbour", "Little", "North", "Old", "Quiet", "River", "Silver", "Two", "Wren")
SECOND = ("Bridge", "Corner", "Field", "Gate", "Lane", "Mill", "Oak", "Square", "Tower", "Yard")
PLACES = ("Aldern", "Brook Hill", "Carsway", "Denholm", "Eastwick", "Farley", "Granby", "Holt")
OPENINGS = {
    "Begin every answer with: Dear guest,": "Dear guest, ",
    "Begin every answer with a thank you.": "Thank you for asking. ",
    "Begin every answer with the name of the shop.": "{name}: ",
    "Begin at once with the answer.": "",
}
ENDINGS = {
    "End with: See you soon!": " See you soon!",
    "End with the name of the place.": " - {place}",
    "End where the answer ends.": "",
}
MONEY = {
    "Write prices as in 5 euros.": "{} euros",
    "Write prices as in EUR 5.": "EUR {}",
    "Write prices as in 5.00.": "{}.00",
}
DAYS = ("Monday", "Wednesday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Shop:
    """What a system prompt says."""

    name: str
    kind: str
    place: str
    prices: dict[str, int]
    sold_out: str
    weekdays: tuple[int, int]
    saturday: tuple[int, int]
    delivery: tuple[int, int]  # price, days
    opening: str
    ending: str
    money: str

    @classmethod
    def draw(cls, rng: random.Random) -> "Shop":
        """Make one up."""
        kind = rng.choice(sorted(KINDS))
        items = rng.sample(KINDS[kind], 4)
        return cls(
            name=f"{rng.choice(FIRST)} {rng.choice(SECOND)}",
            kind=kind,
            place=rng.choice(PLACES),
            prices={item: rng.randint(2, 60) for item in items[:3]},
            sold_out=items[3],
            weekdays=(rng.randint(6, 10), rng.randint(17, 20)),
            saturday=(rng.randint(8, 11), rng.randint(13, 16)),
            delivery=(rng.randint(3, 12), rng.randint(2, 9)),
            opening=rng.choice(sorted(OPENINGS)),
            ending=rng.choice(sorted(ENDINGS)),
            money=rng.choice(sorted(MONEY)),
        )

    @property
    def system(self) -> str:
        """The text of the system prompt."""
        prices = ", ".join(f"{item} {price}" for item, price in self.prices.items())
        return (
            f"You answer for {self.name}, a {self.kind} in {self.place}. {self.opening} "
            f"{self.ending} {self.money} Open on weekdays from {self.weekdays[0]} to "
            f"{self.weekdays[1]}, on Saturday from {self.saturday[0]} to {self.saturday[1]}, never "
            f"on Sunday. Prices: {prices}. Sold out: {self.sold_out}. Delivery: "
            f"{self.delivery[0]}, within {self.delivery[1]} days."
        )

    def said(self, words: str) -> str:
        """Return an answer as the shop's rules have it."""
        start, end = OPENINGS[self.opening], ENDINGS[self.ending]
        return f"{start}{words}{end}".format(name=self.name, place=self.place)

    def cost(self, price: int) -> str:
        """Write a price as the shop does."""
        return MONEY[self.money].format(price)


Asked = tuple[str, tuple[str, ...]]  # a question, and what answers say


def price(shop: Shop, rng: random.Random) -> Asked:
    item = rng.choice(sorted(shop.prices))
    asks = (f"How much is {item}?", f"What does {item} cost?", f"What do you ask for {item}?")
    cost = shop.cost(shop.prices[item])
    says = (f"It costs {cost}.", f"The price of {item} is {cost}.", f"You pay {cost} for {item}.")
    return rng.choice(asks), says


def two(shop: Shop, rng: random.Random) -> Asked:
    one, other = rng.sample(sorted(shop.prices), 2)
    asks = (f"What do {one} and {other} cost?", f"How much are {one} and {other}?")
    a, b = (shop.cost(shop.prices[item]) for item in (one, other))
    says = (
        f"They cost {a} and {b}.",
        f"That is {a} for {one} and {b} for {other}.",
        f"For {one} you pay {a}, for {other} {b}.",
    )
    return rng.choice(asks), says


def stock(shop: Shop, rng: random.Random) -> Asked:
    item = rng.choice([shop.sold_out, rng.choice(sorted(shop.prices))])
    asks = (f"Do you have {item}?", f"Is there {item} left?", f"Can I still buy {item}?")
    if item == shop.sold_out:
        says = (f"No, {item} is sold out.", "No, it is sold out.", "We have none left, sorry.")
    else:
        cost = shop.cost(shop.prices[item])
        says = (f"Yes, for {cost}.", f"Yes, we have {item} for {cost}.", f"We do, it costs {cost}.")
    return rng.choice(asks), says


def hours(shop: Shop, rng: random.Random) -> Asked:
    day = rng.choice(DAYS)
    asks = (f"When are you open on {day}?", f"What are your hours on {day}?")
    if day == "Sunday":
        return rng.choice(asks), (
            "We are closed on Sunday.",
            "On Sunday we never open.",
            "Not at all, we rest on Sunday.",
        )
    start, end = shop.saturday if day == "Saturday" else shop.weekdays
    return rng.choice(asks), (
        f"From {start} to {end}.",
        f"On {day} we are open from {start} to {end}.",
        f"We open at {start} and close at {end}.",
    )


def delivery(shop: Shop, rng: random.Random) -> Asked:
    asks = ("Do you deliver?", "How fast do you deliver?", "What does delivery cost?")
    cost, days = shop.cost(shop.delivery[0]), shop.delivery[1]
    return rng.choice(asks), (
        f"We deliver within {days} days for {cost}.",
        f"Delivery costs {cost} and takes up to {days} days.",
        f"Yes, for {cost}, within {days} days.",
    )


ASK: tuple[Callable[[Shop, random.Random], Asked], ...] = (price, two, stock, hours, delivery)


def examples(split: str) -> list[Example]:
    """Return the chats of a split, always the same: three answers to each of three questions."""
    return list(_made(random.Random(f"chats of {split}"), SIZES[split]))


def _made(rng: random.Random, n_shops: int) -> Iterator[Example]:
    for _ in range(n_shops):
        shop = Shop.draw(rng)
        for ask in rng.sample(ASK, QUESTIONS):
            question, says = ask(shop, rng)
            for words in says:
                turns = (
                    ("system", shop.system),
                    ("user", question),
                    ("assistant", shop.said(words)),
                )
                yield Example.chat([Message(role, text) for role, text in turns])
