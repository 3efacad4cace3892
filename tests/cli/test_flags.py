"""Flags from fields: what a person reads of a setting before using it."""

import re

import pytest

CHOICES = {
    "--dtype": "auto, float32 or bfloat16 [default: auto]",
    "--split": "dev or test [default: dev]",
    "--method": "lora, lora+, dora, adalora, pissa, rslora, full or supertuning [default: lora]",
    "--schedule": "linear, cosine or constant [default: linear]",
    "--engine": "auto, tree or plain; tree: same gradient, less work; plain: padded batches",
    "--order": "prompts, pairs, neighbours or iid; what shares a step",
}


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("train-eval", [*CHOICES]),
        ("eval", ["--dtype", "--split"]),
        ("identify", ["--dtype"]),
        ("generate", ["--dtype"]),
    ],
)
def test_help_lists_the_values_of_a_flag_that_has_a_few(verb, flags, swlora, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    lines = swlora(verb, "--help").out.splitlines()
    for flag in flags:
        (line,) = [s for s in lines if re.search(rf"│ {flag} ", s)]
        assert re.search(rf"> +{re.escape(CHOICES[flag])}", line)


def test_a_flag_of_any_value_lists_none(swlora, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    (line,) = [s for s in swlora("train", "--help").out.splitlines() if "│ --alpha " in s]
    assert re.search(r"<float> +\[default: 32.0\]", line)
