"""Position ids that depend only on sizes: requests of one model get one tensor per size.

The engine merges calls whose ids are equal. It compares values once per tensor, for which it waits for the
device; of the same tensor it knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

SIZES_KEPT = 64

# By pipeline class, which of encode_prompt's results are zeros of (tokens, 3). Listed are classes that never
# write to ids in place (FLUX Kontext's does); their ids of pictures come from _prepare_latent_image_ids, a
# static function of sizes, device and dtype.
TEXT_IDS: dict[str, tuple[int, ...]] = {
    "FluxPipeline": (2,),
    "FluxImg2ImgPipeline": (2,),
    "FluxInpaintPipeline": (2,),
    "FluxControlNetPipeline": (2,),
    "FluxControlNetImg2ImgPipeline": (2,),
    "FluxControlNetInpaintPipeline": (2,),
    "ChromaPipeline": (1, 4),
    "ChromaImg2ImgPipeline": (1, 4),
    "ChromaInpaintPipeline": (1, 4),
}


class PositionIds:
    """The ids of one model. Used by one thread."""

    def __init__(self) -> None:
        self._ids: LRUCache[Hashable, Tensor] = LRUCache(SIZES_KEPT)

    def attach(self, pipeline: Any) -> None:
        """Let this pipeline object (not its class) take the ids that earlier requests have made. No effect on
        a class that is not in TEXT_IDS."""
        positions = TEXT_IDS.get(type(pipeline).__name__)
        if positions is None:
            return
        picture_ids, encode = pipeline._prepare_latent_image_ids, pipeline.encode_prompt  # noqa: SLF001

        def known_picture_ids(*sizes: Any) -> Tensor:
            return self._known((picture_ids, *sizes), lambda: picture_ids(*sizes))

        def encode_with_known_ids(*args: Any, **kwargs: Any) -> Any:
            encoded = list(encode(*args, **kwargs))
            for position in positions:
                if isinstance(ids := encoded[position], Tensor):
                    encoded[position] = self._zeros(ids)
            return tuple(encoded)

        vars(pipeline)["_prepare_latent_image_ids"] = known_picture_ids
        vars(pipeline)["encode_prompt"] = encode_with_known_ids

    def _zeros(self, like: Tensor) -> Tensor:
        key = ("zeros", like.shape, like.dtype, like.device)
        return self._known(key, lambda: torch.zeros_like(like))

    def _known(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        ids = self._ids.get(key)
        if ids is None:
            ids = self._ids[key] = make()
        return ids
