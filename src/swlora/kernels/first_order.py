"""Backwards that have none of their own say so, instead of giving wrong second derivatives."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from swlora.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def first_order(backward: Callable[P, R]) -> Callable[P, R]:
    """Let the backward of an autograd function raise UserError under `create_graph=True`.

    torch would differentiate what it does with saved tensors as if they were constants. (torch's
    `once_differentiable` lets that pass where the incoming gradient is a constant, as a loss's is.)
    """

    @wraps(backward)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():
            raise UserError(
                "swlora's forwards have first derivatives alone, and create_graph=True asks for "
                "second ones; take the model's own forward, unpatched"
            )
        return backward(*args, **kwargs)

    return checked
