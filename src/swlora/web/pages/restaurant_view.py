"""What the restaurant form shows: a field for every slot, with the values that it may have."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from swlora.web.restaurant import SLOTS, References

LABELS = {
    "name": "Name",
    "eatType": "Kind of place",
    "food": "Food",
    "priceRange": "Price range",
    "customer rating": "Customer rating",
    "area": "Area",
    "familyFriendly": "Family friendly",
    "near": "Near",
}
FREE = ("name", "near")  # any text; the others are chosen from a list
# The values of the E2E data, for a server that was given none.
E2E_VALUES = {
    "name": ["The Vaults", "Aromi", "Blue Spice", "The Phoenix", "Zizzi"],
    "eatType": ["coffee shop", "pub", "restaurant"],
    "food": ["Chinese", "English", "Fast food", "French", "Indian", "Italian", "Japanese"],
    "priceRange": ["cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"],
    "customer rating": ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"],
    "area": ["city centre", "riverside"],
    "familyFriendly": ["yes", "no"],
    "near": ["Café Adriatic", "Café Rouge", "Burger King", "The Bakers"],
}
START = {
    "name": "The Vaults",
    "eatType": "pub",
    "food": "Italian",
    "customer rating": "5 out of 5",
    "area": "riverside",
    "familyFriendly": "yes",
}


@dataclass(frozen=True)
class SlotField:
    """A field of the form."""

    slot: str
    label: str
    options: list[str]
    is_free: bool
    value: str


def slot_fields(references: References | None, filled: Mapping[str, str]) -> list[SlotField]:
    """Return the fields with what is filled in; a value of its own is added to the choice."""
    known = references.values if references else E2E_VALUES
    fields = []
    for slot in SLOTS:
        options, value = list(known.get(slot, [])), filled.get(slot, "")
        if value and value not in options:
            options.append(value)
        fields.append(SlotField(slot, LABELS[slot], options, slot in FREE, value))
    return fields


def start_values(references: References | None, example: int | None) -> dict[str, str]:
    """Return what the form starts with: one of the data's, where there are data."""
    if references is None:
        return START
    return references.example(example or 0)


def another(references: References | None) -> int | None:
    """Return a number for another example from the data; None without data."""
    return None if references is None else secrets.randbelow(10**6)
