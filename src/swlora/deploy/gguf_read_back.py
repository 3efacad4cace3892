"""A GGUF file read back where there is no llama.cpp: as swlora itself would load it.

The second model is built from what the file says of itself, so that a setting that was written
wrong shows, by its name; then logits, continuations and token ids are compared.
"""

import math
from pathlib import Path
from typing import Any

import torch

from swlora.deploy.agreement import Agreement, chat_texts, compare_logits
from swlora.deploy.gguf_check import (
    KL_LIMITS,
    TIE_NATS,
    Checked,
    check_special_tokens,
    continued,
    gap_of,
)
from swlora.deploy.gguf_hyperparameters import context_tokens
from swlora.deploy.gguf_texts import compared_texts, token_ids
from swlora.deploy.llama_cpp import INSTALL
from swlora.errors import RunFailedError, UserError
from swlora.models.gguf_file import load_gguf
from swlora.models.gguf_header import read_gguf_table
from swlora.models.gguf_rope import head_dim
from swlora.models.gguf_tokenizer import adds_bos, puts_space

_ROUNDING = 1e-6  # relative: numbers of a file are float32
_SETTINGS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "layer_norm_epsilon", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "tie_word_embeddings"),
)


def check_by_reading(path: Path, model: Any, tokenizer: Any, name: str) -> Checked:
    """Compare the model that a file describes with the one that it was made from.

    name: the file's in messages. Raises RunFailedError for a file that is not read, and for one
    that says something else of the model or its tokenizer, by name.
    """
    import transformers

    try:
        back, its_tokenizer = load_gguf(path)
    except UserError as error:
        said = str(error).replace(str(path), name)
        raise RunFailedError(
            f"{said}; so it cannot be checked here: `{INSTALL}`, then --llama-cpp FOLDER"
        ) from error
    if differing := differing_settings(model, back):
        raise RunFailedError(f"{name} was not written: it says {'; '.join(differing)}")
    header = read_gguf_table(path)
    bos, eos = (header.facts.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos"))
    check_special_tokens(tokenizer, bos, eos, adds_bos(header), name)
    both = (tokenizer, its_tokenizer)
    texts, chats = compared_texts(*both, has_space=puts_space(header)), chat_texts(tokenizer)
    own, found = (token_ids(t, texts) for t in both)
    own_chats, found_chats = (token_ids(t, chats) for t in both)
    total, gap = _compared(model, back.eval(), tokenizer)
    by = f"transformers {transformers.__version__}, by which it was read back; not run in llama.cpp"
    return Checked(
        by,
        total,
        KL_LIMITS["f32"],
        gap,
        TIE_NATS["f32"],
        tokens_equal=own == found,
        chat_tokens_equal=own_chats == found_chats if chats else None,
    )


def differing_settings(model: Any, other: Any) -> list[str]:
    """Return what two models' configurations say otherwise, of what their logits depend on."""
    pairs = {
        name: tuple(getattr(m.config, name, None) for m in (model, other)) for name in _SETTINGS
    }
    pairs["head_dim"] = (head_dim(model.config), head_dim(other.config))
    length = other.config.max_position_embeddings
    pairs["max_position_embeddings"] = (context_tokens(model.config), length)
    if model.config.model_type.startswith("gemma"):
        windows = tuple(getattr(m.config, "sliding_window", None) for m in (model, other))
        pairs["sliding_window"] = windows
    said = [
        f"{n} = {_shown(found)}, not {_shown(own)}"
        for n, (own, found) in pairs.items()
        if not _same(own, found)
    ]
    return said + _differing_rope(model, other)


def _differing_rope(model: Any, other: Any) -> list[str]:
    """Compare the rotary frequencies that two models compute with, whatever they come from."""
    found = []
    for (name, own), (_, its) in zip(*map(_rotary, (model, other)), strict=True):
        if own.shape != its.shape or not torch.allclose(own, its, 10 * _ROUNDING, 0.0):
            found.append(f"rotary positions with other frequencies ({name}: rope_theta, scaling)")
    return found


def _rotary(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Return frequencies and scales of attention of the rotary modules, by name."""
    found = {name: b for name, b in model.named_buffers() if name.endswith("inv_freq")}
    for module_name, module in model.named_modules():
        for name, value in vars(module).items():
            if name.endswith("attention_scaling"):
                found[f"{module_name}.{name}"] = torch.tensor(float(value))
    return sorted(found.items())


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _same(own: Any, found: Any) -> bool:
    if isinstance(own, float) or isinstance(found, float):
        return own is not None and found is not None and math.isclose(own, found, rel_tol=_ROUNDING)
    return bool(own == found)


@torch.inference_mode()
def _compared(model: Any, back: Any, tokenizer: Any) -> tuple[Agreement, float]:
    """Return the agreement, and the largest gap where continuations part."""
    total, gap = Agreement(0, 0.0, 0.0, 0), 0.0
    texts = continued(model, tokenizer, context_tokens(model.config))
    for prompt, expected in zip(*texts, strict=True):
        row = torch.cat([prompt, expected])[None]
        own, found = (m(input_ids=row).logits[0] for m in (model, back))
        total += compare_logits(own, found)
        tops = found[len(prompt) - 1 : -1].argmax(-1)
        here = gap_of(own[len(prompt) - 1 : -1], expected, tops)
        total += Agreement(0, 0.0, 0.0, 0, 1, int(here is None))
        gap = max(gap, here or 0.0)
    return total, gap
