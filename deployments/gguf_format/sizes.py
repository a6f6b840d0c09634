"""What the tensors of a GGUF file take once they are loaded, and while they are computed with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from deployments.gguf_format.header import GgufHeader, GgufTensor

EMBEDDINGS = ("token_embd.weight",)  # names by llama.cpp of matrices that are read row by row


def stays_quantised(tensor: GgufTensor) -> bool:
    """Whether its blocks are kept as they are: those of Linear layers; others are brought into floats once.

    By name and shape, and so about right; which layer has it is known to the loaded model alone.
    """
    reshaped = tensor.original_shape is not None
    is_matrix = len(tensor.shape) == 2 and not reshaped and tensor.name not in EMBEDDINGS
    return is_matrix and not tensor.type.is_plain


def loaded_bytes(header: GgufHeader, itemsize: int) -> int:
    """Bytes of all tensors in memory. itemsize: of the dtype that the part computes in."""
    return sum(
        tensor.nbytes if stays_quantised(tensor) else tensor.values * itemsize
        for tensor in header.tensors.values()
    )


def workspace_bytes(header: GgufHeader, itemsize: int) -> int:
    """The most that one layer's forward takes to bring its weight into floats.

    itemsize: of the dtype that the part computes in.
    """
    return max((layer_workspace(tensor, itemsize) for tensor in _quantised(header)), default=0)


def layer_workspace(tensor: GgufTensor, itemsize: int) -> int:
    """The most that is in memory while this weight is brought into floats of so many bytes: diffusers makes
    those of 16 bits first."""
    return int(tensor.values * max(tensor.type.workspace, 2 + itemsize))


def form(header: GgufHeader) -> str:
    """The form of the weights in one word: the type that most values have, such as "Q4_K"."""
    values = Counter[str]()
    for tensor in header.tensors.values():
        values[tensor.type.name] += tensor.values
    return values.most_common(1)[0][0]


def is_plain(header: GgufHeader) -> bool:
    """Whether no value was rounded to fewer than 16 bits."""
    return all(tensor.type.is_plain for tensor in header.tensors.values())


def _quantised(header: GgufHeader) -> Iterable[GgufTensor]:
    return (tensor for tensor in header.tensors.values() if stays_quantised(tensor))
