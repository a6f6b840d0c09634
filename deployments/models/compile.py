"""torch.compile for the repeated blocks of a denoiser; see weight_cache for where its code is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from deployments.planning.plan import DENOISERS, Plan
from deployments.protocol.errors import ModelFailed

logger = logging.getLogger(__name__)


def check_stays_on_device(plan: Plan) -> None:
    """Raises ModelFailed for a plan that moves a denoiser's weights, for which its code would be compiled
    again at each forward."""
    for part in plan.parts:
        if part.name in DENOISERS and part.placement != "device":
            raise ModelFailed(
                f"the {part.name} cannot be compiled while its weights are {part.placement}; take compile "
                "out of the card, or write offload: none"
            )


def repeated_blocks(pipeline: Any) -> list[nn.Module]:
    """The blocks that the denoisers repeat.

    Raises ModelFailed where diffusers does not say which.
    """
    components = {name: getattr(pipeline, name, None) for name in DENOISERS}
    denoisers: dict[str, Any] = {name: c for name, c in components.items() if isinstance(c, nn.Module)}
    blocks: list[nn.Module] = []
    for name, denoiser in denoisers.items():
        kinds = getattr(denoiser, "_repeated_blocks", None)
        if not kinds:
            raise ModelFailed(
                f"{type(denoiser).__name__} cannot be compiled: diffusers does not name its repeated blocks; "
                "take compile out of the card"
            )
        own = [module for module in denoiser.modules() if type(module).__name__ in kinds]
        if any(_is_quantised(layer) for block in own for layer in block.modules()):
            raise ModelFailed(
                f"{name} has quantised weights and cannot be compiled; "
                "take compile out of the card, or write quantisation: none"
            )
        blocks += own
        logger.info("blocks are compiled at their first run", extra={"component": name})
    return blocks


def _is_quantised(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")  # noqa: SLF001  modules without one raise for the attribute
    return weight is not None and (type(weight) is not nn.Parameter or weight.itemsize == 1)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have the blocks compiled at their first run, for any size and prompt.

    torch makes one graph for a batch of one and one for larger batches; run both before requests arrive.
    """
    for block in blocks:
        block.compile(dynamic=True)
