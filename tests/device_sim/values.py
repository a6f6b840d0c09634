"""Values of small tensors on the simulated device, kept on the host beside them.

Timesteps, ids, masks and indices decide what a pipeline does next; everything larger has no values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_map

MAX_FLOATS = 2**14 - 1  # below the latents of a picture of 512x512
MAX_OTHERS = 2**18  # integers and booleans
RANDOM = ("rand", "normal", "bernoulli", "uniform", "exponential", "empty")


def flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments of an operator, those in lists one by one. By hand: pytree takes five times as long."""
    leaves: list[Any] = []
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, list | tuple):
            leaves.extend(argument)
        else:
            leaves.append(argument)
    return leaves


def value_of(tensor: Any) -> Tensor | None:
    """The values of a tensor on the device; a tensor on the host is its own."""
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "_sim_value", None)
    return tensor if isinstance(tensor, Tensor) else None


def set_value(tensor: Tensor, value: Tensor | None) -> None:
    tensor._sim_value = value  # type: ignore[attr-defined]


def keeps(tensor: Tensor) -> bool:
    """Whether a tensor of this size and dtype keeps its values."""
    return tensor.numel() <= (MAX_FLOATS if tensor.is_floating_point() else MAX_OTHERS)


def on_host(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The arguments with values in place of tensors on the device; None if one has no values."""
    if any(value_of(leaf) is None for leaf in flat(args, kwargs) if isinstance(leaf, FakeTensor)):
        return None
    return tree_map(lambda leaf: value_of(leaf) if isinstance(leaf, FakeTensor) else leaf, (args, kwargs))


def real(function: Any, args: Any, kwargs: Any) -> Any:
    """What the operator gives on the host."""
    with unset_fake_temporarily():
        return function(*args, **kwargs)


def follow(function: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Compute the values of the operator's result, where all its arguments have some."""
    outs = [leaf for leaf in flat((out,), {}) if isinstance(leaf, FakeTensor)]
    name = str(function)
    given = None
    if all(keeps(tensor) for tensor in outs) and not any(word in name for word in RANDOM):
        given = on_host(args, kwargs)
    if given is None:
        if function._schema.is_mutable and args and isinstance(args[0], FakeTensor):
            set_value(args[0], None)
        return
    host_args, host_kwargs = given
    if host_kwargs.get("device") is not None:
        host_kwargs = {**host_kwargs, "device": torch.device("cpu")}
    try:
        made = real(function, host_args, host_kwargs)
    except (RuntimeError, NotImplementedError):  # the host has no such kernel
        return
    values = [leaf for leaf in flat((made,), {}) if isinstance(leaf, Tensor)]
    for tensor, value in zip(outs, values, strict=False):
        set_value(tensor, value)
