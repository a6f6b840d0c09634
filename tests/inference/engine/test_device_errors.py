"""A broken device is distinguished from a failed call and from a lack of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.device_errors import DeviceBroken, causes_of, is_device_broken
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.out_of_memory import is_out_of_memory
from tests.inference.engine.together import Together


def accelerator_error(text: str, code: int | None = None) -> torch.AcceleratorError:
    """As torch raises it: with the code that the device gave."""
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


BROKEN = [
    accelerator_error("CUDA error: an illegal memory access was encountered\nSearch for `cudaError", 700),
    accelerator_error("CUDA error: an illegal memory access was encountered"),
    accelerator_error("CUDA error: device-side assert triggered", 710),
    accelerator_error("CUDA error: unspecified launch failure", 719),
    accelerator_error("CUDA error: uncorrectable ECC error encountered", 214),
    accelerator_error("CUDA error: the launch timed out and was terminated", 702),
    accelerator_error("CUDA error: unknown error", 999),
    accelerator_error("HIP error: an illegal memory access was encountered", 700),
    accelerator_error("HIP error: unspecified launch failure"),
    RuntimeError("CUDA error: misaligned address"),
    RuntimeError("CUDA driver error: device-side assert triggered"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasCreate(handle)`"),
    RuntimeError("HIP error: HIPBLAS_STATUS_INTERNAL_ERROR when calling `hipblasSgemm`"),
    RuntimeError("cuFFT error: CUFFT_EXEC_FAILED"),
]
USABLE = [
    accelerator_error("CUDA error: out of memory", 2),
    accelerator_error("CUDA error: out of memory"),
    accelerator_error("CUDA error: invalid configuration argument", 9),
    accelerator_error("CUDA error: invalid argument"),
    accelerator_error("CUDA error: no kernel image is available for execution on the device", 209),
    accelerator_error("CUDA error: too many resources requested for launch", 701),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
    RuntimeError("Expected all tensors to be on the same device, but found cpu and cuda:0"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ValueError("CUDA error: an illegal memory access was encountered"),
    MemoryError(),
]


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: str(error).splitlines()[0][:60])
def test_an_error_after_which_no_call_can_succeed_is_a_broken_device(error: Exception) -> None:
    assert is_device_broken(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", USABLE, ids=lambda error: str(error).splitlines()[:1] or "MemoryError")
def test_an_error_of_one_call_is_none(error: Exception) -> None:
    assert not is_device_broken(error)


def test_what_a_library_wraps_is_found() -> None:
    device = accelerator_error("CUDA error: unspecified launch failure", 719)
    wrapped = OSError("Unable to load weights")
    wrapped.__cause__ = ValueError("unreadable")
    wrapped.__cause__.__context__ = device

    assert list(causes_of(wrapped)) == [wrapped, wrapped.__cause__, device]
    assert is_device_broken(wrapped)


def test_an_error_raised_from_none_hides_what_came_before() -> None:
    error = ValueError("of its own")
    error.__context__ = accelerator_error("CUDA error: unspecified launch failure", 719)
    error.__suppress_context__ = True

    assert not is_device_broken(error)


class Breaking(nn.Module):
    """x + 1, until the device breaks; notes how many forwards began."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks = False
        self.forwards = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.forwards += 1
        if self.breaks:
            raise accelerator_error("CUDA error: an illegal memory access was encountered", 700)
        return hidden_states + 1


class AutoencoderKL(nn.Module):
    """Named as the VAE whose decoder runs on the auxiliary lane."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), Breaking()


@pytest.fixture
def denoiser() -> Iterator[Breaking]:
    module = Breaking()
    restore = intercept([module])
    yield module
    restore()


def call(module: nn.Module) -> Callable[[], Tensor]:
    def pipeline() -> Tensor:
        output: Tensor = module(torch.zeros(1, 2))
        return output

    return pipeline


def run_out(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


@torch.inference_mode()
def test_a_broken_device_ends_the_engine_and_no_call_is_tried_again(denoiser: Breaking) -> None:
    engine = Engine(Together(8))
    fibers = [Fiber(call(denoiser)) for _ in range(3)]
    for fiber in fibers:
        engine.start(fiber)
    denoiser.breaks = True

    with pytest.raises(DeviceBroken) as caught:
        engine.step()

    assert denoiser.forwards == 1
    assert set(caught.value.fibers) == set(fibers)
    assert is_device_broken(caught.value)


@torch.inference_mode()
def test_a_device_that_breaks_on_the_auxiliary_lane_ends_the_engine_too() -> None:
    vae = AutoencoderKL()
    vae.decoder.breaks = True
    restore = intercept([vae])
    engine = Engine(Together(8), auxiliary_lane=True)
    fiber = Fiber(call(vae.decoder))
    engine.start(fiber)

    with pytest.raises(DeviceBroken) as caught:
        run_out(engine)

    engine.close()
    restore()
    assert caught.value.fibers == (fiber,)
