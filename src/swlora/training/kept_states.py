"""Whether a training keeps the states below its lowest adapted layer, and what that takes."""

from collections.abc import Callable
from dataclasses import dataclass

from swlora.caches import disk_bytes
from swlora.config import TrainSpec
from swlora.disk_space import free_bytes
from swlora.training.frozen_prefix import GIB, PrefixCache, cache_folder, n_cache_bytes
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep, has_one_side


@dataclass(frozen=True)
class KeptStates:
    """The bytes of the states that are kept on the disk, and those of them that are not there yet.

    0 where none are kept.
    """

    n_bytes: int = 0
    missing_bytes: int = 0

    @property
    def are_kept(self) -> bool:
        """Whether any are."""
        return self.n_bytes > 0

    @property
    def missing_share(self) -> float:
        """How many of them are to be computed, as a share of all."""
        return self.missing_bytes / self.n_bytes if self.n_bytes else 1.0


def kept_by(step: TreeStep | PlainStep) -> KeptStates:
    """Return what a step that was made keeps."""
    if not isinstance(step, TreeStep) or not isinstance(step.prefix_source, PrefixCache):
        return KeptStates()
    if not step.prefix_source.is_open:
        return KeptStates()
    n_bytes = n_cache_bytes(step.base_model, step.sequences)
    return KeptStates(n_bytes, round(step.prefix_source.missing_share * n_bytes))


def kept_states(
    step: TreeStep | PlainStep, spec: TrainSpec, kept_bytes: int, say: Callable[[str], None]
) -> KeptStates:
    """Return what `make_step` with this `spec` would keep; nothing is made on the disk.

    `step` is such a step that keeps none; `kept_bytes` of the disk are for others.
    """
    if isinstance(step, PlainStep) or step.is_sharded or not spec.cache_gb or not step.walk.cut:
        return KeptStates()
    n_bytes = n_cache_bytes(step.base_model, step.sequences)
    if n_bytes > spec.cache_gb * GIB or not has_one_side(step, step.sequences, say):
        return KeptStates()
    folder = cache_folder(step.walk, step.sequences)
    missing_bytes = max(0, n_bytes - (disk_bytes(folder) if folder.is_dir() else 0))
    if missing_bytes > free_bytes(folder) - kept_bytes:
        return KeptStates()
    return KeptStates(n_bytes, missing_bytes)
