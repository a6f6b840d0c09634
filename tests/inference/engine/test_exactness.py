"""The promise: a request in any batch equals the same request alone.

Three readings of it. In float64, where rounding cannot hide a mistake, latents differ by less than 1e-13 of
their range. In float32 without deterministic rows they differ by rounding. With them (what is served) not a
bit differs, in float32 and in bfloat16, from latents to decoded pictures. `make exact` plays 1,000 schedules.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deployments.engine import batch_key
from deployments.engine.fiber import FiberCancelled
from deployments.pipelines import diffusers_model as model_module
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.protocol.request import ControlType, ResolvedRequest
from tests.inference import tiny
from tests.inference.engine.exactness import Bench, some_request
from tests.inference.tiny_controls import CONTROLS, unet_controlnets

SCHEDULES = int(os.environ.get("WEFT_EXACT_SCHEDULES", "100"))  # over all models and precisions
FLOAT64, FLOAT32 = 1e-11, 1e-5  # of the largest latent; float32: measured 3e-6
SDXL_SCHEDULERS = ("auto", "euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "heun", "lcm")
# in float32 these amplify the rounding of the model's output beyond 1e-5 when run for many steps
CALM_SCHEDULERS = ("auto", "euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "heun")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def flux_bench(dtype: torch.dtype, **options: Any) -> Bench:
    rng = random.Random(1)
    requests = [
        some_request(rng, guidance=(0.0, 1.0, 3.5, 7.0), schedulers=("auto",), text_tokens=48)
        for _ in range(30)
    ]
    return Bench(DiffusersModel(tiny.flux().to(dtype=dtype), tiny.IMAGE_TASKS), requests, **options)


def sdxl_bench(dtype: torch.dtype, schedulers: tuple[str, ...] = SDXL_SCHEDULERS, **options: Any) -> Bench:
    rng = random.Random(2)
    requests = [
        some_request(rng, guidance=(1.0, 3.0, 7.5), schedulers=schedulers, text_tokens=None)
        for _ in range(24)
    ]
    return Bench(DiffusersModel(tiny.sdxl().to(dtype=dtype), tiny.IMAGE_TASKS), requests, **options)


def controlled_bench(dtype: torch.dtype, **options: Any) -> Bench:
    """Two in three with one control picture or two: ControlNets are modules of the batch as well."""
    rng = random.Random(3)
    kinds: tuple[tuple[ControlType, ...], ...] = ((), ("canny",), ("canny",), ("canny", "depth"))
    requests = [
        some_request(rng, guidance=(1.0, 7.5), schedulers=CALM_SCHEDULERS, text_tokens=None, controls=kinds)
        for _ in range(20)
    ]
    pipeline = tiny.sd()
    nets = {kind: net.to(dtype) for kind, net in unet_controlnets(pipeline.unet).items()}
    model = DiffusersModel(
        pipeline.to(dtype=dtype),
        tiny.IMAGE_TASKS,
        controls=CONTROLS,
        load_controlnet=lambda weights: nets[weights.path or ""],
    )
    for request in requests:
        model.prepare(request)
    return Bench(model, requests, **options)


def share(make: Any, part: float) -> int:
    """This part of the schedules; half of it with ControlNets, whose forwards take longest."""
    return round(SCHEDULES * part / (2 if make is controlled_bench else 1))


def compare(bench: Bench, schedules: int, tolerance: float | None) -> int:
    """Play schedules and hold every finished request against itself alone; how many were compared.

    tolerance: of the largest latent; None: not a bit may differ.
    """
    rng, compared = random.Random(len(bench.requests)), 0
    for _ in range(schedules):
        for request, fiber in bench.play(rng):
            if isinstance(fiber.failure, FiberCancelled):
                continue
            assert fiber.failure is None, f"{fiber.failure!r} in {request!r}"
            got, alone = fiber.result, bench.expected(request)
            assert not got.latents.requires_grad
            if tolerance is None:
                assert got.same_bits(alone), f"{got.distance(alone):.1e} in {request!r}"
            else:
                assert got.distance(alone) <= tolerance, f"{got.distance(alone):.1e} in {request!r}"
            compared += 1
    return compared


@pytest.mark.parametrize("make", [flux_bench, sdxl_bench, controlled_bench])
def test_any_request_in_any_batch_is_the_request_alone(make: Any) -> None:
    bench = make(torch.float64)

    compared = compare(bench, share(make, 3 / 20), FLOAT64)

    assert compared > share(make, 1 / 6)
    assert bench.rows > 1.2 * bench.forwards, "the schedules must really share forwards"


@pytest.mark.parametrize("make", [flux_bench, lambda dtype: sdxl_bench(dtype, CALM_SCHEDULERS)])
def test_in_single_precision_only_rounding_differs(make: Any) -> None:
    assert compare(make(torch.float32), SCHEDULES // 10, FLOAT32) > SCHEDULES // 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [flux_bench, sdxl_bench, controlled_bench])
def test_with_deterministic_rows_not_a_bit_differs(make: Any, dtype: torch.dtype) -> None:
    bench = make(dtype, deterministic=True, decode=True)

    compared = compare(bench, share(make, 1 / 12), None)

    assert compared > share(make, 1 / 10)
    assert bench.rows > 1.2 * bench.forwards, "the schedules must really share forwards"


def test_decoding_on_the_auxiliary_lane_changes_no_bit() -> None:
    bench = flux_bench(torch.float32, deterministic=True, decode=True, auxiliary_lane=True)

    assert compare(bench, max(2, SCHEDULES // 25), None) > 2


def test_images_of_equal_token_count_and_different_shape_are_not_merged() -> None:
    bench = flux_bench(torch.float64)
    tall, wide = sized(bench, (64, 96)), sized(bench, (96, 64))

    fibers = bench.together([tall, wide])

    for fiber, request in zip(fibers, (tall, wide), strict=True):
        assert fiber.result.distance(bench.expected(request)) <= FLOAT64


def sized(bench: Bench, size: tuple[int, int]) -> ResolvedRequest:
    changes = {"width": size[0], "height": size[1], "edit": None, "num_images": 1, "num_inference_steps": 12}
    return bench.requests[0].model_copy(update=changes)


# --- the tests above must catch these ----------------------------------------------------------------------


def test_a_shared_noise_scheduler_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "noise_scheduler", lambda _name, own, _device: own)
    bench = sdxl_bench(torch.float64, ("auto",))

    with pytest.raises(AssertionError, match=" in "):
        compare(bench, 10, FLOAT64)


def test_ids_compared_by_shape_alone_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_key, "_shared_component", lambda value, _digests: tuple(value.shape))
    bench = flux_bench(torch.float64)
    tall, wide = sized(bench, (64, 96)), sized(bench, (96, 64))

    fibers = bench.together([tall, wide])

    far = [
        fiber.result.distance(bench.expected(request))
        for fiber, request in zip(fibers, (tall, wide), strict=True)
    ]
    assert max(far) > 1e-6


def test_grad_mode_toggled_by_fibers_would_be_caught() -> None:
    """Without inference mode around the loop, a pipeline's own no_grad switches it for its neighbours."""
    bench = flux_bench(torch.float64)
    with torch.inference_mode(mode=False), torch.enable_grad(), pytest.raises((AssertionError, RuntimeError)):
        compare(bench, 10, FLOAT64)
