"""Paths of this machine are published under another name, or not at all."""

import json

import pytest

from swlora.deploy.hub_places import is_place, places_in, published_text
from swlora.errors import UserError

CACHED = "/home/mary/.cache/huggingface/hub/models--mary--tiny-1/snapshots/0a1b2c"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((place, True) for place in ("/data", "/data/tiny", "~/tiny", "C:\\m\\tiny", "D:/tiny")),
        *((other, False) for other in ("/", "//", "mary/tiny", "./tiny", "</s>", "tiny", 5, None)),
    ],
)
def test_a_whole_value_is_a_path_or_none(value, expected):
    assert is_place(value) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base_model: /home/mary/tiny", ["/home/mary/tiny"]),
        ("- base_model:adapter:/Users/mary/tiny", ["/Users/mary/tiny"]),
        ("of [/root/a](https://huggingface.co//root/a).", ["/root/a"]),
        ("`C:\\Users\\mary` and file:///mnt/x/y", ["C:\\Users\\mary", "/mnt/x/y"]),
        ("see https://huggingface.co/mary/tiny, or localhost:8000/v1/models", []),
        ("POST /v1/chat/completions, `/path/to/model`, /usr/bin/env, and/or/else", []),
    ],
)
def test_a_path_in_a_text_is_found_and_addresses_and_examples_are_not(text, expected):
    assert places_in(text) == expected


def test_a_path_in_a_text_is_found_where_it_is_on_this_machine(tmp_path):
    assert places_in(f"from {tmp_path}.") == [str(tmp_path)]


@pytest.mark.parametrize("stroke", ["", "/"])
def test_a_folder_of_the_hubs_cache_has_a_name_and_a_commit(stroke, tmp_path):
    path = tmp_path / "adapter_config.json"
    tree = {"base_model_name_or_path": CACHED + stroke, "revision": None, "r": 4}
    path.write_text(json.dumps(tree))
    text, changes = published_text(path)
    expected = tree | {"base_model_name_or_path": "mary/tiny-1", "revision": "0a1b2c"}
    assert json.loads(text) == expected
    assert changes == ["adapter_config.json goes with mary/tiny-1 in place of its folder here"]
    assert json.loads(path.read_text()) == tree
    card = tmp_path / "README.md"
    card.write_text(f"of {CACHED.replace('mary--tiny-1', 'gpt2')}\n")
    assert published_text(card)[0] == "of gpt2\n"


def test_notes_that_nobody_reads_go_without_their_paths(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"a": 1, "name_or_path": "/data/x", "vocab_file": "vocab.json"}))
    text, changes = published_text(path)
    assert json.loads(text) == {"a": 1, "vocab_file": "vocab.json"}
    assert changes == ["tokenizer_config.json goes without name_or_path"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "adapter_config.json",
            {"base_model_name_or_path": "/data/tiny"},
            "(base_model_name_or_path: /data/tiny); write the base model's name on the Hub there",
        ),
        (
            "adapter_config.json",
            {"base_model_name_or_path": "../runs/merged"},
            "(base_model_name_or_path: ../runs/merged); write the base model's name",
        ),
        ("swlora.json", {"data": [{"name": "/d/x"}]}, "(name: /d/x); take that out of it first"),
        ("swlora-merge.json", {"notes": ["of /home/m/x"]}, "(notes: /home/m/x); take that out"),
        ("NOTICE", "a\n\nby /home/mary/x", "NOTICE, line 3, names a folder of this machine, /home"),
    ],
)
def test_a_path_without_another_name_is_refused(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as refused:
        published_text(path)
    assert said in str(refused.value) and str(path) in str(refused.value)


def test_what_names_no_place_goes_as_it_is(tmp_path):
    token = {"added_tokens_decoder": {"1": {"content": "/tmp/x"}}, "eos_token": "/home/x/y"}
    token["additional_special_tokens"] = ["/think", "/home/no_think"]
    for name, content in (("tokenizer_config.json", token), ("vocab.json", {"/home/a/b": 1})):
        (tmp_path / name).write_text(json.dumps(content))
        assert published_text(tmp_path / name) == (None, [])
