"""Text to measure a model on, and single weights set to zero, or scaled, while a body runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from swlora.errors import UserError
from swlora.files import read_text
from swlora.loss_sum import LossSum
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.plural import counted
from swlora.superweights.detect import leading_bos
from swlora.threads import adapt_threads


def text_windows(tokenizer: Any, text: Path | None, n: int, window_tokens: int) -> Tensor:
    """Return the first `n` windows of a text as token ids of shape (n, window_tokens).

    Each begins with the BOS that the tokenizer puts before a text, which counts as one of its
    tokens; the text is cut without gaps. `text` None takes the English sample that ships with the
    package. Raises UserError where the text is unreadable or too short.
    """
    if text is None:
        content = resources.files("swlora.superweights").joinpath("english.txt").read_text("utf-8")
    else:
        content = read_text(text, "the text ")
    token_ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    start = window_start(tokenizer)
    n_needed = n * (window_tokens - len(start))
    if len(token_ids) < n_needed:
        need = "needs" if n == 1 else "need"
        raise UserError(
            f"the text has {counted(len(token_ids), 'token')}; {counted(n, 'window')} of "
            f"{window_tokens} {need} {n_needed}{' beside BOS' * bool(start)}: give a longer --text "
            "or fewer --windows"
        )
    windows = torch.tensor(token_ids[:n_needed]).view(n, -1)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(n, -1), windows], dim=1)


def window_start(tokenizer: Any) -> list[int]:
    """Return what windows of text begin with, as the model was trained to begin: the BOS that the
    tokenizer puts before every text by itself, [] where it puts none.
    """
    return leading_bos(tokenizer, tokenizer("word", verbose=False).input_ids)


@torch.inference_mode()
def text_loss(model: Any, windows: Tensor) -> LossSum:
    """Return the loss over windows (n, T); the first token of a window is not predicted."""
    sum_nats = 0.0
    for window in torch.split(windows.to(model.device), 1):
        adapt_threads()
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        sum_nats += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return LossSum(sum_nats, windows.shape[0] * (windows.shape[1] - 1))


@contextmanager
def scaled(anatomy: Anatomy, scales: Mapping[WeightAddress, float]) -> Iterator[None]:
    """Multiply the addressed scalars while the body runs; restore them bit for bit."""
    views = [anatomy.weight_view(address) for address in scales]
    with ExitStack() as stack:  # each is restored, even where restoring another fails
        for view in views:
            stack.callback(view.copy_, view.clone())
        for view, factor in zip(views, scales.values(), strict=True):
            view.mul_(factor) if factor else view.zero_()  # zero even where it is not a number
        yield


@contextmanager
def zeroed(anatomy: Anatomy, addresses: Sequence[WeightAddress]) -> Iterator[None]:
    """Set the addressed scalars to zero while the body runs; restore them bit for bit."""
    if not addresses:
        raise UserError("no weight was named to be set to zero")
    with scaled(anatomy, dict.fromkeys(addresses, 0.0)):
        yield
