"""Which kernels compute attention in a denoiser: one of diffusers' backends, tried before it is used."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from torch import nn

from deployments.protocol.errors import ModelFailed

logger = logging.getLogger(__name__)

# those that diffusers downloads as compiled code are left out: this service runs no code of others
BACKENDS = tuple(one.value for one in AttentionBackendName if not one.value.endswith("_hub"))
TRIAL = (1, 32, 2, 64)  # rows, tokens, heads, width of a head


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ModelFailed naming the backends that work on this device, unless this one does."""
    failure = _failure_of(name, device, dtype)
    if failure is None:
        return
    working = [one for one in BACKENDS if _failure_of(one, device, dtype) is None]
    raise ModelFailed(
        f"attention {name!r} does not work here: {failure}; write one of {', '.join(working)} in the card, "
        "or leave attention out for torch's own choice"
    )


def set_attention(name: str, denoisers: Iterable[nn.Module]) -> None:
    """Have these modules, and no other model of the process, compute attention with this backend.

    A module that has no choice is logged: diffusers computes attention in a UNet as torch chooses.
    """
    for denoiser in denoisers:
        processors = [getattr(part, "processor", None) for part in denoiser.modules()]
        choosing = [one for one in processors if hasattr(one, "_attention_backend")]
        if not choosing:
            extra = {"module": type(denoiser).__name__, "attention": name}
            logger.warning("this module has no choice of attention: torch chooses", extra=extra)
        for processor in choosing:
            # not set_attention_backend, which sets it for every model of the process, too
            processor._attention_backend = AttentionBackendName(name)  # type: ignore[union-attr]  # noqa: SLF001


def _failure_of(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot compute attention on the device; None: it can."""
    if name not in BACKENDS:
        return "it is not one of diffusers' backends that are here"
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))  # names a package that is missing
        tokens = torch.zeros(TRIAL, device=device, dtype=dtype)
        with torch.inference_mode():
            dispatch_attention_fn(tokens, tokens, tokens, backend=AttentionBackendName(name))
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]
    return None
