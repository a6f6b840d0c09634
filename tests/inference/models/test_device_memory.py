"""The account of a device's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.models import hardware
from deployments.models.device_memory import ALLOC_CONF, GIB, DeviceMemory, use_expandable_segments
from deployments.planning.device_limit import CONTEXT_BYTES, usable_bytes

ROOT = Path(__file__).parents[3]
# GiB that are there in all, that no other process has, and the replica's num_gpus
DEVICES = [
    (80, 79, 1.0),
    (80, 30, 1.0),  # another process holds 50
    (80, 79, 0.5),
    (80, 20, 0.5),
    (24, 23, 0.25),
    (24, 23, 0.0),  # not known
]


@pytest.mark.parametrize(("total", "free", "share"), DEVICES)
def test_a_process_counts_on_its_part_of_a_gpu_and_on_what_others_leave(
    total: int, free: int, share: float
) -> None:
    usable = usable_bytes(total * GIB, free * GIB, share)

    own = total * (share or 1.0) * GIB - CONTEXT_BYTES
    assert usable == int(0.95 * min(own, free * GIB))


def test_parts_of_one_gpu_fit_beside_each_other() -> None:
    total = 80 * GIB

    parts = [usable_bytes(total, total, share) + CONTEXT_BYTES for share in (0.5, 0.3, 0.2)]

    assert sum(parts) <= total


class Calls(list[Any]):
    def add(self, *arguments: Any) -> None:
        self.append(arguments)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 0.5 - CONTEXT_BYTES / (48 * GIB)), (1.0, None), (0.0, None)]
)
def test_torch_is_limited_to_the_part_of_the_gpu(
    share: float, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, device = Calls(), torch.device("cuda")
    properties = type("Properties", (), {"total_memory": 48 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", calls.add)

    hardware.limit_to_share(device, share)

    assert calls == ([] if expected is None else [(expected, device)])


def test_a_cpu_has_no_limit() -> None:
    assert hardware.memory_bytes(torch.device("cpu"), 1.0) is None


@pytest.mark.parametrize("name", ALLOC_CONF)
def test_the_operators_setting_of_the_allocator_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in ALLOC_CONF:
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64")

    use_expandable_segments()

    settings = {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")}
    assert settings == {name: "max_split_size_mb:64"}


def test_torch_understands_the_setting_of_its_allocator() -> None:
    code = (
        "from deployments.models.device_memory import use_expandable_segments as use; use()\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )

    assert (result.returncode, result.stdout.strip()) == (0, "expandable_segments:True")


# --- the account -------------------------------------------------------------------------------------------

FLUX, SDXL = ("flux", "pipeline"), ("sdxl", "pipeline")


def account(limit_gib: float | None) -> DeviceMemory:
    limit = None if limit_gib is None else int(limit_gib * GIB)
    return DeviceMemory(lambda: limit)


# card: GiB of its weights and GiB that it states (docs of the cards); which of them fit together
@pytest.mark.parametrize(
    ("total", "share", "flux_fits", "sdxl_fits_too"),
    [(80, 1.0, True, True), (48, 1.0, True, True), (40, 1.0, True, False), (24, 1.0, False, True)],
)
def test_models_fit_where_their_weights_and_a_picture_fit(
    total: int, share: float, flux_fits: bool, sdxl_fits_too: bool
) -> None:
    memory = DeviceMemory(lambda: usable_bytes(total * GIB, total * GIB, share))

    first = memory.claim("weights", FLUX, int(33.0 * GIB))
    second = memory.claim("weights", SDXL, int(10.0 * GIB))

    assert (first, second) == (flux_fits, sdxl_fits_too)


def test_a_claim_that_does_not_fit_changes_nothing() -> None:
    memory = account(10)
    memory.claim("weights", SDXL, 6 * GIB)

    assert not memory.claim("loras", ("sdxl", "a"), 5 * GIB)
    assert memory.claim("loras", ("sdxl", "a"), 4 * GIB)
    assert not memory.claim("loras", ("sdxl", "a"), 5 * GIB)
    assert (memory.held["weights"], memory.held["loras"]) == (6 * GIB, 4 * GIB)


def test_caches_that_grow_by_themselves_and_the_space_for_a_picture_count() -> None:
    memory, prompts = account(10), [1 * GIB]
    end = memory.watch("prompts", lambda: prompts[0])
    memory.expect_working("sdxl", 2 * GIB)

    assert not memory.claim("weights", SDXL, 8 * GIB)
    assert memory.claim("weights", SDXL, 7 * GIB)

    prompts[0] = 3 * GIB
    assert memory.held["prompts"] == 3 * GIB
    end()
    memory.expect_working("sdxl", 0)
    assert memory.claim("loras", ("sdxl", "a"), 3 * GIB)


def test_what_can_be_had_at_most_is_beside_the_weights_of_the_same_model() -> None:
    memory = account(48)
    memory.record("weights", FLUX, 32 * GIB)
    memory.record("weights", SDXL, 7 * GIB)
    memory.expect_working("flux", 2 * GIB)

    assert memory.most_bytes(("flux", "a LoRA")) == 14 * GIB
    assert memory.most_bytes(("sdxl", "a LoRA")) == 41 * GIB
    assert memory.most_bytes(FLUX) == 46 * GIB  # for a reload of the same weights


def test_eight_loras_of_rank_128_on_flux_are_counted_and_bounded() -> None:
    memory, one = account(48), 2 * 1_046_478_848  # rank 128 on all linears of FLUX, twice
    memory.claim("weights", FLUX, int(31.67 * GIB))
    memory.expect_working("flux", 2 * GIB)

    fitting = [memory.claim("loras", ("flux", index), one) for index in range(8)]

    assert sum(fitting) == 7
    assert sum(memory.held.values()) + memory.working_bytes <= 48 * GIB


def test_without_a_limit_everything_is_counted_and_admitted() -> None:
    memory = account(None)

    assert memory.claim("weights", FLUX, 10**15)
    assert (memory.held["weights"], memory.limit_bytes, memory.most_bytes(FLUX)) == (10**15, None, None)


@given(
    limit=st.integers(0, 100),
    working=st.integers(0, 40),
    calls=st.lists(
        st.tuples(
            st.sampled_from(["weights", "loras"]),
            st.sampled_from("abc"),
            st.integers(0, 3),
            st.integers(0, 60),
        ),
        max_size=40,
    ),
)
def test_the_account_never_admits_beyond_the_limit_and_everything_is_released(
    limit: int, working: int, calls: list[tuple[Any, str, int, int]]
) -> None:
    memory, expected = DeviceMemory(lambda: limit), {}
    memory.expect_working("a", working)

    for part, model, thing, size in calls:
        if memory.claim(part, (model, thing), size):
            expected[part, model, thing] = size
            assert sum(memory.held.values()) + working <= limit or size == 0

        assert sum(memory.held.values()) == sum(expected.values())
    for part, model, thing in expected:
        memory.release(part, (model, thing))
    memory.expect_working("a", 0)

    assert sum(memory.held.values()) == memory.working_bytes == 0


def test_what_a_gpu_has_for_this_process_counts_others_unless_it_is_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
    gpu = torch.device("cuda")

    assert hardware.memory_bytes(gpu, 1.0) == usable_bytes(24 * GIB, 2 * GIB, 1.0)
    assert hardware.memory_bytes(gpu, 1.0, alone=True) == usable_bytes(24 * GIB, 24 * GIB, 1.0)
