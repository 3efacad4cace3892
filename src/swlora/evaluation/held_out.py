"""The loss on rows that are not trained on, measured while a training is under way."""

import time
from collections.abc import Callable
from typing import Any

from swlora.adapters.methods import train_mode
from swlora.data.token_sequences import TokenSequences
from swlora.evaluation.loss import dataset_loss
from swlora.progress import Silent


def held_out_observer(model: Any, sequences: TokenSequences) -> Callable[[int], dict[str, Any]]:
    """Return an observer for the training loop: the loss of a PeftModel on all `sequences`.

    The adapter's dropout is off while it measures and on again afterwards, so that the training
    goes on as it would have; no random number is drawn.
    """

    def observe(_step: int) -> dict[str, Any]:
        start_s = time.perf_counter()
        model.eval()
        loss = dataset_loss(model, sequences, Silent())
        train_mode(model)
        return {
            "eval_nll": loss.nats_per_token,
            "eval_sum_nats": loss.sum_nats,
            "eval_n_tokens": loss.n_tokens,
            "eval_s": time.perf_counter() - start_s,
        }

    return observe
