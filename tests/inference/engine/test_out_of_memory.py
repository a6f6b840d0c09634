"""A lack of memory is recognised in every spelling, and its answer says how much was missing."""

from __future__ import annotations

import errno

import pytest
import torch
from torch import nn

from deployments.engine.call import ModuleCall, Seam
from deployments.engine.out_of_memory import as_out_of_memory, in_gib, is_out_of_memory, shortage

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.68 GiB of which "
    "1.12 GiB is free."
)


def with_code(text: str, code: int) -> torch.AcceleratorError:
    error = torch.AcceleratorError(text)
    error.error_code = code  # type: ignore[attr-defined]
    return error


def wrapped_in(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


TOO_LITTLE = {
    "torch on CUDA": torch.OutOfMemoryError(CUDA),
    "torch on HIP": torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB."),
    "the host": MemoryError(),
    "a message only": RuntimeError(CUDA),
    "the runtime": with_code("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'", 2),
    "the runtime without a code": torch.AcceleratorError("CUDA error: out of memory"),
    "the runtime of HIP": with_code("HIP error: out of memory", 2),
    "the driver": RuntimeError("CUDA driver error: out of memory"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuBLAS's start": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
    "cuSOLVER": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN's workspace": RuntimeError("cuDNN: not enough workspace for this convolution"),
    "cuFFT": RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    "hipBLAS": RuntimeError("HIP error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate`"),
    "MIOpen": RuntimeError("miopenStatusAllocFailed"),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB, other allocations: 1 MB)."),
    "XPU": RuntimeError("level_zero backend failed with error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    "torch's allocator on Linux": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 4096000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "torch's allocator on Windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to "
        "allocate 4096000000000 bytes."
    ),
    "C++": RuntimeError("std::bad_alloc"),
    "a file that is mapped": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "wrapped by a loader": wrapped_in(OSError("Unable to load weights"), MemoryError()),
}
OTHER = {
    "a shape": RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
    "another process": RuntimeError("NCCL error: unhandled cuda error, Cuda failure 'out of memory'"),
    "a broken device": with_code("CUDA error: an illegal memory access was encountered", 700),
    "a failed cuBLAS call": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"),
    "a failed cuDNN call": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    "an unsupported cuDNN call": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    "an argument": ValueError("out of memory is no valid scheduler"),
    "a missing file": FileNotFoundError(errno.ENOENT, "No such file"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("error", TOO_LITTLE.values(), ids=TOO_LITTLE)
def test_every_spelling_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER.values(), ids=OTHER)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_torch_really_says_so_on_this_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)

    assert is_out_of_memory(caught.value)
    assert shortage(caught.value) == " (4194304.0 GiB needed)"


def test_the_answer_names_the_module_the_rows_and_the_bytes() -> None:
    call = ModuleCall(Seam("Decoder.forward", nn.Identity(), ("sample",)), {}, 3, None)

    error = as_out_of_memory(call, torch.OutOfMemoryError(CUDA))

    assert error.message == (
        "the device ran out of memory in Decoder.forward with 3 rows (2.5 GiB needed); "
        "ask for fewer pictures or a smaller size"
    )
    assert not error.retryable


def test_what_is_known_of_the_size_counts_more_than_the_allocation_that_failed() -> None:
    assert shortage(torch.OutOfMemoryError(CUDA), 12 * 2**30) == " (12.0 GiB needed)"
    assert shortage(ValueError()) == ""


def test_small_sizes_are_in_mib() -> None:
    assert [in_gib(size) for size in (2**20, 300 * 2**20, 2**30)] == ["1 MiB", "300 MiB", "1.0 GiB"]
