"""A fake model that returns one-colour images at once, and can be made to fail, wait or die."""

from __future__ import annotations

import asyncio
import io
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from PIL import Image
from redis.asyncio import Redis

from deployments.protocol import events
from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import Guidance, Licence, ModelCard, Sizes, Steps, Weights
from deployments.protocol.request import ResolvedEdit, ResolvedRequest
from tests.patience import patience

OWNER = "ada"
MODEL = "fake"

CARD = ModelCard(
    id=MODEL,
    name="Fake",
    family="flux",
    aliases=["someone/fake-model"],
    weights=Weights(path="models/fake"),
    tasks=["t2i", "i2i", "inpaint"],
    steps=Steps(min=4, default=4, max=4),
    guidance=Guidance(min=0.0, default=0.0, max=0.0),
    sizes=Sizes(width=64, height=64, min=64, max=256),
    corrects=True,
    licence=Licence(name="MIT", url=""),
)


def picture(colour: str = "red", side: int = 64) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def resolved(
    prompt: str = "a cat", *, model: str = MODEL, edit: ResolvedEdit | None = None
) -> ResolvedRequest:
    """A small request that is ready to run."""
    return ResolvedRequest(
        model=model,
        prompt=prompt,
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        seed=7,
        max_sequence_length=None,
        edit=edit,
    )


class FakeModels:
    """Models with `slots` each. While `gate` is closed, requests stop before their last step.

    troubles: what the next calls come to instead, one each: an exception, a Failed event, or a Handover
    after its step. What is handed over is the step as digits.
    """

    def __init__(self, slots: Mapping[str, int] | None = None, steps: int = 4) -> None:
        self.slots = dict(slots or {MODEL: 4})
        self.steps = steps
        self.gate = asyncio.Event()
        self.gate.set()
        self.troubles: list[Exception | events.Failed | events.Handover] = []
        self.requests: list[ResolvedRequest] = []  # as they arrived
        self.users: list[str] = []
        self.resumed: list[bytes | None] = []
        self.running_of = Counter[str]()
        self.most_running = 0
        self.closed_early = 0  # calls that were cancelled
        self.merged_unproven: tuple[str, ...] = ()  # what the next calls report
        self.warnings: tuple[Adjustment, ...] = ()
        self.file_kinds = ["image"]

    def free_slots(self) -> Mapping[str, int]:
        return {model: slots - self.running_of[model] for model, slots in self.slots.items()}

    @property
    def running(self) -> int:
        return self.running_of.total()

    async def generate(
        self, model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[events.Event]:
        self.requests.append(request)
        self.users.append(user)
        self.resumed.append(resume)
        done = 0 if resume is None else int(resume)
        self.running_of[model_id] += 1
        self.most_running = max(self.running, self.most_running)
        try:
            yield events.Queued(0)
            yield events.Started(self.steps)
            if self.troubles:
                trouble = self.troubles.pop(0)
                if isinstance(trouble, Exception):
                    raise trouble
                if isinstance(trouble, events.Handover):
                    for step in range(done + 1, trouble.step + 1):
                        yield events.Step(step, self.steps)
                    yield trouble
                    trouble = events.Failed("model_unavailable", "the replica is stopped", retryable=True)
                yield trouble
                return
            for step in range(done + 1, self.steps + 1):
                if step == self.steps:
                    await self.gate.wait()
                yield events.Step(step, self.steps)
            for kind in self.file_kinds:
                yield events.Artifact(0, kind, "image/png", picture(), 64, 64, request.seed)
            yield events.Done(0.0, 0.5, self.merged_unproven, self.warnings)
        except (asyncio.CancelledError, GeneratorExit):
            self.closed_early += 1
            raise
        finally:
            self.running_of[model_id] -= 1


async def eventually(true: Callable[[], bool | Awaitable[bool]], quiet_s: float = 1.0) -> None:
    """Return as soon as the condition holds, which takes at most quiet_s on a quiet machine."""
    deadline = time.monotonic() + patience(quiet_s)
    while True:
        held = true()
        if held is True or (not isinstance(held, bool) and await held):
            return
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


async def keys_without_ttl(redis: Redis, prefix: str) -> list[str]:
    """Keys that would stay for ever."""
    return [key async for key in redis.scan_iter(f"{prefix}*", count=1000) if await redis.ttl(key) < 0]
