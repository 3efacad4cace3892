#!/bin/bash
# datasets 5.2.0 with transformers 5.23.0: a chat that consists of dates loses them. The JSON Lines
# builder lets pyarrow guess a type for every string it meets, at any depth. Where all contents of
# a batch of lines are ISO dates ("what day follows 2024-03-05?" answered by a date alone, dates to
# be reformatted), the column is a timestamp and the rows hold datetime objects. A chat template
# then writes the word <datetime> for each of them: the renderer of transformers does not know the
# class and prints its name, with `| trim` or `is string` in the template too. Neither library says
# a word, and a model would be trained on <datetime>. One content that is no date keeps all strings.
# The same file read by the json module keeps strings: so only text may be taken as text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 transformers==5.23.0 jinja2==3.1.6
export HF_HUB_OFFLINE=1 FOLDER=$folder
"$folder/venv/bin/python" - <<'PY'
import json
import os
from importlib.metadata import version
from pathlib import Path

import datasets
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

folder = Path(os.environ["FOLDER"])
print("datasets", version("datasets"), "transformers", version("transformers"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


def rendered(name: str, *contents: tuple[str, str]) -> str:
    """Return the first chat of a file as datasets reads it and transformers writes it."""
    lines = [
        {"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}
        for u, a in contents
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(folder / "cache")
    )
    text = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    print(f"{name}: {rows.features['messages'].feature['content'].dtype}; {text}")
    return text


dates = ("2024-03-05", "2024-03-06")
only = rendered("only_dates", dates)
mixed = rendered("one_text_more", dates, ("and then?", "2024-03-07"))
assert only == "[user] <datetime> [assistant] <datetime> ", "the behaviour has changed"
assert mixed == "[user] 2024-03-05 [assistant] 2024-03-06 ", "the behaviour has changed"
PY
