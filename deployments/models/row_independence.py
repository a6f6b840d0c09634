"""Whether a row's result in a quantised layer depends on the other rows of its batch.

Scales of activations may be chosen for a whole tensor as it is computed: then a row is rounded by what its
neighbours are, and a picture depends on the requests that share its forwards.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator

import torch
from torch import Tensor, nn

from deployments.engine.batch_buckets import MIN_LINEAR_ROWS
from deployments.engine.plain_tensors import plain_tensors
from deployments.protocol.errors import ModelFailed
from deployments.protocol.request import Exactness

logger = logging.getLogger(__name__)

LARGE = 1000.0  # of a neighbour's values, over those of the row
MAX_CHANGE = 0.05  # of a row's result; rounding changes less, in any dtype


def check_rows(modules: Iterable[nn.Module], exact: Exactness) -> None:
    """Have every kind of quantised layer compute a row beside small and beside large values.

    Where they change the row, raises ModelFailed if `exact` is strict, and logs a warning otherwise.
    """
    for name, layer in _one_of_each_kind(modules):
        if is_row_independent(layer):
            continue
        if exact == "strict":
            raise ModelFailed(
                f"{name} scales its inputs by the largest value of a whole batch, so that results depend on "
                "the requests that share a forward, which exact: strict rules out; use weights with scales "
                "per row (fp8_dynamic) or none for inputs (int8, fp8), or write exact: prefer"
            )
        logger.warning(
            "results depend on the requests that share a forward: inputs are scaled by the whole batch",
            extra={"layer": name},
        )
        return


def is_row_independent(layer: nn.Linear) -> bool:
    """Whether a row's result stays the same but for rounding, whatever the other rows are."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(MIN_LINEAR_ROWS, layer.in_features, generator=generator)
    beside_large = noise.clone()
    beside_large[1:] *= LARGE
    with torch.no_grad():
        one, other = (_first_row(layer, x) for x in (noise, beside_large))
    return bool((one - other).norm() <= MAX_CHANGE * one.norm())


def _first_row(layer: nn.Linear, x: Tensor) -> Tensor:
    """Without the bias, which could hide a difference."""
    dtype = vars(layer).get("compute_dtype") or layer.weight.dtype
    output: Tensor = layer(x.to(next(plain_tensors(layer.weight)).device, dtype))[0].float()
    return output if layer.bias is None else output - layer.bias.float()


def _one_of_each_kind(modules: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Linear]]:
    """Quantised Linear layers of any library, one for each way of computing, and their names."""
    seen: set[Hashable] = set()
    for module in modules:
        for path, layer in module.named_modules():
            if not isinstance(layer, nn.Linear) or _is_plain(layer):
                continue
            kind = type(layer), type(layer.weight), repr(vars(layer.weight).get("act_quant_kwargs"))
            if kind not in seen:
                seen.add(kind)
                yield f"{type(module).__name__}.{path}", layer


def _is_plain(layer: nn.Linear) -> bool:
    return type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()
