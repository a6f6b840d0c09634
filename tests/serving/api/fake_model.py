"""A model that generates plain colours: all that a dispatcher needs, without weights."""

import asyncio
import io
from collections.abc import AsyncGenerator, Mapping

from PIL import Image

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.events import Artifact, Done, Event, Failed, Preview, Started, Step
from deployments.protocol.request import ResolvedRequest


class FakeModel:
    """Works at once unless `gate` is closed; then every request waits after its first step."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.began = asyncio.Event()
        self.failure: Failed | None = None
        self.merged_unproven: tuple[str, ...] = ()
        self.warnings: tuple[Adjustment, ...] = ()
        self.requests: list[ResolvedRequest] = []
        self.lost_after: int | None = None  # step after which the next request's replica is lost

    def free_slots(self) -> Mapping[str, int]:
        return {"sketch": 8, "tiny-flux-schnell": 8}

    async def generate(
        self, model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[Event]:
        self.requests.append(request)
        steps = request.num_inference_steps
        yield Started(steps)
        self.began.set()
        for step in range(1, steps + 1):
            yield Step(step, steps)
            if step <= request.output.previews:
                yield Preview(step, "image/webp", preview_file(step))
            if step == 1:
                await self.gate.wait()
            if step == self.lost_after:
                self.lost_after = None
                yield Failed("model_unavailable", "the replica is lost", retryable=True)
                return
        if self.failure is not None:
            yield self.failure
            return
        for index in range(request.num_images):
            yield _picture(request, index, "image", (request.width, request.height))
            yield _picture(request, index, "thumbnail", (32, 32))
        yield Done(0.0, 0.25, self.merged_unproven, self.warnings)


def preview_file(step: int) -> bytes:
    """A small WebP file, another one for each step."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (step, 80, 120)).save(file, "webp", lossless=True)
    return file.getvalue()


def _picture(request: ResolvedRequest, index: int, kind: str, size: tuple[int, int]) -> Artifact:
    file_format = request.output.format if kind == "image" else "webp"
    file = io.BytesIO()
    seed = request.seed + index
    Image.new("RGB", size, (seed % 256, 80, 120)).save(file, file_format)
    return Artifact(index, kind, f"image/{file_format}", file.getvalue(), *size, seed)
