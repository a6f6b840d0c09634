"""Recognises that memory ran out, in whatever words; frees what can be freed; says how much was missing."""

from __future__ import annotations

import errno
import gc
import logging
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from deployments.engine.call import ModuleCall
from deployments.engine.device_errors import causes_of, is_device_broken
from deployments.protocol.errors import OutOfMemory

T = TypeVar("T")

GIB = 2**30

logger = logging.getLogger(__name__)

_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, hipErrorOutOfMemory
_WORDS = re.compile(
    r"out of memory"  # CUDA, HIP, XPU, MPS, the drivers and Triton
    r"|can't allocate memory|not enough memory: you tried to allocate"  # torch's allocators on the CPU
    r"|cannot allocate memory|std::bad_alloc"
    r"|\b(?:CU|HIP)(?:BLAS|SOLVER|SPARSE)_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)"  # too little for a handle
    r"|CUDNN_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)|CUFFT_ALLOC_FAILED"
    r"|not enough workspace|workspace allocation failed"
    r"|rocblas_status_memory_error|miopenStatusAllocFailed|UR_RESULT_ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY",
    re.IGNORECASE,
)
_ASKED_FOR = re.compile(
    r"tried to allocate (?P<value>[\d.]+) ?(?P<unit>bytes|B|KiB|MiB|GiB|KB|MB|GB)\b", re.IGNORECASE
)
_UNITS = {"b": 1, "bytes": 1, "kib": 2**10, "kb": 2**10, "mib": 2**20, "mb": 2**20, "gib": GIB, "gb": GIB}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that led to it, says that a device or the host had too little memory."""
    return any(_says_out_of_memory(one) for one in causes_of(error))


def as_out_of_memory(call: ModuleCall, error: Exception) -> OutOfMemory:
    """The error for the request whose call did not fit even alone."""
    wrapped = OutOfMemory(
        f"the device ran out of memory in {call.seam.name} with {call.batch_size} rows"
        f"{shortage(error)}; ask for fewer pictures or a smaller size"
    )
    wrapped.__cause__ = error
    return wrapped


def load_or_free(
    what: str,
    load: Callable[[], T],
    needed_bytes: int | None = None,
    *,
    cure: str,
    param: str | None = None,
) -> T:
    """What `load` returns. A lack of memory frees what was half loaded, so that it may be tried again.

    what: for the caller, such as "the ControlNet models/x". needed_bytes: its size, None if it is not known.
    cure: what the caller or the operator can do. param: the field of the request that asks for it.
    Raises OutOfMemory with all of it. Not a context manager: the frame of its caller would keep the parts.
    """
    try:
        return load()
    except Exception as error:
        if not is_out_of_memory(error) or is_device_broken(error):
            raise
        # not exc_info, whose frames keep what was loaded
        logger.warning("memory ran out while loading", extra={"what": what, "error": str(error)})
        missing = shortage(error, needed_bytes)
        failure = OutOfMemory(f"{what} does not fit into the memory{missing}; {cure}", param=param)
        for one in causes_of(error):
            one.__traceback__ = None
    gc.collect()  # modules and their hooks refer to each other
    free_device_memory()
    raise failure


def shortage(error: BaseException, needed_bytes: int | None = None) -> str:
    """ " (2.0 GiB needed, 0.4 of 24.0 GiB free)", as far as it is known; empty where nothing is.

    needed_bytes: what was to be placed; None takes what the error says was tried to allocate.
    """
    needed = needed_bytes or _asked_for(error)
    parts = [] if needed is None else [f"{in_gib(needed)} needed"]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        parts.append(f"{in_gib(free)} of {in_gib(total)} free")
    return f" ({', '.join(parts)})" if parts else ""


def in_gib(size_bytes: int) -> str:
    """Bytes for a reader: "1.5 GiB", "12 MiB"."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB / 2 else f"{size_bytes / 2**20:.3g} MiB"


def free_device_memory() -> None:
    """Return cached memory to the device.

    Raises torch.AcceleratorError on a device that is broken: some libraries report that as a lack of memory.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    if isinstance(error, torch.AcceleratorError) and hasattr(error, "error_code"):
        return bool(error.error_code == _CUDA_OUT_OF_MEMORY)
    text = str(error)
    return "NCCL" not in text and _WORDS.search(text) is not None  # NCCL's may be of another process


def _asked_for(error: BaseException) -> int | None:
    """The bytes that could not be allocated, where a message has them."""
    for one in causes_of(error):
        found = _ASKED_FOR.search(str(one))
        if found is not None:
            return int(float(found["value"]) * _UNITS[found["unit"].lower()])
    return None
