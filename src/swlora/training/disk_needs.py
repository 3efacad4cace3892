"""What a training will write into its run folder, known before its first step."""

from pathlib import Path
from typing import Any

from swlora.adapters.adapted import Adapted
from swlora.caches import disk_bytes
from swlora.disk_space import Need

METRICS_LINE_BYTES = 400
VOCABULARY_ENTRY_BYTES = 150  # of a token in tokenizer.json: 70 (GPT-2) to 130 (Gemma)


def training_needs(
    adapted: Adapted,
    tokenizer: Any,
    checkpoint: Path,
    *,
    n_steps: int,
    n_checkpoints: int,
    keeps_best: bool,
) -> list[Need]:
    """Return what a training of `n_steps` will write at most; `keeps_best`: into best/ too.

    `n_checkpoints` are there at once: those that are kept, and a new one until it is complete.

    A checkpoint has every trained weight three times, with AdamW's two moments, and AdaLoRA's two
    scores of each, which are made in the first step; what lies in the
    folder `checkpoint` is there already. A saved adapter has it once, PiSSA's twice; best/ is
    written beside the one that it replaces.
    """
    weights = sum(p.nbytes for p in adapted.parameters.values())
    state = max(2 * adapted.score_bytes, sum(t.nbytes for t in adapted.state().values()))
    saved = weights * (2 if adapted.spec.method == "pissa" else 1)
    there = disk_bytes(checkpoint) if checkpoint.is_dir() else 0
    saved += VOCABULARY_ENTRY_BYTES * len(tokenizer)
    return [
        Need("adapter", saved),
        Need("best/", 2 * saved if keeps_best else 0),
        Need("checkpoints", max(0, n_checkpoints * (3 * weights + state) - there)),
        Need("metrics", METRICS_LINE_BYTES * n_steps),
    ]
