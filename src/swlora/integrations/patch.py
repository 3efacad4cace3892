"""The fast forwards of adapters, norms, MLPs, frozen maps and the head in anybody's own loop."""

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn

from swlora.errors import UserError
from swlora.integrations.batch_rows import IGNORED
from swlora.integrations.exactness import base_of, in_weights_dtype, other_loss, unreadable_weights
from swlora.integrations.tree_loss import adapter_state
from swlora.kernels.forwards import fast_forwards, has_hooks, refresh, uncalled
from swlora.kernels.head_loss import Targets, head_loss
from swlora.kernels.linear.frozen import FrozenLinear, is_frozen
from swlora.kernels.lora import FastLora
from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import Anatomy
from swlora.models.linear_maps import MAPS, is_linear_map

# Arguments with which a forward of transformers gives a loss and logits, and nothing else
_PLAIN_ARGUMENTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"),
    *("use_cache", "labels", "num_items_in_batch"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
}


def patch(model: Any) -> "Patch":
    """Let a model compute with swlora's forwards until `undo`, or in the body of a `with`.

    Outputs and gradients are the same to rounding; no trees, no sharing. In training mode a
    forward with labels makes the loss some rows at a time, and its `logits` are None; in eval mode
    they are there. Whoever disables, merges or switches adapters meanwhile gets PEFT's own forward
    where the adapter is not as it was, and so do modules whose parts have hooks. A deep copy of the
    model is not patched. Raises UserError where nothing of the model is known, or it is patched
    already.

        with swlora.patch(model) as patched:
            print(patched.replaced)
            ...  # the loop as it was
    """
    return Patch(model)


class Patch:
    """The forwards that a model has in the place of its own; `replaced` counts them by kind."""

    def __init__(self, model: Any) -> None:
        base = base_of(model)
        if why := unreadable_weights(base):
            raise UserError(f"patch: {why}; the model runs as it is, unpatched")
        anatomy = Anatomy(base)
        before = vars(anatomy.backbone).get("forward")
        if isinstance(before, _Forward) and not before.has_ended:
            raise UserError("patch: the model is patched already; undo that first")
        fast = fast_forwards(model)
        if not is_frozen(anatomy.head):
            fast.pop(anatomy.head, None)  # it would be torch's own product
        self.replaced = dict(Counter(_kind(module, anatomy) for module in fast))
        has_head_loss = _has_head_loss(base, anatomy)
        if has_head_loss:
            self.replaced["loss of the head"] = 1
        if not fast:
            raise UserError(
                f"patch: nothing in this {base.config.model_type} model has a fast forward (no "
                "adapter, frozen norm, gated MLP or frozen linear map of a known kind)"
            )
        forwards: dict[nn.Module, Callable[..., Any]] = {
            module: _guarded(module, forward) for module, forward in fast.items()
        }
        forwards[anatomy.backbone] = _followed(base, anatomy.backbone, fast)
        if has_head_loss:
            own_head = fast.get(anatomy.head)
            frozen = own_head if isinstance(own_head, FrozenLinear) else None
            forwards[base] = _with_head_loss(base, anatomy, frozen)
        self._forwards = {m: _Forward(m, forward) for m, forward in forwards.items()}
        self._undo = ExitStack()
        self._undo.enter_context(patched_forwards(self._forwards))

    def undo(self) -> None:
        """Give every module the forward that it had; a second time does nothing.

        A forward that somebody has wrapped meanwhile stays wrapped, and is the module's own again.
        """
        self._undo.close()
        for forward in self._forwards.values():
            forward.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


class _Forward:
    """A forward in the place of a module's own, which copies of the module have again.

    A copied function would go on computing with the weights of the module that it was made for.
    """

    def __init__(self, module: nn.Module, compute: Callable[..., Any]) -> None:
        self._module, self._compute = module, compute
        self._own = vars(module).get("forward")
        self.has_ended = False
        self.__signature__ = inspect.signature(compute)

    def end(self) -> None:
        """From now on compute as the module does without this."""
        self._compute = self._own or MethodType(type(self._module).forward, self._module)
        self.has_ended = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compute(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        return MethodType(type(self._module).forward, copy.deepcopy(self._module, memo))


def _kind(module: nn.Module, anatomy: Anatomy) -> str:
    if module is anatomy.head:
        return "head"
    if hasattr(module, "lora_A"):
        return "adapters"
    if isinstance(module, MAPS):
        return "frozen maps"
    return "norms" if type(module).__name__.endswith("Norm") else "gated MLPs"


def _guarded(module: Any, fast: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a forward that is the module's own where it is no longer what `fast` was made for."""
    own, parts = module.forward, uncalled(module, fast)
    if isinstance(fast, FastLora):
        state = adapter_state(module)

        def forward_adapted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            is_same = not args and not kwargs and adapter_state(module) == state
            is_same = is_same and is_frozen(module.base_layer) and not any(map(has_hooks, parts))
            return fast(x) if is_same else own(x, *args, **kwargs)

        return forward_adapted

    def forward(x: Tensor) -> Any:
        return fast(x) if is_frozen(module) and not any(map(has_hooks, parts)) else own(x)

    return forward


def _followed(base: Any, backbone: nn.Module, fast: Any) -> Callable[..., Any]:
    """Return the decoder's forward, which lets the forwards follow weights that have changed."""
    own = backbone.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        refresh(fast)
        with in_weights_dtype(base):
            return own(*args, **kwargs)

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    return forward


def _has_head_loss(base: Any, anatomy: Anatomy) -> bool:
    is_plain_head = is_linear_map(anatomy.head) and is_frozen(anatomy.head)
    return is_plain_head and not has_hooks(anatomy.head) and other_loss(base) is None


def _with_head_loss(base: Any, anatomy: Anatomy, frozen: FrozenLinear | None) -> Callable[..., Any]:
    """Return the model's forward, with the loss in training made of a few rows of logits at a time.

    The model's own forward runs with a head that notes the final states and makes no logits.
    `frozen` is the fast forward of the head, whose copies of the weight last as long as the patch.
    """
    own, head = base.forward, anatomy.head

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}
        labels, n_items = given.pop("labels", None), given.pop("num_items_in_batch", None)
        is_plain = not args and given.keys() <= _PLAIN_ARGUMENTS
        if not (
            base.training and labels is not None and is_plain and _has_head_loss(base, anatomy)
        ):
            return own(*args, **kwargs)
        wanted = labels[:, 1:] != IGNORED
        if not wanted.any():
            return own(*args, **kwargs)
        states: list[Tensor] = []

        def noted(hidden: Tensor) -> Tensor:
            states.append(hidden)
            return hidden.new_empty(*hidden.shape[:-1], 0)

        with patched_forwards({head: noted}):
            output = own(**given)
        nats = _nats(states[0][:, :-1][wanted], labels[:, 1:][wanted], anatomy, frozen)
        loss = nats / (
            wanted.sum() if n_items is None else torch.as_tensor(n_items).to(nats.device)
        )
        return type(output)(**{**output, "loss": loss, "logits": None})

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    return forward


def _nats(
    hidden: Tensor, token_ids: Tensor, anatomy: Anatomy, frozen: FrozenLinear | None
) -> Tensor:
    """Return the summed loss in nats of final states (N, D) against tokens (N,)."""
    rows = torch.arange(len(hidden), device=hidden.device)
    ones = torch.ones(len(hidden), device=hidden.device)
    head: Any = anatomy.head
    targets = Targets(rows, token_ids.to(hidden.device), ones, ones)
    return head_loss(hidden, head, targets, cap=anatomy.logit_cap, frozen=frozen)
