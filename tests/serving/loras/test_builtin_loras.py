"""LoRAs of models' cards: one that cannot be used is named, and the others stay."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from deployments.protocol.card import CardLora, ModelCard
from deployments.protocol.errors import Internal
from serve_app.loras import builtin
from serve_app.loras.builtin import BuiltInLoras
from tests.serving.api.cards import SCHNELL
from tests.serving.api.lora_files import NIGHT, digest, lora_file


def card_with(*paths: Path) -> ModelCard:
    loras = [CardLora(id=path.stem, path=str(path)) for path in paths]
    return SCHNELL.model_copy(update={"adapters": loras})


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One that fits, one for another model, and one that is missing."""
    contents = {"good": NIGHT.read_bytes(), "other": lora_file(1)}
    for name, content in contents.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    return [tmp_path / f"{name}.safetensors" for name in ("good", "other", "missing")]


async def test_what_cannot_be_used_is_logged_and_left_out(
    files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    loras = BuiltInLoras([card_with(*files)])

    with caplog.at_level(logging.ERROR):
        listed = [record.id for record in await loras.list()]
        await loras.list()

    assert listed == ["good"]
    assert [record.__dict__["lora"] for record in caplog.records] == ["other", "missing"]
    assert await loras.find("unheard-of") is None
    assert await loras.file(digest(NIGHT.read_bytes())) == NIGHT.read_bytes()


async def test_who_asks_for_it_gets_the_reason(files: list[Path]) -> None:
    loras = BuiltInLoras([card_with(*files)])

    with pytest.raises(Internal, match=r"names the LoRA other: .*'unet\..*' names no .* layer of this model"):
        await loras.find("other")
    with pytest.raises(Internal, match=r"names the LoRA missing: .*No such file"):
        await loras.find("missing", SCHNELL.id)


async def test_a_replaced_file_is_used_after_a_while(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loras = BuiltInLoras([card_with(*files)])
    assert len(await loras.list()) == 1
    files[2].write_bytes(NIGHT.read_bytes())
    assert len(await loras.list()) == 1

    monkeypatch.setattr(builtin, "RETRY_S", 0.0)
    late = BuiltInLoras([card_with(files[0], files[1])])
    assert len(await late.list()) == 1
    files[1].write_bytes(NIGHT.read_bytes())

    assert [record.id for record in await late.list()] == ["good", "other"]
