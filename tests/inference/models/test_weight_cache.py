"""Weights that cards name by address come to the node once, whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import boto3
import fsspec
import pytest
import torch
from pydantic import SecretStr

from deployments.models import weight_cache
from deployments.models.load import load_pipeline
from deployments.protocol.card import Weights, load_card
from deployments.protocol.installation import Installation, S3Access
from deployments.replica import ModelReplica
from deployments.weights_prefetcher import target_nodes
from tests.serving.storage.s3 import BUCKET, KEYS, s3_server

ROOT = Path(__file__).parents[3]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(weight_cache.MODEL_CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_at_a_url_is_downloaded_and_loaded(cache: Path) -> None:
    weights = Weights(path=f"file://{ROOT}/models/tiny-flux-schnell", dtype="float32")

    pipeline = load_pipeline(weights, torch.device("cpu"))

    assert type(pipeline).__name__ == "FluxPipeline"
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    assert (folder / "model_index.json").read_bytes() == (
        ROOT / "models/tiny-flux-schnell/model_index.json"
    ).read_bytes()


def test_a_model_in_a_bucket_is_downloaded_with_the_keys_of_the_installation(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {})  # restored afterwards
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    card = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
    weights = card.weights.model_copy(update={"path": f"s3://{BUCKET}/models/flux"})
    in_bucket = card.model_copy(
        update={"weights": weights, "serving": card.serving.model_copy(update={"warm_up": False})}
    )

    with s3_server() as url:
        access = S3Access(SecretStr("testing"), SecretStr("testing-secret"), url, "us-east-1")
        upload(ROOT / "models/tiny-flux-schnell", url, "models/flux")
        denied = ModelReplica(
            [in_bucket], installation=Installation(s3=replace(access, key=None, secret=None))
        )
        replica = ModelReplica([in_bucket], installation=Installation(s3=access))

    (failure,) = denied._runtime.load_failures.values()
    assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in failure.message
    assert replica._runtime.load_failures == {}
    assert list(replica._runtime.models.loaded) == ["tiny-flux-schnell"]


def upload(folder: Path, url: str, prefix: str) -> None:
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **KEYS)
    for file in filter(Path.is_file, folder.rglob("*")):
        client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(folder)}")
    client.close()


def test_concurrent_downloads_of_one_model_run_once(cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/model/model_index.json", b"{}")
    memory.pipe("/bucket/model/unet/weights.safetensors", b"\0" * 1000)
    try:
        with ThreadPoolExecutor(8) as pool:
            folders = set(pool.map(weight_cache.local_folder, ["memory://bucket/model"] * 16))
    finally:
        memory.rm("/bucket", recursive=True)

    (folder,) = folders
    assert (folder / "unet/weights.safetensors").stat().st_size == 1000
    assert weight_cache.local_folder("memory://bucket/model") == folder, "the bucket is not asked again"


def test_a_partial_download_is_not_used(cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/other/model_index.json", b"{}")
    whole = weight_cache.local_folder("memory://bucket/other")
    partial = whole.with_suffix(".partial")
    whole.rename(partial)
    (partial / "half.safetensors").write_bytes(b"half")

    again = weight_cache.local_folder("memory://bucket/other")

    memory.rm("/bucket", recursive=True)
    assert [path.name for path in again.iterdir()] == ["model_index.json"]


def test_a_url_without_weights_is_named_in_the_error(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder at memory://bucket/nothing"):
        weight_cache.fetch(Weights(path="memory://bucket/nothing"), pipeline=True)

    assert not any(path.is_dir() for path in cache.iterdir())


def test_a_card_lists_all_its_weights_once() -> None:
    flux = load_card(ROOT / "configs/models/flux.1-dev.yaml")

    every = flux.all_weights

    assert every[0] == flux.weights
    assert len({weights.model_dump_json() for weights in every}) == len(every)
    assert all(weights.is_remote for weights in every)
    assert not load_card(ROOT / "configs/models/tiny-sd15.yaml").weights.is_remote


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ({"head": 0, "laptop": 0}, ["head", "laptop"]),
        ({"head": 0, "gpu-1": 1, "gpu-2": 8}, ["gpu-1", "gpu-2"]),
    ],
)
def test_weights_go_to_gpu_nodes_or_to_all_where_there_are_none(
    nodes: dict[str, int], wanted: list[str]
) -> None:
    nodes_of_ray = [
        {"NodeID": name, "Alive": True, "Resources": {"GPU": gpus}} for name, gpus in nodes.items()
    ]
    dead = {"NodeID": "dead", "Alive": False, "Resources": {"GPU": 8}}

    assert target_nodes([*nodes_of_ray, dead]) == wanted
