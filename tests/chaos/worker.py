"""A dispatcher in a process of its own, with a model that takes a moment; tests kill it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator

from deployments.protocol import events
from deployments.protocol.request import ResolvedRequest
from serve_app.jobs.store.store import JobStore
from serve_app.jobs.worker.dispatch import Dispatcher
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.serving.fakes import FakeModels

STEP_S = 0.02
POISON = "poison"  # a prompt that kills its worker


class SlowModels(FakeModels):
    async def generate(
        self, model_id: str, request: ResolvedRequest, /, *, user: str = "", resume: bytes | None = None
    ) -> AsyncGenerator[events.Event]:
        async for event in super().generate(model_id, request, user=user, resume=resume):
            if isinstance(event, events.Step):
                await asyncio.sleep(STEP_S)
                if request.prompt == POISON:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield event


async def main(url: str, settings_json: str) -> None:
    settings = Settings.model_validate_json(settings_json)
    store = JobStore(connect(url), settings)
    await Dispatcher(store, ResultStore(settings.results_root), SlowModels(), settings).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
