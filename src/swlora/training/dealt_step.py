"""A training step whose sequences are dealt to the processes of a run.

    gradient = sum over all processes of what each adds for its own trees

in float32, summed once a step with the loss and the wish to stop. Nothing else of the training
knows of other processes: each has the whole gradient, and changes its copy of the adapter by the
same arithmetic.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from swlora.adapters.adapted import Adapted
from swlora.data.dealing import Share, deal
from swlora.data.prefix_tree import count_group_nodes
from swlora.data.steps import cut_group
from swlora.data.token_sequences import Ints, TokenSequences
from swlora.kernels.host_arrays import on_device
from swlora.loss_sum import LossSum, as_count
from swlora.processes import check_peers, interruptible, world
from swlora.processes.joining import failing_together
from swlora.processes.tensors import summed
from swlora.random_numbers import drawing_by
from swlora.training.device_update import DeviceLoss, nats_on
from swlora.training.plain import PlainStep
from swlora.training.schedule import Step
from swlora.training.step import TreeStep
from swlora.training.stopping import StopRequest


class _Dealt(NamedTuple):
    """A step and what this process runs of it.

    Where processes share weights, each runs `n_trees`: weights are gathered in the middle of a
    tree, from all of them. Elsewhere that is 0.
    """

    groups: Step
    own: list[Ints]
    n_trees: int


class DealtStep:
    """Loss and gradient of the sequences of one optimizer step, over all processes.

    A process whose share is empty adds nothing: a step may have fewer sequences than others.
    """

    def __init__(self, step: TreeStep | PlainStep, adapted: Adapted, stop: StopRequest) -> None:
        self._step, self._stop = step, stop
        self._parameters = list(adapted.parameters.values())
        self._n_trained = _n_trained(step.sequences)
        self._dealt: _Dealt | None = None  # the step to come

    def __call__(self, groups: Step) -> LossSum:
        """Add the gradient of the summed loss of the step; return that loss.

        Raises RunFailedError where another process is gone; the weights are untouched then.
        """
        with interruptible():
            check_peers()
            dealt, self._dealt = self._dealt, None
            if dealt is None or dealt.groups is not groups:
                dealt = self._deal(groups)
            with _own_random_numbers(self._parameters[0].device):
                loss = self._run(dealt)
            n_tokens = as_count(float(self._n_trained[np.concatenate(list(groups))].sum()))
            return self._summed(loss, n_tokens)

    def ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yield the steps; where the step works ahead, it does so with what is run here."""
        work_ahead: Callable[[Iterator[Step]], Iterator[Step]]
        work_ahead = getattr(self._step, "ahead", iter)
        dealt: deque[_Dealt] = deque()

        def own() -> Iterator[Step]:
            for groups in steps:
                dealt.append(self._deal(groups))
                yield dealt[-1].own

        for _ in work_ahead(own()):
            self._dealt = dealt.popleft()
            yield self._dealt.groups

    def shares(self, groups: Step) -> list[Share]:
        """Return what each process runs, cut into trees no larger than those of the step."""
        step, sequences = self._step, self._step.sequences
        largest = int(count_group_nodes(sequences, groups).max())

        def cut(ids: Ints) -> list[Ints]:
            if isinstance(step, PlainStep):
                return [ids]
            return step.parts(cut_group(sequences, ids, largest))

        return deal(sequences, groups, world().size, cut)

    def _deal(self, groups: Step) -> _Dealt:
        step, own = self._step, self.shares(groups)[world().rank]
        is_sharded = isinstance(step, TreeStep) and step.is_sharded
        n_trees = len(own.groups) + own.n_empty if is_sharded else 0
        return _Dealt(groups, own.groups, n_trees)

    def _run(self, dealt: _Dealt) -> LossSum:
        """Run what was dealt to this process."""
        if dealt.n_trees and isinstance(self._step, TreeStep):
            with failing_together("a step of all processes"):
                return self._step(dealt.own, dealt.n_trees)
        return self._step(dealt.own) if dealt.own else LossSum()

    def _summed(self, loss: LossSum, n_tokens: float) -> LossSum:
        """Have the gradients of all processes in every one, and return the loss of all."""
        parameters, device = self._parameters, self._parameters[0].device
        has_gradient = [p.grad is not None for p in parameters]
        wishes = self._stop.wishes
        flags = on_device(np.array([*wishes, *has_gradient], np.float64), device)
        numbers = torch.cat([nats_on(device, loss).reshape(1), flags])
        gradients = [_float32_gradient(p) for p in parameters]
        summed([*gradients, numbers])
        first = 1 + len(wishes)
        self._stop.agree(numbers[1:first])
        # What no process has a gradient of stays without one: AdamW passes over it.
        somewhere = has_gradient if all(has_gradient) else (numbers[first:] > 0).tolist()
        for parameter, gradient, is_there in zip(parameters, gradients, somewhere, strict=True):
            parameter.grad = gradient.to(parameter.dtype) if is_there else None
        if device.type == "cuda":
            return DeviceLoss(numbers[0], n_tokens)
        return LossSum(float(numbers[0]), n_tokens)


def _n_trained(sequences: TokenSequences) -> np.ndarray:
    """Return the trained tokens of every sequence by their weights, (n,) float64."""
    total = np.concatenate([[0.0], np.cumsum(sequences.weights, dtype=np.float64)])
    offsets = sequences.offsets
    n_trained: np.ndarray = total[offsets[1:]] - total[offsets[:-1] + 1]
    return n_trained  # without the first tokens, which nothing predicts


def _float32_gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=torch.float32)
    return parameter.grad.float()


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Draw other random numbers in every process, by a seed that all draw alike.

    So the generators of all stand at the same place after it, and one state in a checkpoint is
    that of all.
    """
    drawn = int(torch.randint(1 << 62, ()))
    with drawing_by(drawn + world().rank, device):
        yield
