"""The types in which tensors are written to a GGUF file."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from swlora.deploy.export_request import TypeName
from swlora.errors import UserError

FILE_TYPES: dict[TypeName, int] = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # LlamaFileType
_BLOCK = 32  # values of a block of q8_0


def tensor_type(name: str, shape: tuple[int, ...], asked: TypeName) -> TypeName:
    """Return the type that a tensor gets in a file of the type `asked`.

    What has one dimension stays float32, and so do the weights that choose experts, as in files of
    llama.cpp's own converter. Rows that are no multiple of a block of q8_0 become f16.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "f32"
    return "f16" if asked == "q8_0" and shape[-1] % _BLOCK else asked


def encoded(name: str, tensor: Tensor, kind: TypeName) -> Any:
    """Return a tensor of any float dtype as the array of its bytes or values in the file.

    Raises UserError for a number that is not finite, or beyond float16.
    """
    import gguf

    values = tensor.detach().to("cpu", torch.float32).contiguous()
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not np.isfinite(largest):
        raise UserError(f"{name} has numbers that are not finite: such a model is not exported")
    if kind == "f16" and largest > torch.finfo(torch.float16).max:
        raise UserError(f"{name} has numbers up to {largest:.0f}, beyond float16; use --type bf16")
    return gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind.upper()])


def rounded(tensor: Tensor, kind: TypeName) -> Tensor:
    """Return the float32 values that a tensor has once it was written in a type."""
    import gguf

    if kind in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        return tensor.to(torch.float32).to(dtype).to(torch.float32)
    encoded_values = encoded("", tensor, kind)
    values = gguf.quants.dequantize(encoded_values, gguf.GGMLQuantizationType[kind.upper()])
    return torch.from_numpy(np.ascontiguousarray(values))
