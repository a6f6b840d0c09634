"""Linear layers that read the same tensor, computed one after the other into one buffer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from cachetools import FIFOCache
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deployments.engine.batch_buckets import MIN_LINEAR_ROWS
from deployments.lora_format.layer_names import LayerKey
from deployments.loras.low_rank_products import MAX_TRIAL_RESULTS
from deployments.loras.product_trials import Pairs, have_same_bits


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """A layer that LoRAs may change, and its forward without them."""

    key: LayerKey
    module: nn.Module
    plain: Callable[[Tensor], Tensor]
    padded: bool  # plain computes at least MIN_LINEAR_ROWS rows

    @property
    def outputs(self) -> int:
        """Width of the output of a Linear."""
        assert isinstance(self.module, nn.Linear), "only they are noted by what they read"
        return self.module.out_features


def can_be_joined(layers: Sequence[LoraLayer], x: Tensor) -> bool:
    """Whether joint_outputs computes these layers as they would be computed one by one."""
    if not x.is_contiguous() or torch.is_grad_enabled():
        return False
    return all(type(one.module) is nn.Linear and _is_plain(one.module.weight, x) for one in layers)


def _is_plain(weight: Tensor, x: Tensor) -> bool:
    """Whether it is none of torchao's, which have products of their own, and where x is: some weights are on
    the device only while their own layer or block computes."""
    plain = not is_traceable_wrapper_subclass(weight)
    return plain and weight.dtype is x.dtype and weight.device == x.device


def joint_outputs(layers: Sequence[LoraLayer], x: Tensor) -> list[Tensor]:
    """For each class of layers with outputs of one width, in order, their outputs (C, *, out).

    x: (*, in), contiguous. The products are those of torch's linear, and so are the bits; the buffer lets one
    product add the LoRAs of a whole class.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count < MIN_LINEAR_ROWS and layers[0].padded:
        padded = rows.new_zeros((MIN_LINEAR_ROWS, rows.shape[1]))
        padded[:count] = rows
        rows = padded
    outputs = []
    for members in classes(layers):
        size = len(members), len(rows), members[0].out_features
        joint = torch.empty(size, dtype=x.dtype, device=x.device)
        for out, linear in zip(joint, members, strict=True):
            if linear.bias is None:
                torch.mm(rows, linear.weight.t(), out=out)
            else:
                torch.addmm(linear.bias, rows, linear.weight.t(), out=out)
        outputs.append(joint[:, :count].contiguous().view(len(members), *x.shape[:-1], -1))
    return outputs


def classes(layers: Sequence[LoraLayer]) -> list[list[nn.Linear]]:
    """The layers by width of their outputs; those of one width are adjacent."""
    found: dict[int, list[nn.Linear]] = {}
    for one in layers:
        assert isinstance(one.module, nn.Linear), "see can_be_joined"
        found.setdefault(one.module.out_features, []).append(one.module)
    return list(found.values())


class JointProofs:
    """Which layers give the bits of their own forwards in joint_outputs: tried with noise, once per size."""

    def __init__(self) -> None:
        self._results: FIFOCache[Hashable, bool] = FIFOCache(MAX_TRIAL_RESULTS)

    def holds(self, layers: Sequence[LoraLayer], x: Tensor) -> bool:
        """Whether these layers may be computed together for inputs like x."""
        size = tuple(one.key for one in layers), x.shape, x.dtype, x.device
        result = self._results.get(size)
        if result is None:
            result = self._results[size] = is_joint_exact(layers, x)
        return result


def is_joint_exact(layers: Sequence[LoraLayer], x: Tensor) -> bool:
    """Whether each layer's output in joint_outputs has the bits of its own forward, on noise like x."""
    generator = torch.Generator(x.device).manual_seed(0)

    def trial() -> Pairs:
        noise = torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
        outputs = [out for joint in joint_outputs(layers, noise) for out in joint]
        return ((out, one.plain(noise)) for out, one in zip(outputs, layers, strict=True))

    return have_same_bits("joint layers", trial)
