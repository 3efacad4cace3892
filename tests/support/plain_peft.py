"""Oracles that call the model itself, a token at a time, without any cache."""

from typing import Any

import torch

EOS = 257


@torch.no_grad()
def greedy(model: Any, prompt: list[int], n: int) -> list[int]:
    """At most n tokens, each the likeliest after all before it; the end of sequence left out."""
    ids = list(prompt)
    for _ in range(n):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        token = int(logits[0, -1].float().argmax())
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]
