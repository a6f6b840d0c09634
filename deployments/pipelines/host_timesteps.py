"""Noise schedulers of models on a GPU: they read their timesteps and draw their noise without waiting for it.

A noise scheduler of diffusers that gets a timestep on the device to look up a table on the host waits for
everything that the GPU still has to do; so does one that copies noise from pageable memory. Here it gets the
same values on the host instead. Pipelines and modules still get timesteps on the device: what they compute
from them would have other bits on the host (division by a number multiplies by its reciprocal on CUDA).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from deployments.pipelines.transfers import upload

# By class, what its set_timesteps places on the device. All of them use the timestep only to find their place
# in tables, but LCM, whose scalings are computed on the device as before.
ON_DEVICE: dict[str, tuple[str, ...]] = {
    "DDIMScheduler": ("timesteps",),
    "DPMSolverMultistepScheduler": ("timesteps",),
    "DPMSolverSinglestepScheduler": ("timesteps",),
    "EulerAncestralDiscreteScheduler": ("timesteps",),
    "EulerDiscreteScheduler": ("timesteps",),
    "FlowMatchEulerDiscreteScheduler": ("timesteps", "sigmas"),
    "FlowMatchHeunDiscreteScheduler": ("timesteps", "sigmas"),
    "FlowMatchLCMScheduler": ("timesteps", "sigmas"),
    "HeunDiscreteScheduler": ("timesteps",),
    "LCMScheduler": ("timesteps",),
    "PNDMScheduler": ("timesteps",),
    "UniPCMultistepScheduler": ("timesteps",),
}
_SCALINGS = "get_scalings_for_boundary_condition_discrete"  # LCM's


def look_up_on_host(scheduler: Any) -> None:
    """Let this noise scheduler (not its class) find its timesteps on the host and upload noise from pinned
    memory. Its results keep their bits. No effect on a class that is not in ON_DEVICE."""
    kind: Any = type(scheduler)
    if kind.__name__ not in ON_DEVICE:
        return
    functions = {
        "set_timesteps": _uploading(kind),
        "step": _looking_up_on_host(kind, _drawing_pinned(kind.step)),
    }
    if hasattr(kind, "scale_model_input"):
        functions["scale_model_input"] = _looking_up_on_host(kind, kind.scale_model_input)
    for name, function in functions.items():
        # bound, so that a copy of the scheduler calls them with itself
        vars(scheduler)[name] = types.MethodType(function, scheduler)


def on_host(scheduler: Any, timestep: Any) -> Any:
    """The timestep on the host, if it is one of this noise scheduler's; else itself."""
    known = vars(scheduler).get("host_timesteps")
    return timestep if known is None else known.of(timestep)


class _HostTimesteps:
    """The values of timesteps on the device."""

    __slots__ = ("_each", "_storage", "on_device", "on_host")

    def __init__(self, on_host: Tensor, on_device: Tensor) -> None:
        self.on_host = on_host
        self.on_device = on_device
        self._each = on_host.unbind()
        self._storage = on_device.untyped_storage()

    def of(self, timestep: Any) -> Any:
        """The same timestep on the host if it is a part of `on_device`, else itself."""
        if not isinstance(timestep, Tensor) or timestep.untyped_storage() is not self._storage:
            return timestep
        if timestep.ndim == 0:
            return self._each[timestep.storage_offset()]
        return self.on_host.as_strided(timestep.shape, timestep.stride(), timestep.storage_offset())


@functools.cache
def _uploading(kind: Any) -> Callable[..., None]:
    """set_timesteps that computes on the host and uploads the result."""
    signature = inspect.signature(kind.set_timesteps)

    @functools.wraps(kind.set_timesteps)  # pipelines inspect its signature for `timesteps` and `sigmas`
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        device = bound.arguments.get("device")
        bound.arguments["device"] = torch.device("cpu")
        kind.set_timesteps(*bound.args, **bound.kwargs)
        on_host = self.timesteps.contiguous()
        if device is not None:
            for name in ON_DEVICE[kind.__name__]:
                setattr(self, name, upload(getattr(self, name), torch.device(device)))
        vars(self)["host_timesteps"] = _HostTimesteps(on_host, self.timesteps)

    return set_timesteps


@functools.cache
def _looking_up_on_host(kind: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`step` or `scale_model_input`, which takes the timestep second, with all timesteps on the host."""

    @functools.wraps(function)  # pipelines inspect the signature of `step` for `eta` and `generator`
    def looking_up_on_host(self: Any, first: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        known = vars(self).get("host_timesteps")
        if known is None or self.timesteps is not known.on_device:  # set by other means than set_timesteps
            return function(self, first, timestep, *args, **kwargs)
        self.timesteps = known.on_host
        if hasattr(kind, _SCALINGS):
            vars(self)[_SCALINGS] = lambda _timestep: getattr(kind, _SCALINGS)(self, timestep)
        try:
            return function(self, first, known.of(timestep), *args, **kwargs)
        finally:
            self.timesteps = known.on_device
            vars(self).pop(_SCALINGS, None)

    return looking_up_on_host


@functools.cache
def _drawing_pinned(function: types.FunctionType) -> Callable[..., Any]:
    """The same function with another `randn_tensor`, whose noise has the same bits.

    Not set in its module: that would change the noise schedulers of everybody in this process.
    """
    names = {**function.__globals__, "randn_tensor": _pinned_noise}
    changed = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(changed, function)


def _pinned_noise(
    shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
) -> Tensor:
    """diffusers' randn_tensor; noise of generators on the host is drawn there, as by diffusers, and uploaded
    without waiting for the device."""
    device = torch.device("cpu" if device is None else device)
    generators = generator if isinstance(generator, list) else [generator]
    if device.type != "cuda" or any(one is None or one.device.type != "cpu" for one in generators):
        drawn: Tensor = randn_tensor(shape, generator, device, dtype, layout)
        return drawn
    return upload(randn_tensor(shape, generator, torch.device("cpu"), dtype, layout), device)
