"""Models of known shapes with random weights, and rows for them: nothing is fetched or read.

Speed hangs on shapes alone. The rows are E2E's where `benchmarks.gpu_prepare` has written them,
else rows made from a seed with as many references a prompt and tokens a row.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.token_rows import TokenRows

_LLAMA = {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **_LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        **_LLAMA,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
}
REFERENCES, PROMPT_TOKENS, COMPLETION_TOKENS = 8.65, (20, 50), (12, 38)  # about those of E2E


def random_model(shape: str, device: str) -> Any:
    """Return a Llama of this shape, bfloat16 on CUDA and float32 on a CPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype)
    return model.eval().requires_grad_(False)


def e2e_rows(file: Path | None, n_rows: int, vocab_size: int) -> tuple[TokenRows, str]:
    """Return the first rows of whole prompts, and what they are."""
    if file is not None and file.is_file():
        rows = TokenRows.load(file).first(n_rows)
        tokens = rows.tokens % vocab_size  # of a smaller model
        return TokenRows(tokens.astype(np.int32), rows.offsets, rows.trained), "E2E"
    return made_rows(n_rows, vocab_size), "made: as many references and tokens as E2E"


def made_rows(n_rows: int, vocab_size: int) -> TokenRows:
    """Make prompts with several completions each, the same ones every time."""
    rng, parts = np.random.default_rng(0), []
    while len(parts) < n_rows:
        prompt = rng.integers(3, vocab_size, rng.integers(*PROMPT_TOKENS)).tolist()
        for _ in range(1 + rng.poisson(REFERENCES - 1)):
            completion = rng.integers(3, vocab_size, rng.integers(*COMPLETION_TOKENS)).tolist()
            parts.append([(prompt, False), (completion, True)])
    return TokenRows.from_parts(parts[:n_rows])


def unshared_rows(n_rows: int, n_tokens: int, vocab_size: int) -> TokenRows:
    """Make rows that share nothing, all of their tokens but the first trained."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocab_size, (n_rows, n_tokens)).tolist()
    return TokenRows.from_parts([[(row[:1], False), (row[1:], True)] for row in tokens])
