"""Recognises that a device can compute nothing more in this process, such as after an illegal access."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from deployments.engine.fiber import Fiber

# Errors of a call that leave the context usable, as codes (equal for CUDA and HIP) and as texts. All others
# are sticky: every later call of the process fails too, and only a new process helps.
# Source: CUDA Runtime API, cudaError_t: where it says that the process must be terminated and relaunched.
_HARMLESS_CODES = frozenset(
    {
        1,  # invalid value
        2,  # out of memory: see out_of_memory.py
        9,  # invalid configuration
        98,  # invalid device function
        200,  # invalid kernel image
        209,  # no kernel image for this device
        701,  # too many resources requested for a launch
        720,  # cooperative launch too large
        801,  # not supported
    }
)
_HARMLESS = re.compile(
    r"out of memory|invalid argument|invalid configuration|invalid device function"
    r"|(?:kernel image is invalid|no kernel image is available|no binary for GPU)"
    r"|too many resources requested|too many blocks in cooperative launch|not supported",
    re.IGNORECASE,
)
_DEVICE_CALL_FAILED = re.compile(r"\b(?:CUDA|HIP)(?: driver)? error: |Triton Error \[(?:CUDA|HIP)\]: ")
_LIBRARY_FAILED = re.compile(
    r"\b(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|HIPSOLVER|HIPSPARSE)_STATUS_"
    r"(?:EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
    r"|CUFFT_(?:EXEC_FAILED|INTERNAL_ERROR)|miopenStatus(?:InternalError|UnknownError)"
)
_LIBRARY = re.compile(r"\b(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|HIPSOLVER|HIPSPARSE)_STATUS_|\bCUFFT_")


class DeviceBroken(Exception):
    """The device failed in a forward for these fibers; no further call on it can succeed."""

    def __init__(self, fibers: Sequence[Fiber]) -> None:
        super().__init__("the device failed and can compute nothing more in this process")
        self.fibers = tuple(fibers)


def is_device_broken(error: BaseException) -> bool:
    """Whether the error, or one that led to it, says that the device's context is lost."""
    return any(isinstance(one, DeviceBroken) or _is_sticky(one) for one in causes_of(error))


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from or while handling, the latest first.

    Libraries wrap what a device raises: diffusers reports a file that does not fit as one that is damaged.
    """
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _is_sticky(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    text = str(error)
    if isinstance(error, torch.AcceleratorError):
        code = getattr(error, "error_code", None)  # torch sets it on errors that the device reports
        return code not in _HARMLESS_CODES if code is not None else not _HARMLESS.search(text)
    if _LIBRARY.search(text):  # these too begin with "CUDA error: "
        return _LIBRARY_FAILED.search(text) is not None
    return _DEVICE_CALL_FAILED.search(text) is not None and not _HARMLESS.search(text)
