"""What forwards take, as measured, and how many rows therefore fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.models.activations import MAX_ROWS, SAMPLES, Activations
from deployments.models.device_memory import GIB, DeviceMemory
from deployments.models.hardware import PeakMeter
from deployments.planning.device_limit import usable_bytes

MIB = 2**20


def measured(lane: str, base: int, per_row: int, *batch_sizes: int) -> Activations:
    """Forwards of one key that take `base` and `per_row` for each row."""
    made = Activations()
    for rows in batch_sizes:
        made.record(lane, "key", rows, base + rows * per_row)  # type: ignore[arg-type]
    return made


# GiB of a GPU, of weights, of one row and of decoding one picture, as counted on real shapes
@pytest.mark.parametrize(
    ("total", "weights", "row", "decode", "rows"),
    [
        (48, 31.67, 0.45, 1.88, 23),  # FLUX.1-dev
        (80, 31.67, 0.45, 1.88, MAX_ROWS),
        (24, 6.46, 0.155, 1.88, MAX_ROWS),  # SDXL
        (12, 6.46, 0.155, 1.88, 15),
        (8, 1.99, 0.1, 0.47, 42),  # SD 1.5
    ],
)
def test_rows_follow_from_the_memory_of_the_device(
    total: int, weights: float, row: float, decode: float, rows: int
) -> None:
    memory = DeviceMemory(lambda: usable_bytes(total * GIB, total * GIB, 1.0))
    before = int(weights * GIB)
    memory.record("weights", ("model", "pipeline"), before)
    memory.record_forward("auxiliary", "decoder", 1, before=before, peak=before + int(decode * GIB))

    for size in (1, 2, 4, 8, 16, 32):
        limit = memory.rows_that_fit("denoiser")
        if limit is not None and limit < size:
            break
        memory.record_forward("steps", "denoiser", size, before=before, peak=before + int(size * row * GIB))

    assert memory.rows_that_fit("denoiser") == rows
    assert before + (rows * row + decode) * GIB <= usable_bytes(total * GIB, total * GIB, 1.0)


def test_loras_and_caches_take_their_rows() -> None:
    memory = DeviceMemory(lambda: 40 * GIB)
    for rows in (1, 16):
        memory.record_forward("steps", "denoiser", rows, before=0, peak=rows * GIB)
    assert memory.rows_that_fit("denoiser") == 32

    memory.record("loras", ("model", "a"), 28 * GIB)
    assert memory.rows_that_fit("denoiser") == 10

    memory.release("loras", ("model", "a"))
    assert memory.rows_that_fit("denoiser") == 32


def test_what_running_requests_hold_counts_as_found() -> None:
    memory = DeviceMemory(lambda: 40 * GIB)
    memory.record("weights", ("model", "pipeline"), 20 * GIB)

    memory.record_forward("steps", "denoiser", 1, before=23 * GIB, peak=24 * GIB)

    assert memory.held["requests"] == 3 * GIB


def test_nothing_is_known_before_a_forward_and_without_a_limit() -> None:
    assert DeviceMemory(lambda: 40 * GIB).rows_that_fit("denoiser") is None

    unlimited = DeviceMemory(lambda: None)
    unlimited.record_forward("steps", "denoiser", 1, before=0, peak=GIB)
    assert unlimited.rows_that_fit("denoiser") is None


def test_a_call_alone_is_never_refused() -> None:
    memory = DeviceMemory(lambda: GIB)
    memory.record_forward("steps", "denoiser", 1, before=0, peak=2 * GIB)

    assert memory.rows_that_fit("denoiser") == 1


def test_the_least_of_several_measurements_counts_and_then_it_is_measured_no_more() -> None:
    subject = Activations()

    for peak in (9, 5, 7):
        assert subject.wants("key", 4)
        subject.record("steps", "key", 4, peak)

    assert subject.largest("steps") == 5
    assert not subject.wants("key", 4)
    assert subject.wants("key", 8)


def test_a_forward_beside_another_counts_until_one_ran_alone() -> None:
    subject = Activations()
    for _ in range(SAMPLES):
        subject.record("steps", "key", 1, 6 * GIB, alone=False)

    assert subject.rows_that_fit("key", 7 * GIB) == 1
    assert subject.largest("steps") == 0
    assert subject.wants("key", 1)

    subject.record("steps", "key", 1, GIB)
    assert subject.rows_that_fit("key", 7 * GIB) == 2


@given(
    base=st.integers(0, 4 * GIB),
    per_row=st.integers(MIB, 2 * GIB),
    sizes=st.lists(st.integers(1, 32), min_size=1, max_size=5),
    free=st.integers(0, 100 * GIB),
)
def test_rows_that_fit_never_take_more_than_is_free(
    base: int, per_row: int, sizes: list[int], free: int
) -> None:
    rows = measured("steps", base, per_row, *sizes).rows_that_fit("key", free)

    assert rows is not None
    assert rows == 1 or base + rows * per_row <= free or (len(set(sizes)) == 1 and rows < sizes[0])
    assert rows <= min(MAX_ROWS, 2 * max(sizes))


class Allocator:
    """What torch says of its allocator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, _device: object) -> None:
        self.peak = self.now

    def use(self, size_bytes: int) -> None:
        """Allocate and free so many bytes."""
        self.peak = max(self.peak, self.now + size_bytes)


def test_the_meter_records_the_peak_of_a_forward_that_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, memory = Allocator(monkeypatch), DeviceMemory(lambda: 40 * GIB)
    meter = PeakMeter(torch.device("cuda"), memory)
    allocator.use(30 * GIB)  # before

    started = meter.start("denoiser", 2)
    allocator.use(3 * GIB)
    meter.stop(started, "steps", "denoiser", 2)

    assert memory.activation_bytes == 3 * GIB


def test_the_meter_separates_forwards_that_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, memory = Allocator(monkeypatch), DeviceMemory(lambda: 40 * GIB)
    meter = PeakMeter(torch.device("cuda"), memory)

    decode = meter.start("decoder", 1)
    step = meter.start("denoiser", 2)
    allocator.use(9 * GIB)
    meter.stop(step, "steps", "denoiser", 2)
    meter.stop(decode, "auxiliary", "decoder", 1)

    assert memory.activation_bytes == 0  # neither ran alone
    assert memory.wants_measurement("decoder", 1)


def test_a_failed_forward_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, memory = Allocator(monkeypatch), DeviceMemory(lambda: 40 * GIB)
    meter = PeakMeter(torch.device("cuda"), memory)

    started = meter.start("denoiser", 2)
    allocator.use(3 * GIB)
    meter.stop(started, "steps", "denoiser", 0)
    meter.stop(meter.start("denoiser", 1), "steps", "denoiser", 1)

    assert memory.activation_bytes == 0
    assert memory.rows_that_fit("denoiser") == 2
