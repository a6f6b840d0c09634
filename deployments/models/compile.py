"""torch.compile for the blocks that a denoiser repeats; the node keeps what the compiler makes."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from deployments.protocol.errors import ModelUnavailable

logger = logging.getLogger(__name__)

DENOISERS = ("transformer", "transformer_2", "unet")


def compile_blocks(pipeline: Any) -> None:
    """Have the repeated blocks of its denoisers compiled when they first run, for any size and prompt.

    Torch makes one graph for a single row and one for several, so both must run before anybody waits.

    Raises ModelUnavailable where diffusers does not say what a denoiser repeats.
    """
    parts = {name: getattr(pipeline, name, None) for name in DENOISERS}
    found: dict[str, Any] = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    for name, part in found.items():
        if not getattr(part, "_repeated_blocks", None):
            raise ModelUnavailable(
                f"{type(part).__name__} cannot be compiled: diffusers does not say which blocks it repeats; "
                "take compile out of the card"
            )
        part.compile_repeated_blocks(dynamic=True)
        logger.info("blocks will be compiled", extra={"part": name})
