"""tools/cloud_check.py against the API with a fake model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from deployments.protocol.events import Failed
from tests.patience import patience
from tests.serving.api.fake_model import FakeModel
from tools.cloud_check import Cluster, Unfinished, check

SEED = 1000


class Away(httpx.HTTPTransport):
    """A head that answers nothing while `calls` are left."""

    calls = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.calls:
            self.calls -= 1
            raise httpx.ConnectError("the head is away", request=request)
        return super().handle_request(request)


@pytest.fixture
def transport() -> Away:
    return Away()


@pytest.fixture
def cluster(address: str, transport: Away) -> Iterator[Cluster]:
    with httpx.Client(base_url=f"http://{address}", transport=transport, timeout=patience()) as client:
        yield Cluster(client, limit_s=patience(), every_s=0.01)


async def test_every_picture_is_asked_for_once_though_the_head_is_away(
    cluster: Cluster, fake_model: FakeModel, transport: Away
) -> None:
    def disturb() -> None:
        transport.calls = 3

    done = await asyncio.to_thread(check, cluster, ["sketch"], 4, disturb, SEED)

    assert [name for name, _ in done] == ["first picture of sketch", "4 pictures at once"]
    assert [request.seed for request in fake_model.requests] == [SEED, *range(SEED + 1, SEED + 5)]


async def test_a_job_that_fails_is_reported(cluster: Cluster, fake_model: FakeModel) -> None:
    fake_model.failure = Failed("internal", "the GPU is on fire", retryable=False)

    with pytest.raises(Unfinished, match=r"failed: .*on fire"):
        await asyncio.to_thread(check, cluster, ["sketch"], 1, lambda: None, SEED)


@pytest.mark.usefixtures("fake_model")
async def test_a_model_that_is_not_there_is_reported_at_once(cluster: Cluster) -> None:
    with pytest.raises(Unfinished, match=r"404: .*sketchy"):
        await asyncio.to_thread(check, cluster, ["sketchy"], 1, lambda: None, SEED)
