"""Text from a model: one generation a prompt, prompts of similar length together, left padding.

Greedy by default; beam search as in the LoRA paper with num_beams 10, length_penalty 0.9 and
no_repeat_ngram_size 4 (arXiv 2106.09685, table 11).
"""

from collections.abc import Sequence
from typing import Any

import torch

from swlora.config import DecodeSpec
from swlora.engine.tree_step import fast_modules
from swlora.errors import UserError
from swlora.models.anatomy import context_tokens
from swlora.progress import Progress


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    spec: DecodeSpec,
    progress: Progress,
    *,
    seed: int = 0,
) -> list[str]:
    """Return the generated text for every prompt (token ids), in their order.

    Generation stops at the tokenizer's end-of-sequence token, which is not part of the text.
    Raises UserError where a prompt leaves no room in the model's context.
    """
    check_room(model, prompts, spec)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    n_at_once = max(1, spec.batch_size // spec.num_beams)
    with (
        torch.random.fork_rng(),
        fast_modules(model),
        progress.task("generate", len(prompts)) as task,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), n_at_once):
            chunk = order[start : start + n_at_once]
            batch_texts = _generate_batch(model, tokenizer, [prompts[i] for i in chunk], spec)
            for i, text in zip(chunk, batch_texts, strict=True):
                texts[i] = text
            task.advance(len(chunk))
    return texts


def check_room(model: Any, prompts: Sequence[Sequence[int]], spec: DecodeSpec) -> None:
    """Raise UserError where a prompt and `max_new_tokens` exceed the model's context."""
    longest, room = max(len(prompt) for prompt in prompts), context_tokens(model)
    if longest + spec.max_new_tokens > room:
        raise UserError(
            f"a prompt of {longest} tokens and {spec.max_new_tokens} new ones exceed the model's "
            f"context of {room}; lower --max-new-tokens or shorten the prompt"
        )


@torch.inference_mode()
def _generate_batch(
    model: Any, tokenizer: Any, prompts: list[Sequence[int]], spec: DecodeSpec
) -> list[str]:
    length = max(len(prompt) for prompt in prompts)
    token_ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(token_ids)
    for b, prompt in enumerate(prompts):
        token_ids[b, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[b, length - len(prompt) :] = 1
    out = model.generate(
        input_ids=token_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=generation_config(spec, tokenizer),
    )
    return list(tokenizer.batch_decode(out[:, length:], skip_special_tokens=True))


def generation_config(spec: DecodeSpec, tokenizer: Any) -> Any:
    """Translate a DecodeSpec into the transformers object.

    What it leaves open, transformers takes from the model, which `load_model` has made to say
    nothing.
    """
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {}
    if spec.temperature > 0:
        sampling = {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": 0}
    beams: dict[str, Any] = {}
    if spec.num_beams > 1:
        beams = {"num_beams": spec.num_beams, "length_penalty": spec.length_penalty}
    return GenerationConfig(
        do_sample=spec.temperature > 0,
        max_new_tokens=spec.max_new_tokens,
        no_repeat_ngram_size=spec.no_repeat_ngram_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
        **beams,
    )
