"""torch.compile for the repeated blocks of a denoiser; see weight_cache for where its code is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from deployments.models.parts import PartFiles
from deployments.planning.plan import DENOISERS
from deployments.protocol.errors import ModelFailed

logger = logging.getLogger(__name__)


def check_compiles(parts: Mapping[str, PartFiles]) -> None:
    """Raises ModelFailed, before any weight is read, for a pipeline whose denoiser cannot be compiled.

    parts: its modules by name.
    """
    for name in DENOISERS:
        if (part := parts.get(name)) is None:
            continue
        _check_names_blocks(part.kind, part.kind)
        if part.stored_form is not None:
            raise ModelFailed(_quantised(name))


def repeated_blocks(pipeline: Any) -> list[nn.Module]:
    """The blocks that the denoisers repeat.

    Raises ModelFailed where diffusers does not say which.
    """
    components = {name: getattr(pipeline, name, None) for name in DENOISERS}
    denoisers: dict[str, Any] = {name: c for name, c in components.items() if isinstance(c, nn.Module)}
    blocks: list[nn.Module] = []
    for name, denoiser in denoisers.items():
        kinds = _check_names_blocks(denoiser, type(denoiser))
        own = [module for module in denoiser.modules() if type(module).__name__ in kinds]
        if any(_is_quantised(layer) for block in own for layer in block.modules()):
            raise ModelFailed(_quantised(name))
        blocks += own
        logger.info("blocks are compiled at their first run", extra={"component": name})
    return blocks


def _check_names_blocks(denoiser: Any, kind: type) -> list[str]:
    """The classes of the blocks that a denoiser, or its class, repeats."""
    names: list[str] | None = getattr(denoiser, "_repeated_blocks", None)
    if not names:
        raise ModelFailed(
            f"{kind.__name__} cannot be compiled: diffusers does not name its repeated blocks; "
            "take compile out of the card"
        )
    return names


def _quantised(name: str) -> str:
    return (
        f"{name} has quantised weights and cannot be compiled; "
        "take compile out of the card, or write quantisation: none"
    )


def _is_quantised(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")  # noqa: SLF001  modules without one raise for the attribute
    return weight is not None and (type(weight) is not nn.Parameter or weight.itemsize == 1)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have the blocks compiled at their first run, for any size and prompt.

    torch makes one graph for a batch of one and one for larger batches; run both before requests arrive.
    """
    for block in blocks:
        block.compile(dynamic=True)
