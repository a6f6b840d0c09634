"""Video models at real size, served by the real replica on the simulated device."""

from __future__ import annotations

import pytest

from tests.device_sim.expectations import GIB, Part, denoising, ends, faults, grown_gib, waits_per_step
from tests.device_sim.simulation import needs_compiler, simulate

pytestmark = [needs_compiler, pytest.mark.device_sim_long]

# its tables for the next order of the solver are uploaded in every step
UNIPC = "diffusers/schedulers/scheduling_unipc_multistep.py"


@pytest.fixture(scope="module")
def wan() -> list[Part]:
    """Wan 2.1 14B: two requests of 33 frames, then one of its own 81 frames."""
    waves = ("frames=33", "frames=81,requests=1")
    words = [word for wave in waves for word in ("--wave", wave)]
    return simulate("wan", "--rows", "4", "--requests", "2", "--steps", "4", *words, quiet_s=200.0)


@pytest.fixture(scope="module")
def hunyuan() -> list[Part]:
    """HunyuanVideo: one request of 33 frames of its own size."""
    wave = ("--rows", "1", "--requests", "1", "--steps", "4", "--frames", "33")
    return simulate("hunyuan", *wave, quiet_s=200.0)


def test_videos_are_denoised_decoded_and_encoded(wan: list[Part], hunyuan: list[Part]) -> None:
    assert [ends(part) for part in wan[1:]] == [["Done", "Done"], ["Done"]]
    assert ends(hunyuan[1]) == ["Done"]


def test_no_operator_mixes_devices_and_no_streams_race(wan: list[Part], hunyuan: list[Part]) -> None:
    assert faults(wan) == faults(hunyuan) == []


def test_only_the_noise_scheduler_waits_for_the_device_in_a_step(
    wan: list[Part], hunyuan: list[Part]
) -> None:
    assert {source.partition(":")[0] for source in waits_per_step(wan[1])} <= {UNIPC}
    assert waits_per_step(hunyuan[1]) == set()


def test_both_calls_of_guidance_share_a_forward_with_other_requests(wan: list[Part]) -> None:
    assert max(forward["rows"] for forward in denoising(wan[1])) == 2


def test_weights_take_what_their_parameters_take(wan: list[Part], hunyuan: list[Part]) -> None:
    assert wan[0]["memory"]["after"] / GIB == pytest.approx(37.5, abs=0.1)
    assert hunyuan[0]["memory"]["after"] / GIB == pytest.approx(38.6, abs=0.1)


def test_a_video_leaves_no_memory_behind(wan: list[Part], hunyuan: list[Part]) -> None:
    assert max(grown_gib(part) for part in (*wan[1:], hunyuan[1])) < 0.1
