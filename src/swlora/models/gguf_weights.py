"""The weights of a .gguf file by transformers' names, read one at a time from the mapped file.

Which tensor of the file is which of the model, and what llama.cpp's converter did to it (rows of q
and k in another order, norms with one added, GPT-2's matrices transposed), is asked of the tables
in transformers, so that each tensor has the bits that loading the whole model would give it.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swlora.errors import UserError
from swlora.library_noise import quiet_libraries
from swlora.models.gguf_config import read_gguf_config
from swlora.models.gguf_header import StoredTensor, read_gguf_table
from swlora.models.gguf_reading import read_once
from swlora.plural import counted


class GgufWeights:
    """The weights of one .gguf file; nothing of them is in memory but what `tensor` returned.

    `model` is the model without its weights (on the meta device), made where none is given. Raises
    UserError where the file is damaged, or of an architecture that transformers does not read.
    """

    @read_once()
    def __init__(self, path: Path, model: Any = None) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        header = read_gguf_table(path)
        self.model = skeleton(path) if model is None else model
        processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
        self._processor: Any = processor(config=self.model.config.to_dict())
        self._own_names: dict[str, str] = get_gguf_hf_weights_map(self.model, self._processor)
        self._stored: defaultdict[str, list[StoredTensor]] = defaultdict(list)
        for name, stored in header.tensors.items():
            if (own_name := self._own_name(name)) is not None:
                self._stored[own_name].append(stored)
        self._unread = [n for n in header.tensors if self._own_name(n) is None]
        self._path = path

    def _own_name(self, name: str) -> str | None:
        """Return the model's name of a tensor of the file; stacks of experts have no `.weight`."""
        return self._own_names.get(name, self._own_names.get(name.removesuffix(".weight")))

    def check_all_read(self) -> None:
        """Raise UserError where the file has a tensor that is none of the model's.

        Factors of rotary frequencies are part of the configuration.
        """
        if unread := [name for name in self._unread if not name.startswith("rope_f")]:
            raise UserError(
                f"{self._path} has {counted(len(unread), 'tensor')} that no "
                f"{self.model.config.model_type} model of transformers has, such as {unread[0]}; "
                "it would be another one without"
            )

    @cached_property
    def names(self) -> Sequence[str]:
        """The names of the weights that the file holds, in the model's order.

        A tied head is not among them: it is the embedding.
        """
        return [name for name in self.model.state_dict() if name in self._stored]

    def shards(self) -> list[list[str]]:
        """Return the names by the file they lie in: there is one."""
        return [list(self.names)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a weight has in the model."""
        return tuple(self._shapes[name])

    def tensor(self, name: str) -> Tensor:
        """Return a weight in float32, dequantised, on the CPU."""
        from gguf import dequantize

        parsed: dict[str, Any] = {"tensors": {}}  # where the halves of fused experts are put
        weights: Any = None
        for stored in self._stored[name]:
            data, kind = self.blocks(stored), stored.kind
            parts = {"tensor_key_mapping": self._own_names, "parsed_parameters": parsed}
            done = self._processor.process(dequantize(data, kind), stored.name, **parts)
            weights = done.weights
        made = parsed["tensors"].get(name)
        tensor: Tensor = torch.from_numpy(np.copy(weights)) if made is None else made
        if tuple(tensor.shape) != self.shape(name):
            raise UserError(
                f"{self._path}: {name} has the shape {tuple(tensor.shape)} there, and the model "
                f"that the file describes has {self.shape(name)}"
            )
        return tensor

    def stored(self, name: str) -> StoredTensor | None:
        """Return where a weight lies in the file; None where it is put together of several."""
        parts = self._stored[name]
        return parts[0] if len(parts) == 1 else None

    def blocks(self, stored: StoredTensor) -> np.ndarray:
        """Return a tensor as it lies in the file, mapped: rows of bytes, float16 or float32."""
        from gguf import GGMLQuantizationType

        raw = self._data[stored.start : stored.start + stored.n_bytes]
        plain = {GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.F32: np.float32}
        rows = raw.view(plain.get(stored.kind, np.uint8))
        return rows.reshape(*stored.shape[:-1], -1)

    def row_order(self, name: str) -> np.ndarray | None:
        """Return which row of the file's matrix (out, in) each row of the weight is.

        None where the weight is no matrix of the file with its rows in some order, such as GPT-2's,
        which are transposed. A column of row numbers is sent the way that the weight goes.
        """
        stored = self.stored(name)
        if stored is None or len(stored.shape) != 2 or self.shape(name) != stored.shape:
            return None
        numbers = np.arange(stored.shape[0])[:, None]
        done = self._processor.process(numbers, stored.name, parsed_parameters={"tensors": {}})
        if done.weights.shape != numbers.shape:
            return None
        return np.ascontiguousarray(done.weights[:, 0])

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.model.state_dict().items()}

    @cached_property
    def _data(self) -> np.ndarray:
        return np.memmap(self._path, dtype=np.uint8, mode="c")  # no write reaches the file


def skeleton(path: Path) -> Any:
    """Return the model that a .gguf file describes, without weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    config = read_gguf_config(path)
    with quiet_libraries(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
