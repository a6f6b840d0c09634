"""Edits by reference pictures: the unmodified pipelines take them, and any mixture of them stays exact."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen_module

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.scheduled_job import ParkedCall
from deployments.engine.step_scheduler import StepScheduler
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.prompt_cache import PromptCache
from deployments.pipelines.reference_pictures import edit_class, reference_arguments
from deployments.protocol.card import References
from deployments.protocol.errors import ModelFailed
from deployments.protocol.request import ResolvedRequest, Task
from tests.inference import tiny
from tests.inference.editing import PICTURES, EditBench, klein, kontext, qwen_edit_plus

FLOAT64 = 1e-11  # of the largest latent
ONE = [(b"square",), (b"turned",), (b"wide",), ()]
SEVERAL = [(b"square",), (b"turned",), (b"square", b"turned"), (b"turned", b"square"), (b"square",) * 3]


class LargestGroup(StepScheduler):
    """Picks as many calls as may share a forward."""

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        groups: dict[object, list[int]] = {}
        for index, call in enumerate(waiting):
            groups.setdefault(call.key or index, []).append(index)
        return max(groups.values(), key=len)


@pytest.fixture(autouse=True)
def _inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Qwen's pipeline scales reference pictures to a megapixel, which takes too long here."""
    monkeypatch.setattr(qwen_module, "VAE_IMAGE_SIZE", 32 * 32)
    monkeypatch.setattr(qwen_module, "CONDITION_IMAGE_SIZE", 56 * 56)
    with torch.inference_mode():
        yield


def make_request(references: tuple[bytes, ...] = (b"square",), **changes: Any) -> ResolvedRequest:
    facts: dict[str, Any] = {
        "model": "tiny",
        "prompt": "make it blue",
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "seed": 5,
        "max_sequence_length": 32,
        "references": references,
    }
    return ResolvedRequest(**(facts | changes))


def mixture(references: list[tuple[bytes, ...]]) -> list[ResolvedRequest]:
    """Requests with each of these, of different seeds, steps and prompts; these are equally long,
    because Qwen pads none."""
    rng = random.Random(4)
    return [
        make_request(
            named,
            prompt=rng.choice(("make it blue", "make it pink", "make it cyan")),
            seed=rng.randrange(2**40),
            num_inference_steps=rng.choice((2, 3, 5)),
        )
        for named in references * 2
    ]


def bench(build: Callable[[], Any], references: list[tuple[bytes, ...]], most: int) -> EditBench:
    tasks = [Task.edit, Task.t2i] if () in references else [Task.edit]
    limits = References(max=most, pixels=64 * 64 if most == 1 else None)
    model = DiffusersModel(build().to(dtype=torch.float64), tasks, references=limits)
    return EditBench(requests=mixture(references), model=model)


@pytest.mark.parametrize(
    ("build", "references", "most"),
    [(kontext, ONE, 1), (klein, [*SEVERAL, ()], 10), (qwen_edit_plus, SEVERAL, 3)],
    ids=["kontext", "flux2_klein", "qwen_edit_plus"],
)
def test_a_mixture_of_edits_gives_what_each_gives_alone(
    build: Callable[[], Any], references: list[tuple[bytes, ...]], most: int
) -> None:
    requests = bench(build, references, most)
    alone = {request: requests.expected(request) for request in requests.requests}

    engine = Engine(LargestGroup(8), exact="off")
    merged = [(request, Fiber(requests.work(request))) for request in requests.requests]
    requests._run(engine, [fiber for _, fiber in merged])
    for request, fiber in merged:
        assert fiber.failure is None
        assert fiber.result.distance(alone[request]) < FLOAT64
    assert engine.forwards < engine.rows

    for request, fiber in requests.play(random.Random(1)):  # joining and cancelled while others run
        if not isinstance(fiber.failure, FiberCancelled):
            assert fiber.result.distance(alone[request]) < FLOAT64


def test_edits_with_equally_many_pictures_of_equal_sizes_share_forwards_and_others_run_beside() -> None:
    edits = bench(klein, SEVERAL, 10)
    forwards: Counter[tuple[int, int]] = Counter()  # by rows, and tokens of each
    transformer = edits.model.pipeline_for(make_request()).transformer

    def count(_block: Any, _given: Any, arguments: dict[str, Any]) -> None:
        rows, tokens, _ = arguments["hidden_states"].shape
        forwards[rows, tokens] += 1

    transformer.transformer_blocks[0].register_forward_pre_hook(count, with_kwargs=True)
    several = [(b"square",), (b"turned",), (b"square", b"turned"), (b"turned", b"square"), (b"wide",)]
    fibers = [
        Fiber(edits.work(make_request(named, seed=seed, num_inference_steps=2)))
        for seed, named in enumerate(several)
    ]

    edits._run(Engine(LargestGroup(8), exact="off"), fibers)

    picture, wide = 16 * 16, 24 * 16  # tokens
    assert [fiber.failure for fiber in fibers] == [None] * 5
    assert forwards == {(2, 2 * picture): 2, (2, 3 * picture): 2, (1, picture + wide): 2}


def test_the_prompt_cache_knows_the_pictures_that_an_encoder_reads() -> None:
    cache, encoded = PromptCache(2**20), []

    class Pipeline:
        def encode_prompt(self, prompt: str, image: Any = None) -> torch.Tensor:
            encoded.append((prompt, image))
            return torch.ones(4)

    for picture in (PICTURES[b"square"], PICTURES[b"turned"], PICTURES[b"square"].copy(), None):
        pipeline = Pipeline()
        cache.attach(pipeline)
        pipeline.encode_prompt("make it blue", image=[picture] if picture else None)

    assert [image for _, image in encoded] == [[PICTURES[b"square"]], [PICTURES[b"turned"]], None]
    assert (cache.hits, cache.misses) == (1, 3)


def test_a_pipeline_gets_one_picture_or_a_list() -> None:
    first, second = PICTURES[b"square"], PICTURES[b"turned"]
    pipeline = diffusers.Flux2KleinPipeline

    assert reference_arguments(pipeline, [first], scaled=False) == {"image": first}
    assert reference_arguments(pipeline, [first, second], scaled=False) == {"image": [first, second]}


def test_kontext_keeps_the_size_of_scaled_pictures_only() -> None:
    picture, pipeline = [PICTURES[b"square"]], diffusers.FluxKontextPipeline

    scaled = reference_arguments(pipeline, picture, scaled=True)

    assert scaled == {"image": picture[0], "_auto_resize": False}
    assert reference_arguments(pipeline, picture, scaled=False) == {"image": picture[0]}


@pytest.mark.parametrize("references", [(b"square",), ()])
def test_kontext_makes_pictures_of_the_requests_size(references: tuple[bytes, ...]) -> None:
    edits = bench(kontext, ONE, 1).model
    request = make_request(references, width=96, num_inference_steps=1)

    (picture,) = edits.call(request, lambda _step, _steps: None, references=[PICTURES[r] for r in references])

    assert picture.size == (96, 64)


def test_a_model_without_reference_pictures_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(ModelFailed, match="take edit out of the card's tasks"):
        DiffusersModel(tiny.sd(), [Task.edit])


def test_a_card_that_promises_more_pictures_than_the_pipeline_takes_is_refused() -> None:
    with pytest.raises(ModelFailed, match="max: 1"):
        DiffusersModel(kontext(), [Task.edit], references=References(max=2))


def test_an_edit_uses_the_class_that_the_weights_name() -> None:
    assert edit_class(diffusers.QwenImageEditPlusPipeline, 3) is diffusers.QwenImageEditPlusPipeline
