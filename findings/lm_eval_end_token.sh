#!/bin/bash
# lm-evaluation-harness 0.4.13, model `local-completions`: a log-likelihood is the sum of
# choices[].logprobs.token_logprobs from the context's length to the LAST ENTRY BUT ONE. The last
# entry is taken for the one new token (the request has max_tokens 1 and echo), without a look at
# how many entries there are. A server that lists only the tokens of the text it returns has no entry
# for a new token that ended the text at once (the end-of-sequence token, which is no text): then the
# last token of the choice itself is left out of the sum, and of the question whether it is greedy.
# Nothing warns. The choice "a b" with -1 and -2 nats gets -1 instead of -3, and only for those
# choices after which the model would stop: whole sentences, that is, rather than torn ones.
# So a server has to list the end token too, although it is not part of the text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "lm_eval[api]==0.4.13"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

from lm_eval.models.openai_completions import LocalCompletionsAPI


def answer(listed: list[float | None], reason: str) -> dict:
    """An answer to {"prompt": [[1, 2, 3, 4]], "echo": true, "max_tokens": 1, "logprobs": 1}."""
    top = [None if value is None else {"x": value} for value in listed]
    logprobs = {"token_logprobs": listed, "top_logprobs": top}
    choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": reason}
    return {"choices": [choice]}


prompt = [None, -0.5, -1.0, -2.0]  # two tokens of context, two of the choice
print("lm_eval", version("lm_eval"))
found = {}
for name, made in {
    "the new token is listed": answer([*prompt, -0.25], "length"),
    "the new token ended the text and is not listed": answer(prompt, "stop"),
}.items():
    ((total, is_greedy),) = LocalCompletionsAPI.parse_logprobs(made, [[1, 2, 3, 4]], [2])
    found[name] = total
    print(f"{name}: log-likelihood of the choice {total}, greedy {is_greedy}")
assert list(found.values()) == [-3.0, -1.0], "the behaviour has changed"
PY
