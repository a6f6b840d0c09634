"""The promise: a request in any batch equals the same request alone.

Three readings of it. In float64, where rounding cannot hide a mistake, latents differ by less than 1e-13 of
their range. In float32 without proofs they differ by rounding. With them (what is served) not a bit differs,
in float32 and in bfloat16, from latents to decoded pictures: of any request in strict mode, and by default of
every one that shared no forward in a batch size without a proof. `make exact` plays 1,000 schedules.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deployments.engine import batch_key
from deployments.engine.bit_trials import BitTrials
from deployments.engine.fiber import FiberCancelled
from deployments.pipelines import diffusers_model as model_module
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.protocol.request import ControlType, Exactness, ResolvedRequest
from tests.inference import tiny
from tests.inference.engine.exactness import Bench, Schedules, some_request
from tests.inference.engine.family_schedules import GUIDED, family_schedules
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


@pytest.fixture(autouse=True)
def _two_rows_cost_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it is measured, and what else the machine computes decides how many forwards are shared."""
    monkeypatch.setattr(BitTrials, "seconds", lambda _trials, _batch_size: 1.0)


def flux_bench(dtype: torch.dtype, **options: Any) -> Bench:
    rng = random.Random(1)
    requests = [
        some_request(rng, guidance=(0.0, 1.0, 3.5, 7.0), schedulers=("auto",), text_tokens=48)
        for _ in range(30)
    ]
    return Bench(requests, model=DiffusersModel(tiny.flux().to(dtype=dtype), tiny.IMAGE_TASKS), **options)


def sdxl_bench(dtype: torch.dtype, schedulers: tuple[str, ...] = SDXL_SCHEDULERS, **options: Any) -> Bench:
    rng = random.Random(2)
    requests = [
        some_request(rng, guidance=(1.0, 3.0, 7.5), schedulers=schedulers, text_tokens=None)
        for _ in range(24)
    ]
    return Bench(requests, model=DiffusersModel(tiny.sdxl().to(dtype=dtype), tiny.IMAGE_TASKS), **options)


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
    return Bench(requests, model=model, **options)


def share(make: Any, part: float) -> int:
    """This part of the schedules; half of it with ControlNets, whose forwards take longest."""
    return round(SCHEDULES * part / (2 if make is controlled_bench else 1))


def compare(bench: Schedules[Any], schedules: int, tolerance: float | None) -> int:
    """Play schedules and hold every finished request against itself alone; how many were compared.

    tolerance: of the largest latent; None: not a bit may differ, unless the request is marked as having
    shared a batch size without a proof, which only a bench that prefers exactness may do.
    """
    rng, compared = random.Random(len(bench.requests)), 0
    for _ in range(schedules):
        for request, fiber in bench.play(rng):
            if isinstance(fiber.failure, FiberCancelled):
                continue
            assert fiber.failure is None, f"{fiber.failure!r} in {request!r}"
            got, alone = fiber.result, bench.expected(request)
            assert not got.latents.requires_grad
            if tolerance is not None:
                assert got.distance(alone) <= tolerance, f"{got.distance(alone):.1e} in {request!r}"
            elif fiber.unproven:
                assert bench.exact == "prefer", f"{fiber.unproven} in {request!r}"
                assert got.latents.isfinite().all()
            else:
                assert got.same_bits(alone), f"{got.distance(alone):.1e} in {request!r}"
            compared += 1
    return compared


@pytest.mark.parametrize("make", [flux_bench, sdxl_bench, controlled_bench])
def test_any_request_in_any_batch_is_the_request_alone(make: Any) -> None:
    bench = make(torch.float64)

    compared = compare(bench, share(make, 1 / 10), FLOAT64)

    assert compared > share(make, 1 / 9)
    assert bench.rows > 1.2 * bench.forwards, "the schedules must really share forwards"


@pytest.mark.parametrize("make", [flux_bench, lambda dtype: sdxl_bench(dtype, CALM_SCHEDULERS)])
def test_in_single_precision_only_rounding_differs(make: Any) -> None:
    assert compare(make(torch.float32), SCHEDULES // 20, FLOAT32) > SCHEDULES // 20


@pytest.mark.parametrize("exact", ["strict", "prefer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [flux_bench, sdxl_bench, controlled_bench])
def test_in_proven_batch_sizes_not_a_bit_differs(make: Any, dtype: torch.dtype, exact: Exactness) -> None:
    bench = make(dtype, exact=exact, decode=True)

    compared = compare(bench, share(make, 1 / 24), None)

    assert compared > share(make, 1 / 20)
    assert bench.rows > 1.1 * bench.forwards, "the schedules must really share forwards"
    assert bench.unproven < compared / 2, "most batch sizes are proven on this machine"


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize("exact", ["strict", "prefer"])
@pytest.mark.parametrize("name", GUIDED)
def test_with_guidance_loras_and_previews_not_a_bit_differs(name: str, exact: Exactness) -> None:
    bench = family_schedules(name, exact)

    compared = compare(bench, max(2, SCHEDULES // 41), None)

    assert compared > max(2, SCHEDULES // 41)
    # a convolution may have other bits in every batch: then a strict schedule shares nothing of the denoiser
    shared = 1.1 if exact == "prefer" else 1.0
    assert bench.rows > shared * bench.forwards, "the schedules must really share forwards"
    assert bench.previews_shown or bench.previewer is None or compared < 30  # three in ten requests have them


def test_decoding_on_the_auxiliary_lane_changes_no_bit() -> None:
    bench = flux_bench(torch.float32, exact="strict", decode=True, auxiliary_lane=True)

    try:
        assert compare(bench, max(2, SCHEDULES // 25), None) > 2
    finally:
        bench.close()


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
    """Without inference mode around the loop, a pipeline's own no_grad switches it for its neighbours: the
    first that ends restores the mode in which it began."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        bench = flux_bench(torch.float64)
        short = sized(bench, (64, 64)).model_copy(update={"num_inference_steps": 2})
        _, longer = bench.together([short, sized(bench, (64, 64))])

    assert longer.failure is not None or longer.result.latents.requires_grad
