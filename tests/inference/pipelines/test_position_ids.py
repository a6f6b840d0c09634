"""Position ids: later requests get the tensors of earlier ones, whose values are known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from deployments.engine import batch_key
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.step_scheduler import StepScheduler
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.position_ids import TEXT_IDS, PositionIds
from deployments.protocol.request import ResolvedRequest
from tests.inference import families, tiny

Seen = list[tuple[Tensor, Tensor]]  # txt_ids and img_ids of each call of the denoiser


def make_request(**changes: Any) -> ResolvedRequest:
    facts = {
        "model": "tiny",
        "prompt": "a fox",
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "seed": 5,
        "max_sequence_length": 32,
    }
    return ResolvedRequest(**(facts | changes))


@pytest.fixture
def seen() -> Seen:
    return []


@pytest.fixture
def model(seen: Seen) -> Iterator[DiffusersModel]:
    """A FLUX whose denoiser notes the ids that it gets."""
    pipeline = tiny.flux()
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append((kwargs["txt_ids"], kwargs["img_ids"])), with_kwargs=True
    )
    yield DiffusersModel(pipeline, tiny.IMAGE_TASKS)
    handle.remove()


def run(model: DiffusersModel, **changes: Any) -> None:
    model.call(make_request(**changes), lambda _step, _steps: None)


def test_requests_of_one_size_get_the_same_ids_whatever_their_prompts(
    model: DiffusersModel, seen: Seen
) -> None:
    run(model)
    run(model, prompt="two owls")
    run(model, width=96)

    assert len({id(txt) for txt, _ in seen}) == 1
    assert [id(img) == id(seen[0][1]) for _, img in seen] == [True] * 4 + [False] * 2


def test_pictures_of_64x96_and_96x64_have_ids_of_one_shape_and_other_values(
    model: DiffusersModel, seen: Seen
) -> None:
    run(model, width=64, height=96)
    run(model, width=96, height=64)

    tall, wide = seen[0][1], seen[-1][1]
    assert tall.shape == wide.shape
    assert not torch.equal(tall, wide)


def test_ids_have_the_values_of_the_pipeline_after_many_requests(model: DiffusersModel, seen: Seen) -> None:
    for prompt in ("a fox", "two owls", "rain"):
        run(model, prompt=prompt)

    txt, img = seen[-1]
    like = (img.device, img.dtype)
    assert torch.equal(img, diffusers.FluxPipeline._prepare_latent_image_ids(1, 16, 16, *like))
    assert not txt.any()


def test_the_engine_reads_the_ids_of_the_first_request_only(
    model: DiffusersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = hashlib.blake2b
    monkeypatch.setattr(
        batch_key.hashlib,
        "blake2b",
        lambda data, **options: (read.append(len(data)), plain(data, **options))[1],
    )
    engine, restore = Engine(StepScheduler(4)), intercept(model.modules)
    counts = []
    for prompt in ("a fox", "two owls", "rain"):
        engine.start(Fiber(lambda prompt=prompt: run(model, prompt=prompt)))  # type: ignore[misc]
        while not engine.idle:
            engine.step()
        counts.append(len(read))
    restore()

    assert counts == [2, 2, 2]


def pipeline_of(kind: str) -> Any:
    """A pipeline of this class over the components of a tiny one."""
    source = families.chroma() if kind.startswith("Chroma") else tiny.flux()
    pipeline_class = getattr(diffusers, kind)
    wanted, _ = pipeline_class._get_signature_keys(pipeline_class)
    parts = {name: part for name, part in source.components.items() if name in wanted}
    return pipeline_class(**parts, **({"controlnet": None} if "controlnet" in wanted else {}))


@pytest.mark.parametrize("kind", TEXT_IDS)
def test_the_listed_results_of_every_listed_class_are_zeros(kind: str) -> None:
    pipeline = pipeline_of(kind)
    texts = {"prompt_2": None} if kind.startswith("Flux") else {"negative_prompt": "grey"}

    encoded = pipeline.encode_prompt("a cat", **texts, max_sequence_length=16)

    for position in TEXT_IDS[kind]:
        assert encoded[position].shape[1:] == (3,)
        assert not encoded[position].any()


@pytest.mark.parametrize("kind", TEXT_IDS)
def test_every_listed_class_makes_the_ids_of_pictures_of_sizes_alone(kind: str) -> None:
    pipeline = pipeline_of(kind)
    function = type(pipeline).__dict__["_prepare_latent_image_ids"]

    PositionIds().attach(pipeline)
    sizes = (6, 4) if kind == "ChromaImg2ImgPipeline" else (1, 6, 4)
    first, again = (
        pipeline._prepare_latent_image_ids(*sizes, torch.device("cpu"), torch.float32) for _ in range(2)
    )

    assert isinstance(function, staticmethod)
    assert first is again
    assert torch.equal(first, function(*sizes, torch.device("cpu"), torch.float32))


def test_a_pipeline_that_writes_to_its_ids_keeps_its_own() -> None:
    pipeline = diffusers.FluxKontextPipeline.__new__(diffusers.FluxKontextPipeline)

    PositionIds().attach(pipeline)

    assert "_prepare_latent_image_ids" not in vars(pipeline)
