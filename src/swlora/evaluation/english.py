"""The loss of plain English text: above the untouched model's, it is what fine-tuning forgot.

The untouched model's is measured once: it is kept on disk, under a hash of all that it depends on.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from swlora.adapters.reach import is_covered
from swlora.caches import ENGLISH, about
from swlora.errors import RunFailedError
from swlora.evaluation.evaluated import EnglishLoss
from swlora.files import write_json
from swlora.kernels.forwards import fast_forwards
from swlora.kernels.patched_forwards import patched_forwards
from swlora.loss_sum import LossSum
from swlora.models.anatomy import context_tokens
from swlora.models.fingerprint import add_weights, config_values
from swlora.paths import cache_dir
from swlora.processes import dealt, from_main, world
from swlora.superweights.ablate import text_loss, text_windows, window_start
from swlora.threads import adapted_threads
from swlora.versions import package_versions

N_WINDOWS = 4
WINDOW_TOKENS = 512
FORMAT = 1


def english_loss(model: Any, tokenizer: Any) -> LossSum:
    """Return the loss over the first windows of the English sample that ships with the package."""
    return _measured(model, english_windows(model, tokenizer))


def english_windows(model: Any, tokenizer: Any) -> Tensor:
    """Return the windows as token ids (N_WINDOWS, T), each with BOS where the tokenizer puts it."""
    window_tokens = min(WINDOW_TOKENS, context_tokens(model))
    return text_windows(tokenizer, None, N_WINDOWS, window_tokens)


def untouched_english_loss(
    model: Any, tokenizer: Any, name: str, say: Callable[[str], None]
) -> LossSum:
    """Return `english_loss` of a model without adapter, from the cache where it was measured once.

    `name` tells a person whose it is. A cache that cannot be written is said and does no harm.
    """
    windows = english_windows(model, tokenizer)

    def known() -> tuple[float, float] | None:
        found = _read(path)
        return (found.sum_nats, found.n_tokens) if found else None

    path = cache_dir() / ENGLISH / f"{content_key(model, windows)}.json"
    if (of_cache := from_main(known)) is not None:
        return LossSum(*of_cache)
    loss = _measured(model, windows)
    if not world().is_main:
        return loss
    values = {**about(name), "sum_nats": loss.sum_nats, "n_tokens": loss.n_tokens}
    try:
        write_json(path, values)
    except RunFailedError as error:
        say(f"the loss of English text is not kept for later: {error}")
    return loss


def compare_english(untouched: LossSum, adapted: LossSum, tokenizer: Any) -> EnglishLoss:
    """Put the loss before an adapter was there beside that with it."""
    return EnglishLoss(
        perplexity_before=untouched.perplexity,
        perplexity=adapted.perplexity,
        sum_nats=adapted.sum_nats,
        n_tokens=adapted.n_tokens,
        windows_begin_with_bos=bool(window_start(tokenizer)),
    )


def content_key(model: Any, windows: Tensor) -> str:
    """Hash everything that the loss depends on: tokens, weights and their dtype, code, device."""
    digest = hashlib.sha256()
    facts = [FORMAT, config_values(model.config), package_versions(), model.device.type]
    digest.update(json.dumps([*facts, list(windows.shape)], sort_keys=True, default=str).encode())
    digest.update(windows.cpu().numpy().astype(np.int64).data)
    add_weights(digest, model.named_parameters())
    return digest.hexdigest()[:32]


@adapted_threads()
def _measured(model: Any, windows: Tensor) -> LossSum:
    def measured(window: Tensor) -> tuple[float, float]:
        loss = text_loss(model, window)
        return loss.sum_nats, loss.n_tokens

    with patched_forwards(fast_forwards(model)) if is_covered(model) else nullcontext():
        losses = dealt(windows.split(1), measured)
    return sum((LossSum(*loss) for loss in losses), LossSum())


def _read(path: Path) -> LossSum | None:
    """Return the loss in a file, which is in use then; None where it is not there or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        loss = LossSum(float(values["sum_nats"]), int(values["n_tokens"]))
        if not (math.isfinite(loss.sum_nats) and loss.n_tokens > 0):
            return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss
