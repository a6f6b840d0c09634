"""A replica serves a model whose denoiser and T5 come from GGUF files, and fetches these where they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from deployments.models import weight_cache
from deployments.models.load_errors import explain
from deployments.models.load_failures import operator_state
from deployments.models.weight_cache import FileNotFetched, fetch, gguf_path
from deployments.planning.local_files import fetched_path
from deployments.protocol.card import ModelCard, Weights, load_card
from deployments.protocol.errors import ModelFailed
from deployments.protocol.events import Artifact, Done
from deployments.protocol.gguf_file import GgufFile
from deployments.protocol.request import GenerationRequest
from deployments.replica import ModelReplica
from tests.inference import tiny
from tests.inference.gguf_files import write_gguf

ROOT = Path(__file__).parents[2]
CARD = load_card(ROOT / "configs/models/tiny-flux-dev.yaml")
NOT_FOUND = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, with files of its transformer and its T5 beside it."""
    made = tmp_path_factory.mktemp("model")
    pipeline = tiny.flux()
    pipeline.save_pretrained(made)
    write_gguf(made / "flux.gguf", pipeline.transformer, "Q8_0")
    encoder = pipeline.text_encoder_2.state_dict()
    del encoder["encoder.embed_tokens.weight"]
    write_gguf(made / "t5.gguf", encoder, "Q4_0", architecture="t5encoder")
    return made


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weight_cache.MODEL_CACHE, str(tmp_path / "cache"))


@pytest.fixture
def bucket(folder: Path) -> Iterator[Any]:
    """The model in a place that is reached by addresses."""
    memory = fsspec.filesystem("memory")
    for file in filter(Path.is_file, folder.rglob("*")):
        memory.pipe(f"/bucket/model/{file.relative_to(folder)}", file.read_bytes())
    yield memory
    memory.rm("/bucket", recursive=True)


def card_of(weights: Weights, **serving: Any) -> ModelCard:
    own = CARD.serving.model_copy(update={"warm_up": False, **serving})
    return CARD.model_copy(update={"weights": weights, "serving": own, "adapters": []})


async def test_pictures_say_what_form_the_weights_had(folder: Path) -> None:
    files = {"transformer": str(folder / "flux.gguf"), "text_encoder_2": str(folder / "t5.gguf")}
    card = card_of(Weights(path=str(folder), dtype="float32", gguf=files), warm_up=True)
    replica = ModelReplica([card])
    request = GenerationRequest(
        model=card.id, prompt="a red circle", seed=5, width=64, height=64, num_inference_steps=2
    )

    events = [event async for event in replica.generate(request)]

    assert replica._runtime.load_failures == {}
    assert isinstance(events[-1], Done)
    (picture,) = [event for event in events if isinstance(event, Artifact) and event.kind == "image"]
    assert picture.metadata["quantised"] == {"text_encoder_2": "gguf Q4_0", "transformer": "gguf Q8_0"}
    assert picture.metadata["exact"] is True
    replica.__del__()


def test_a_file_of_another_model_is_the_failure_of_the_model(folder: Path) -> None:
    card = card_of(Weights(path=str(folder), gguf={"transformer": str(folder / "t5.gguf")}))

    (failure,) = ModelReplica([card])._runtime.load_failures.values()

    assert failure.kind == "model_failed"
    assert (
        "architecture 't5encoder', not a FluxTransformer2DModel; use a file of the model" in failure.message
    )


def test_a_plan_that_is_refused_fetches_nothing(folder: Path) -> None:
    files = {"transformer": "memory://bucket/nothing.gguf"}
    card = card_of(Weights(path=str(folder), gguf=files), quantisation="int8")

    (failure,) = ModelReplica([card])._runtime.load_failures.values()

    assert (
        "asks for int8 in transformer, whose weights come from memory://bucket/nothing.gguf"
        in failure.message
    )


# --- fetching ---------------------------------------------------------------------------------------------


def test_a_file_and_the_rest_of_the_model_are_fetched_once(bucket: Any, tmp_path: Path) -> None:
    address = "memory://bucket/model"
    weights = Weights(path=address, dtype="float32", gguf={"transformer": f"{address}/flux.gguf"})

    replica = ModelReplica([card_of(weights)])

    assert replica._runtime.load_failures == {}
    assert fetched_path(f"{address}/flux.gguf").read_bytes() == bucket.cat("/bucket/model/flux.gguf")
    (folder,) = (path.parent for path in (tmp_path / "cache").glob("*/model_index.json"))
    assert [file.name for file in (folder / "transformer").iterdir()] == ["config.json"]
    assert list((folder / "text_encoder_2").glob("*.safetensors"))
    before = fetched_path(f"{address}/flux.gguf").stat().st_mtime_ns
    fetch(weights, pipeline=True)
    assert fetched_path(f"{address}/flux.gguf").stat().st_mtime_ns == before


def test_a_whole_copy_is_not_that_without_a_component(bucket: Any) -> None:
    address = "memory://bucket/model"
    part = weight_cache.local_folder(address, without=["transformer"])

    whole = weight_cache.local_folder(address)

    assert part != whole
    assert list((whole / "transformer").glob("*.safetensors"))


def test_a_file_that_is_not_there_is_named(bucket: Any, folder: Path) -> None:
    file = GgufFile(path="memory://bucket/no.gguf")
    weights = Weights(path=str(folder), gguf={"transformer": file})

    with pytest.raises(FileNotFetched) as raised:
        gguf_path(file)

    error = explain(raised.value, weights)
    assert isinstance(error, ModelFailed)
    assert "memory://bucket/no.gguf, which weights.gguf of the card names, is not here" in error.message
    assert "there is no file at memory://bucket/no.gguf" in error.message
    assert not fetched_path(str(file.path)).exists()


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (EntryNotFoundError("404: no file x.gguf"), "huggingface.co/a/b lacks a file"),
        (
            RepositoryNotFoundError(
                "404", response=httpx.Response(404, request=httpx.Request("GET", "https://x"))
            ),
            "shows no https://huggingface.co/a/b to this token",
        ),
    ],
)
def test_what_the_hub_says_of_a_file_is_said_of_its_repository(
    raised: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise raised

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    file = GgufFile.model_validate("a/b/x.gguf")

    with pytest.raises(FileNotFetched) as error:
        gguf_path(file)

    explained = explain(error.value, Weights(repo="base/model", gguf={"transformer": file}))
    assert isinstance(explained, ModelFailed)
    assert "the GGUF file a/b/x.gguf, which weights.gguf of the card names, is not here" in explained.message
    assert words in explained.message
    assert "base/model" not in explained.message


def test_of_a_repository_the_component_gives_its_configuration_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def download(_repo: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    def snapshot(_repo: str, **options: Any) -> None:
        asked["patterns"] = options["allow_patterns"]

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    weights = Weights(repo="base/model", gguf={"transformer": "a/b/x.gguf"})

    weight_cache.hub_folder(weights, pipeline=True)

    assert "transformer" in asked
    assert asked["patterns"] == ["transformer/config.json"]


def test_a_model_is_tried_again_when_its_file_changes(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    weights = Weights(path=str(folder), gguf={"transformer": str(file)})
    states = [operator_state(weights)]

    for content in (b"a", b"bc"):
        file.write_bytes(content)
        states.append(operator_state(weights))

    assert len(set(states)) == 3
    assert json.loads((folder / "model_index.json").read_bytes())
