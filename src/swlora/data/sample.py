"""A small data set of the E2E form, made from a grammar, for use where E2E itself cannot be had.

A meaning representation (MR) such as `name[Quillon], food[Thai], area[harbour]` is drawn at
random; each of its references is one opening sentence plan that mentions some of the attributes,
then short sentences that mention every attribute left, so a reference says what its MR says, once,
and nothing else. Names and wording are invented here: scores on it say nothing about E2E.
"""

import random
from collections.abc import Callable, Sequence
from itertools import chain, pairwise

N_MRS = 500
MIN_REFERENCES, MAX_REFERENCES = 3, 8

Pairs = list[tuple[str, str]]
Facts = dict[str, str]

NAMES = (
    *("Quillon", "Brindle House", "The Copper Heron", "Marlow & Finch", "Ossian", "Verity Lane"),
    *("The Lantern Fox", "Saltwick", "Tamsin's Table", "Nine Larches", "Orrery", "The Tin Badger"),
    *("Hesper", "Dovetail", "Pippin & Rye", "The Slate Door", "Wren's Loft", "Juniper Row"),
    *("Caldera", "The Idle Kite", "Mossgate", "Vesper Yard", "Otterburn", "The Blue Thimble"),
)
LANDMARKS = (
    *("Ashdown Theatre", "Corrigan Museum", "Tilbrook Station", "Fenwick Hall", "Hollin Library"),
    *("Garrow Bridge", "Lindale Park", "Merriden Cinema", "Stroud Gallery", "Petworth Gardens"),
)
AREAS = {
    "harbour": "by the harbour",
    "old town": "in the old town",
    "market square": "on the market square",
    "university quarter": "in the university quarter",
}
VALUES: dict[str, Sequence[str]] = {
    "name": NAMES,
    "eatType": ("restaurant", "café", "pub", "bistro", "tea room", "wine bar"),
    "food": ("Greek", "Thai", "Mexican", "Lebanese", "Korean", "Spanish", "Ethiopian"),
    "priceRange": ("cheap", "moderate", "high", "under £15", "£15 to £25", "over £40"),
    "customer rating": ("poor", "fair", "excellent", "2 out of 5", "4 out of 5", "5 out of 5"),
    "area": tuple(AREAS),
    "familyFriendly": ("yes", "no"),
    "near": LANDMARKS,
}
PRICE_ADJECTIVES = {
    "cheap": ("cheap", "inexpensive", "low-priced"),
    "moderate": ("moderately priced", "mid-priced"),
    "high": ("expensive", "high-priced"),
}
PRICE_NOUNS = {
    "cheap": "low prices",
    "moderate": "moderate prices",
    "high": "high prices",
    "under £15": "prices under £15",
    "£15 to £25": "prices from £15 to £25",
    "over £40": "prices over £40",
}
PRICE_CLAUSES = {
    "cheap": ("is cheap", "is inexpensive"),
    "moderate": ("is moderately priced", "is in the middle price range"),
    "high": ("is expensive", "is in the high price range"),
    "under £15": ("keeps its prices under £15", "will cost you under £15"),
    "£15 to £25": ("will cost you £15 to £25", "charges £15 to £25"),
    "over £40": ("will cost you over £40", "charges over £40"),
}


def make_sample(seed: int = 0) -> tuple[Pairs, Pairs, Pairs]:
    """Make (train, dev, test) lists of (MR, reference): 500 distinct MRs, split 80/10/10 by MR.

    Each MR has 3 to 8 different references, next to each other. The same seed gives the same data.
    """
    rng = random.Random(seed)
    drawn: dict[str, Facts] = {}
    while len(drawn) < N_MRS:
        facts = _draw_facts(rng)
        drawn[write_mr(facts)] = facts
    pairs = [[(mr, ref) for ref in _references(rng, facts)] for mr, facts in drawn.items()]
    edges = (0, N_MRS * 8 // 10, N_MRS * 9 // 10, N_MRS)
    train, dev, test = (list(chain(*pairs[a:b])) for a, b in pairwise(edges))
    return train, dev, test


def write_mr(facts: Facts) -> str:
    """Write attributes the way E2E does: `name[Ossian], food[Thai]`."""
    return ", ".join(f"{attribute}[{value}]" for attribute, value in facts.items())


def _draw_facts(rng: random.Random) -> Facts:
    optional = list(VALUES)[1:]
    chosen = set(rng.sample(optional, rng.randint(2, len(optional))))
    return {a: rng.choice(v) for a, v in VALUES.items() if a == "name" or a in chosen}


def _references(rng: random.Random, facts: Facts) -> list[str]:
    wanted = rng.randint(MIN_REFERENCES, MAX_REFERENCES)
    found: dict[str, None] = {}
    while len(found) < wanted:
        found[_Writer(rng, facts).write()] = None
    return list(found)


class _Writer:
    """Writes one reference; `left` holds the attributes that are still to be mentioned."""

    def __init__(self, rng: random.Random, facts: Facts) -> None:
        self.rng = rng
        self.left = dict(facts)
        self.name = self.left.pop("name")
        self.venue = facts.get("eatType") or rng.choice(("place", "venue", "spot"))

    def write(self) -> str:
        plans: list[Callable[[], str]]
        plans = [self._plain, self._there_is, self._question, self._apposition]
        if "area" in self.left or "near" in self.left:
            plans.append(self._place_first)
        if "eatType" in self.left and not self.name.startswith("The "):
            plans.append(self._venue_first)
        sentences = [self.rng.choice(plans)()]
        subjects: Sequence[str] = ("It", f"The {self.venue}", f"This {self.venue}")
        while self.left:
            subject = self.rng.choice(subjects)
            sentences.append(f"{subject} {self._predicate(self.rng.randint(1, 3))}.")
            subjects = ("It",) if subject != "It" else (f"The {self.venue}",)
        return " ".join(sentences)

    def _plain(self) -> str:
        return f"{self.name} is {self._noun_phrase()}{self._place()}{self._with()}."

    def _there_is(self) -> str:
        noun = self._noun_phrase(serving=0.0)
        return f"There is {noun} called {self.name}{self._place()}{self._with()}."

    def _question(self) -> str:
        wish = self.rng.choice(("Looking for", "Do you need", "Do you fancy"))
        advice = self.rng.choice(("Try {}.", "{} is one.", "Then consider {}."))
        return f"{wish} {self._noun_phrase()}{self._place()}? {advice.format(self.name)}"

    def _place_first(self) -> str:
        place = self._place(chance=1.0).lstrip()
        verb = self.rng.choice(("you will find", "you can visit", "there is"))
        return f"{place[0].upper()}{place[1:]}, {verb} {self.name}{self._aside()}."

    def _apposition(self) -> str:  # an MR has two attributes or more, so one is left to predicate
        if aside := self._aside(keep=1):
            aside += f"{self._place(keep=1)},"
        return f"{self.name}{aside} {self._predicate(self.rng.randint(1, 2))}."

    def _venue_first(self) -> str:
        del self.left["eatType"]
        return f"The {self.venue} {self.name} {self._predicate(self.rng.randint(1, 3))}."

    def _take(self, attribute: str, chance: float, keep: int = 0) -> str | None:
        """Mention `attribute` with some probability, so long as more than `keep` are left."""
        if attribute in self.left and len(self.left) > keep and self.rng.random() < chance:
            return self.left.pop(attribute)
        return None

    def _aside(self, keep: int = 0) -> str:
        """A noun phrase after a comma; nothing where it would only say "a place"."""
        noun = self._noun_phrase(keep)
        return "" if noun in ("a place", "a venue", "a spot") else f", {noun}"

    def _noun_phrase(self, keep: int = 0, serving: float = 0.4) -> str:
        """A phrase such as "a cheap, family-friendly Thai bistro"."""
        self.left.pop("eatType", None)
        qualities: list[str] = []
        if self.left.get("priceRange") in PRICE_ADJECTIVES and (
            price := self._take("priceRange", 0.5, keep)
        ):
            qualities.append(self.rng.choice(PRICE_ADJECTIVES[price]))
        if self.left.get("familyFriendly") == "yes" and self._take("familyFriendly", 0.5, keep):
            qualities.append(self.rng.choice(("family-friendly", "child-friendly")))
        words = [", ".join(qualities)] if qualities else []
        if food := self._take("food", 0.5, keep):
            words.append(food)
        phrase = _with_article(" ".join([*words, self.venue]))
        if food := self._take("food", serving, keep):
            phrase += f" serving {food} food"
        return phrase

    def _place(self, chance: float = 0.6, keep: int = 0) -> str:
        parts = []
        if area := self._take("area", chance, keep):
            parts.append(f" {AREAS[area]}")
        if landmark := self._take("near", chance, keep):
            parts.append(f" {self.rng.choice(('near', 'close to', 'not far from'))} {landmark}")
        return "".join(parts)

    def _with(self) -> str:
        parts = []
        if rating := self._take("customer rating", 0.4):
            parts.append(_rating_noun(rating))
        if price := self._take("priceRange", 0.4):
            parts.append(PRICE_NOUNS[price])
        return f" with {' and '.join(parts)}" if parts else ""

    def _predicate(self, n_clauses: int) -> str:
        """One to `n_clauses` clauses such as "serves Thai food and is near Garrow Bridge"."""
        chosen = self.rng.sample(list(self.left), min(n_clauses, len(self.left)))
        clauses = [self._clause(attribute, self.left.pop(attribute)) for attribute in chosen]
        return _and(clauses)

    def _clause(self, attribute: str, value: str) -> str:
        forms: Sequence[str]
        if attribute == "food":
            forms = (f"serves {value} food", f"offers {value} dishes", f"cooks {value} food")
        elif attribute == "priceRange":
            forms = (f"has {PRICE_NOUNS[value]}", *PRICE_CLAUSES[value])
        elif attribute == "customer rating":
            rated = f"is rated {value} by its customers"
            forms = (f"has {_rating_noun(value)}", f"comes with {_rating_noun(value)}", rated)
        elif attribute == "area":
            forms = (f"is {AREAS[value]}", f"can be found {AREAS[value]}")
        elif attribute == "near":
            forms = (f"is near {value}", f"is close to {value}", f"is a short walk from {value}")
        elif value == "yes":
            forms = ("is family-friendly", "welcomes families", "is a good choice for families")
        else:
            forms = ("is not family-friendly", "is not suitable for children")
        return self.rng.choice(forms)


def _rating_noun(value: str) -> str:
    if value[0].isdigit():
        return f"a customer rating of {value}"
    return f"{_with_article(value)} customer rating"


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiouAEIOU' else 'a'} {phrase}"


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
