"""Log-probabilities of the tokens of prompts, gathered while a prefix tree is run by stretches.

log p(token t | the tokens before it) = log_softmax(logits of the node before t)[t]
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swlora.decoding.sampling import Choice


class PromptScores:
    """The scores of some prompts, token by token; nothing of a stretch's logits is kept.

    `paths` holds the nodes of each prompt in a tree's depth-first order, `wanted` how many
    alternatives to name at every token of those that are scored.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        paths: Mapping[int, NDArray[np.int64]],
        wanted: Mapping[int, int],
    ) -> None:
        self._prompts, self._paths, self._wanted = prompts, paths, wanted
        self._choices = {i: [Choice(prompts[i][0])] for i in wanted}

    def nodes(self, start: int, end: int) -> set[int]:
        """Return the nodes from `start` to `end` whose logits are needed."""
        return {int(node) for i in self._wanted for node in self._before(i, start, end)}

    def take(self, start: int, end: int, places: Mapping[int, int], logits: Tensor) -> None:
        """Take the logits (n, V) of a stretch; `places` says in which row a node's are."""
        n_most = max(self._wanted.values(), default=0)
        if not self.nodes(start, end):
            return
        log_p = torch.log_softmax(logits.float(), dim=-1)
        top = torch.topk(log_p, n_most)
        ids, values = top.indices.tolist(), top.values.tolist()
        for i, n_alternatives in self._wanted.items():
            rows = [places[int(node)] for node in self._before(i, start, end)]
            done = len(self._choices[i])
            tokens = list(self._prompts[i][done : done + len(rows)])
            own = log_p[rows, tokens].tolist()
            for row, token, value in zip(rows, tokens, own, strict=True):
                best = zip(ids[row][:n_alternatives], values[row], strict=False)
                self._choices[i].append(Choice(token, value, tuple(best)))

    def scores(self, i: int) -> tuple[Choice, ...]:
        """Return the tokens of prompt i; empty where it is not scored.

        The first has no probability.
        """
        return tuple(self._choices.get(i, ()))

    def _before(self, i: int, start: int, end: int) -> NDArray[np.int64]:
        """Return the nodes of the stretch that a token of prompt i follows."""
        path = self._paths[i][:-1]
        return path[(path >= start) & (path < end)]
