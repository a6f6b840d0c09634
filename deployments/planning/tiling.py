"""From which size on pictures and videos are decoded in tiles, where those of the default size are not."""

from __future__ import annotations

from deployments.planning.fitting import Fitted
from deployments.protocol.card import ModelCard
from deployments.protocol.memory_needs import MemoryNeeds


def whole_pixels(card: ModelCard, needs: MemoryNeeds, fitted: Fitted, limit_bytes: int | None) -> int | None:
    """The largest picture (of a video: times frames) that is decoded in one piece; None: any that the card
    allows, or all as the default size.

    What a forward takes, and what decoding takes, are in proportion to the pixels.
    """
    by_plan = limit_bytes is not None and card.serving.vae_tiling == "auto" and not fitted.rung.tiled
    if not by_plan or not _saves(card, needs):
        return None
    default, largest = _pixels(card)
    least = fitted.least
    assert limit_bytes is not None
    free = limit_bytes - (least.peak - least.working)
    whole = int(default * free / least.working)
    return None if whole >= largest else whole


def _makes_videos(card: ModelCard) -> bool:
    """Whether its VAE decodes all frames of a video at once."""
    return card.videos is not None and not card.videos.framewise


def _saves(card: ModelCard, needs: MemoryNeeds) -> bool:
    """Whether tiles take less memory. Those of pictures have one size, whatever the picture's; a card that
    states nothing of a video's means that they do not."""
    if needs.tiled_decode_gib is None:
        return not _makes_videos(card)
    return needs.tiled_decode_gib < needs.decode_gib


def _pixels(card: ModelCard) -> tuple[int, int]:
    """Of the default size, and the most that the card allows."""
    one = card.sizes.width * card.sizes.height
    if not _makes_videos(card):
        return one, card.sizes.max_pixels
    assert card.videos is not None
    return one * card.videos.num_frames, card.videos.max_frame_pixels
