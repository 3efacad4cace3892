"""The restaurant form: fields of an E2E meaning representation, its text, its references.

name[Aromi], eatType[pub], area[riverside]
"""

import re
from collections.abc import Mapping, Sequence

from swlora.data.dataset import Dataset, group_references
from swlora.data.examples import Example
from swlora.errors import UserError

SLOTS = (
    "name",
    "eatType",
    "food",
    "priceRange",
    "customer rating",
    "area",
    "familyFriendly",
    "near",
)
MAX_VALUE_CHARACTERS = 100
MAX_SUGGESTIONS = 50
_FIELD = re.compile(r"\s*([^,\[\]]+?)\s*\[([^\[\]]*)\]\s*(?:,|$)")


def meaning_text(fields: Mapping[str, str]) -> str:
    """Write filled-in fields as a meaning representation, in the order of the E2E data.

    Raises UserError for an unknown field, a value with brackets, or no value at all.
    """
    parts = {}
    for slot, value in fields.items():
        if slot not in SLOTS:
            raise UserError(f"no field of a restaurant is called {slot[:40]!r}")
        text = " ".join(value.split())
        if len(text) > MAX_VALUE_CHARACTERS or not text.isprintable() or set("[]") & set(text):
            raise UserError(
                f"{slot} must be plain text of at most {MAX_VALUE_CHARACTERS} characters, "
                "without brackets"
            )
        if text:
            parts[slot] = f"{slot}[{text}]"
    if not parts:
        raise UserError("fill in one field at least, such as the name")
    return ", ".join(parts[slot] for slot in SLOTS if slot in parts)


def meaning_fields(meaning: str) -> dict[str, str]:
    """Read a meaning representation; {} for text that is none."""
    fields, at = {}, 0
    for match in _FIELD.finditer(meaning):
        if match.start() != at:
            return {}
        fields[match[1]], at = match[2].strip(), match.end()
    return fields if at == len(meaning) else {}


class References:
    """The references of every meaning representation in a data set, whatever its fields' order."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._texts: dict[frozenset[tuple[str, str]], list[str]] = {}
        values: dict[str, dict[str, int]] = {slot: {} for slot in SLOTS}
        for example, texts in group_references(examples):
            fields = meaning_fields(example.prompt)
            if not fields:
                continue
            self._texts.setdefault(frozenset(fields.items()), []).extend(texts)
            for slot, value in fields.items():
                counts = values.setdefault(slot, {})
                counts[value] = counts.get(value, 0) + 1
        if not self._texts:
            raise UserError("the data set holds no meaning representations such as name[Aromi]")
        self._values = {
            slot: sorted(counts, key=lambda value: (-counts[value], value))[:MAX_SUGGESTIONS]
            for slot, counts in values.items()
        }

    @classmethod
    def of(cls, dataset: Dataset) -> "References":
        """Collect the references of all splits."""
        return cls([*dataset.train, *dataset.dev, *dataset.test])

    def find(self, meaning: str) -> list[str]:
        """Return the distinct references of a meaning representation; [] where it is not there."""
        fields = meaning_fields(meaning)
        return list(dict.fromkeys(self._texts.get(frozenset(fields.items()), [])))

    def example(self, number: int) -> dict[str, str]:
        """Return the fields of meaning representation `number`, counted round and round."""
        found = list(self._texts)
        return dict(found[number % len(found)])

    @property
    def values(self) -> dict[str, list[str]]:
        """The values of every field, the most frequent first."""
        return self._values
