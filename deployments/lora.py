"""LoraReplica: a ModelReplica whose requests are routed to replicas that hold their adapters already."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ray import serve

from deployments.protocol.events import Event
from deployments.protocol.log_context import LogContext
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica

IDS_PER_REPLICA = 64  # in Serve's routing table; about what a bank holds in memory


def routing_id(request: GenerationRequest) -> str:
    """What `handle.options(multiplexed_model_id=...)` should be: the first adapter, "" without any.

    Serve knows one id per request; the others of a request come along, as do their files.
    """
    return request.loras[0].id if request.loras else ""


class LoraReplica(ModelReplica):
    """Serve's multiplexing is used as routing affinity, no more: an id in its table means that this replica
    has fetched the adapter or is about to.

    Its own LRU evicts adapters in use, loads one after another under a lock and knows no two of them in one
    request. What is on the device, in memory and on disk is the bank's, with pins; losing an id frees
    nothing.
    """

    async def generate(
        self,
        request: GenerationRequest,
        user: str = "",
        resume: bytes | None = None,
        *,
        unlimited_wait: bool = False,
        log_context: LogContext | None = None,
    ) -> AsyncGenerator[Event]:
        """As ModelReplica.generate; tells Serve first which adapter this replica gets."""
        wanted = serve.get_multiplexed_model_id()
        if any(lora.id == wanted for lora in request.loras):
            await self._known_for(wanted)
        events = super().generate(
            request, user, resume, unlimited_wait=unlimited_wait, log_context=log_context
        )
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    @serve.multiplexed(max_num_models_per_replica=IDS_PER_REPLICA)  # type: ignore[untyped-decorator]
    async def _known_for(self, digest: str) -> str:
        """Tells Serve's routers that this replica holds the adapter, or is about to.

        Loads nothing itself: Serve lets one id at a time in here, and a slow download would hold up all.
        """
        return digest
