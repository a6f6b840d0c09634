"""A model whose file was cut or changed on disk reports it, and the others continue."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelFailed
from deployments.protocol.events import Done, Failed
from deployments.replica import ModelReplica
from tests.inference.test_replica import CARD, events_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def broken(tmp_path: Path) -> ModelCard:
    """The shipped model, with a transformer that lacks its last bytes."""
    folder = tmp_path / "broken"
    shutil.copytree(ROOT / str(CARD.weights.path), folder)
    file = max((folder / "transformer").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1000])
    serving = CARD.serving.model_copy(update={"models_loaded": 1, "warm_up": False})
    weights = CARD.weights.model_copy(update={"path": str(folder)})
    return CARD.model_copy(update={"id": "broken", "weights": weights, "serving": serving})


def test_a_replica_does_not_start_beside_others_on_a_model_whose_file_was_cut(broken: ModelCard) -> None:
    with pytest.raises(ModelFailed, match="broken"):
        ModelReplica([broken], others_serve=lambda: True)


async def test_a_model_that_cannot_be_read_fails_alone(broken: ModelCard) -> None:
    whole = CARD.model_copy(update={"id": "whole", "serving": broken.serving})
    replica = ModelReplica([whole, broken])
    try:
        *_, refused = await events_of(replica, model="broken")
        *_, served = await events_of(replica, model="whole")
    finally:
        replica.__del__()

    assert isinstance(refused, Failed)
    assert "broken" in refused.message
    assert isinstance(served, Done)
