"""What the documents say of the code, where a machine can check it."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences

DOCS = Path(__file__).resolve().parents[1] / "docs"
ONE_STEP = (DOCS / "one-step.md").read_text(encoding="utf-8")
ROOMS = "adapters|attachment|data|decoding|evaluation|kernels|training|superweights"


@pytest.mark.parametrize("page", ["one-step.md", "glossary.md"])
def test_every_name_of_the_code_is_there(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    names = set(re.findall(rf"`((?:{ROOMS})\.[\w.]+)`", text))
    assert names
    for name in names:
        try:
            importlib.import_module(f"swlora.{name}")
        except ModuleNotFoundError:
            module, _, last = name.rpartition(".")
            assert hasattr(importlib.import_module(f"swlora.{module}"), last), name


def test_the_drawn_tree_is_the_one_that_is_built() -> None:
    (sentences,) = re.findall(r"^    (the cat sat ON .*)$", ONE_STEP, re.M)
    texts = [sentence.split() for sentence in re.split(r" {2,}", sentences)]
    words = list(dict.fromkeys(word for text in texts for word in text))
    n_prompt = [next(i for i, w in enumerate(text) if w.isupper()) for text in texts]
    pairs = [
        ([words.index(w) for w in text[:n]], [words.index(w) for w in text[n:]])
        for text, n in zip(texts, n_prompt, strict=True)
    ]
    tree = build_tree(TokenSequences.from_lists(pairs), np.arange(len(pairs)))
    drawn = re.findall(r"^ +(\d) +(\w+) +((?:\d )*\d) +(\S.*)$", ONE_STEP, re.M)
    assert [int(number) for number, *_ in drawn] == list(range(len(tree.token_ids)))
    for i, (_, word, sees, scored) in enumerate(drawn):
        assert words[tree.token_ids[i]] == word
        assert [j for j in range(i + 1) if i < tree.subtree_end[j]] == [
            int(n) for n in sees.split()
        ]
        of_node = tree.target_position == i
        targets = {words[k] for k in tree.target_id[of_node]}
        assert targets == set(re.findall(r"[A-Z]+|\.$", scored))
        weight = re.search(r"weight (\d)", scored)
        assert set(tree.target_weight[of_node]) <= {float(weight[1]) if weight else 1.0}
    (ends,) = re.findall(r"subtree_end = ([\d ]+)", ONE_STEP)
    assert tree.subtree_end.tolist() == [int(n) for n in ends.split()]
