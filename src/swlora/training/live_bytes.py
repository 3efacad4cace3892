"""The memory of tensors that a computation makes, counted while it runs on a CPU."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swlora.models.sharded_weight import is_sharded


class LiveBytes(TorchDispatchMode):
    """Counts the tensors made in its body, forward and backward, until nobody holds them.

    `peak_bytes` is the most at any moment. What was there before does not count, nor do copies of
    weights in the kernels' layout, which have no storage.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes: int = 0
        self._held_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(made):
            if storage._cdata not in given:
                given.add(storage._cdata)
                self._hold(storage.nbytes())
                weakref.finalize(storage, self._hold, -storage.nbytes())
        return made

    def _hold(self, n_bytes: int) -> None:
        self._held_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)


def _storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    """Yield the storages of the strided tensors in a tree of values."""
    for leaf in tree_leaves(tree):
        if is_sharded(leaf):
            continue  # its operations run once more, on the part that is here
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()
