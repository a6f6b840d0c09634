"""Previews of unfinished pictures: of chosen steps, computed and encoded off the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from deployments.media import still
from deployments.media.inpainting import PasteBack
from deployments.pipelines.previews import Previewer, watch
from deployments.pipelines.resume import Progress
from deployments.pipelines.step_callback import steps_of
from deployments.pipelines.transfers import HostCopy
from deployments.protocol.events import Preview
from deployments.protocol.request import ResolvedRequest
from deployments.validation.preview_steps import preview_steps


@dataclass(frozen=True, slots=True)
class PreviewReady:
    """A preview that is not computed yet."""

    step: int
    previewer: Previewer
    latents: HostCopy


def attach_previews(
    pipeline: Any,
    previewer: Previewer | None,
    request: ResolvedRequest,
    progress: Progress,
    emit: Callable[[PreviewReady], None],
) -> None:
    """Have `emit` called with the previews that the request asks for, spread evenly over its steps.

    pipeline: the request's own object.
    """
    wanted_previews = request.output.previews
    if not wanted_previews or previewer is None:
        return

    def is_wanted() -> bool:
        # known only now: noise schedulers of second order call the model more often than once per step
        all_steps = progress.before + steps_of(pipeline) + progress.after
        return progress.step + 1 in preview_steps(all_steps, wanted_previews)

    def emit_preview(latents: Tensor) -> None:
        emit(PreviewReady(progress.step + 1, previewer, HostCopy(latents)))

    watch(pipeline, request.width, request.height, is_wanted, emit_preview)


def encode_preview(
    ready: PreviewReady, request: ResolvedRequest, paste_back: PasteBack | None = None
) -> Preview:
    """The event with the preview as a small WebP file. Blocks; call it in a thread.

    paste_back: shows the preview in the given picture, as the finished picture will be.
    """
    rough = Image.fromarray(ready.previewer.preview(ready.latents.wait()))
    if paste_back is None:
        small = still.preview(rough, request.width, request.height)
    else:
        shown = paste_back.preview(rough)
        small = still.preview(shown, shown.width, shown.height)
    return Preview(ready.step, "image/webp", small)
