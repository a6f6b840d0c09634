"""A model that paints plain colours: all a dispatcher needs, no weights."""

import asyncio
import io
from collections.abc import AsyncGenerator, Mapping

from PIL import Image

from deployments.protocol.events import Artifact, Done, Event, Failed, Preview, Started, Step
from deployments.protocol.request import FittedRequest


class Painter:
    """Works at once unless `gate` is closed; then every request waits after its first step."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.began = asyncio.Event()
        self.failure: Failed | None = None
        self.requests: list[FittedRequest] = []

    def free_slots(self) -> Mapping[str, int]:
        return {"sketch": 8, "tiny-flux-schnell": 8}

    async def generate(self, model_id: str, request: FittedRequest, /) -> AsyncGenerator[Event]:
        self.requests.append(request)
        steps = request.num_inference_steps
        yield Started(steps)
        self.began.set()
        for step in range(1, steps + 1):
            yield Step(step, steps)
            if step == 1:
                yield Preview(step, "image/jpeg", b"\xff\xd8 a rough look")
                await self.gate.wait()
        if self.failure is not None:
            yield self.failure
            return
        for index in range(request.num_images):
            yield _picture(request, index, "image", (request.width, request.height))
            yield _picture(request, index, "thumbnail", (32, 32))
        yield Done(queued_s=0.0, generation_s=0.25)


def _picture(request: FittedRequest, index: int, kind: str, size: tuple[int, int]) -> Artifact:
    file_format = request.output.format if kind == "image" else "webp"
    file = io.BytesIO()
    seed = request.seed + index
    Image.new("RGB", size, (seed % 256, 80, 120)).save(file, file_format)
    return Artifact(index, kind, f"image/{file_format}", file.getvalue(), *size, seed)
