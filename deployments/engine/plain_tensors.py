"""The plain tensors of which a weight consists: quantised ones hold several behind one outer shape."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain_tensors(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the weight's values: itself, or those that torchao and bitsandbytes made of it,
    with their scales."""
    if is_traceable_wrapper_subclass(weight):  # of torchao; its own dtype and size are those before
        for name in weight.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(weight, name))
        return
    yield weight
    state = vars(weight).get("quant_state")  # of bitsandbytes
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, Tensor))
        state = vars(state).get("state2")


def stored_bytes(weight: Tensor) -> int:
    """Memory that the weight takes."""
    return sum(tensor.nbytes for tensor in plain_tensors(weight))


def have_same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two weights have the same form and values."""
    if type(one) is not type(other) or one.dtype != other.dtype:
        return False
    own, others = list(plain_tensors(one)), list(plain_tensors(other))
    return len(own) == len(others) and all(
        a.dtype == b.dtype and torch.equal(a.to(b.device), b) for a, b in zip(own, others, strict=True)
    )
