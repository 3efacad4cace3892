#!/bin/bash
# trl 1.16.0 with transformers 5.23.0: for assistant_only_loss, trl puts a template of its own in the
# place of a model's, in which {% generation %} marks what is trained. Where the mark begins differs
# from family to family. In Llama 3, Gemma, Phi-3 and Qwen 3 it begins behind the generation prompt,
# with the first token that the model has to write. In Qwen 2.5 it takes in the line break behind
# "assistant", in gpt-oss the whole header "<|start|>assistant", and in Qwen 3.5 and 3.6 the opened
# block of reasoning ("<think>\n", without thinking "<think>\n\n</think>\n\n"): tokens that the
# generation prompt of the same template has written already. They are trained in every answer, and,
# being certain, make the mean loss of an answer's tokens look lower than that of what is generated;
# losses of two families are not of the same tokens. (Of Gemma, trl's notes say that the cue stays
# outside of the mark because the model does not generate it.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps trl==1.16.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import files, version

from transformers.utils.chat_template_utils import render_jinja_template

print("trl", version("trl"), "transformers", version("transformers"))
templates = {
    file.name.removesuffix("_training.jinja"): file.read_text(encoding="utf-8")
    for file in files("trl")
    if file.name.endswith("_training.jinja")
}
ASKED = [{"role": "user", "content": "Hi"}]
CHAT = [*ASKED, {"role": "assistant", "content": "Yes"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def given_and_trained(template: str) -> str:
    """Return what is marked and stands in the generation prompt already."""
    (prompt,), _ = render_jinja_template(
        [ASKED], chat_template=template, add_generation_prompt=True, **TOKENS
    )
    (text,), (marks,) = render_jinja_template(
        [CHAT], chat_template=template, return_assistant_tokens_mask=True, **TOKENS
    )
    assert text.startswith(prompt) and "Yes" in text[slice(*marks[0])]
    return text[marks[0][0] : len(prompt)]


FOUND = {
    "llama3": "",
    "gemma3": "",
    "phi3": "",
    "qwen3": "",
    "qwen2_5": "\n",
    "qwen3_5_think": "<think>\n",
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    "qwen3_6": "<think>\n",
    "gptoss": "<|start|>assistant",
}
for name in FOUND:
    print(f"{name:16} marks {given_and_trained(templates[name])!r} of the generation prompt")
assert {name: given_and_trained(templates[name]) for name in FOUND} == FOUND
PY
