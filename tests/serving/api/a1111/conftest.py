"""The models that A1111's clients meet here: one that corrects, one with samplers, one that inpaints."""

from collections.abc import AsyncIterator

import pytest

from deployments.protocol.card import ModelCard
from serve_app.api.state import ApiState
from serve_app.jobs.service import JobService
from serve_app.jobs.store.store import JobStore
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.serving.api.cards import CARDS, SKETCH
from tests.serving.api.editing import INPAINTER
from tests.serving.api.fake_model import FakeModel

SAMPLED = ModelCard.model_validate(
    SKETCH.model_dump(exclude={"aliases"})
    | {"id": "sampled", "schedulers": ["auto", "euler_a", "dpmpp_2m", "dpmpp_2m_karras"], "max_images": 2}
)
MODELS = CARDS | {card.id: card for card in (INPAINTER, SAMPLED)}


@pytest.fixture
async def state(store: JobStore, results: ResultStore, settings: Settings) -> AsyncIterator[ApiState]:
    async def model_states() -> dict[str, str]:
        return {"sketch": "ready"}

    job_service = JobService(store, results, MODELS, settings)
    yield ApiState(
        job_service=job_service,
        cards=MODELS,
        settings=settings,
        model_states=model_states,
        accounts=store.redis,
    )
    await job_service.aclose()


@pytest.fixture(autouse=True)
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake model serves every model of this folder."""
    monkeypatch.setattr(FakeModel, "free_slots", lambda _model: dict.fromkeys(MODELS, 8))
