"""Whether two ways to compute the same products always give the same bits, tried with noise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from deployments.engine.device_errors import is_device_broken
from deployments.engine.out_of_memory import free_device_memory

# In float32 another order of summation shows in every other value, so a few trials show it in any of them.
# Rounding to 16 bits hides it in all but one value of some 50,000.
WIDE_TRIALS = 8
COMPARED_16_BIT = 2**20  # values
MAX_TRIALS = 64

logger = logging.getLogger(__name__)

Pairs = Iterable[tuple[Tensor, Tensor]]


def have_same_bits(what: str, trial: Callable[[], Pairs]) -> bool:
    """Whether all pairs of all trials are equal, in as many values as a proof needs.

    what: for the log. trial: computes both ways on new noise; pairs of tensors of one type. What is too small
    to compare enough values in MAX_TRIALS counts as not proven, and so does a trial that fails, for want of
    memory for example. Raises what a trial raises if the device is broken.
    """
    compared, is_wide = 0, False
    try:
        for count in range(1, MAX_TRIALS + 1):
            for one, other in trial():
                if not torch.equal(one, other):
                    return False
                compared += one.numel()
                is_wide = one.element_size() > 2
            if count >= WIDE_TRIALS if is_wide else compared >= COMPARED_16_BIT:
                return True
    except Exception as error:
        if is_device_broken(error):
            raise
        logger.info("a trial of a product failed; it is not used", extra={"what": what, "error": repr(error)})
        error.__traceback__ = None  # its frames keep the trial's tensors
    else:
        return False
    free_device_memory()
    return False
