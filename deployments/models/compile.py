"""torch.compile for the repeated blocks of a denoiser; see weight_cache for where its code is kept."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from deployments.protocol.errors import ModelUnavailable

logger = logging.getLogger(__name__)

DENOISERS = ("transformer", "transformer_2", "unet")


def compile_blocks(pipeline: Any) -> None:
    """Have the repeated blocks of the denoisers compiled at their first run, for any size and prompt.

    torch makes one graph for a batch of one and one for larger batches; run both before requests arrive.
    Raises ModelUnavailable where diffusers does not say which blocks a denoiser repeats.
    """
    components = {name: getattr(pipeline, name, None) for name in DENOISERS}
    denoisers: dict[str, Any] = {name: c for name, c in components.items() if isinstance(c, nn.Module)}
    for name, denoiser in denoisers.items():
        if not getattr(denoiser, "_repeated_blocks", None):
            raise ModelUnavailable(
                f"{type(denoiser).__name__} cannot be compiled: diffusers does not name its repeated blocks; "
                "take compile out of the card"
            )
        denoiser.compile_repeated_blocks(dynamic=True)
        logger.info("blocks are compiled at their first run", extra={"component": name})
