"""Intercepts a pipeline's heavy modules, once per loaded model: inside a fiber their calls park."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn

from deployments.engine.call import Seam, make_call
from deployments.engine.fiber import current_fiber
from deployments.engine.stacking import RaggedList

logger = logging.getLogger(__name__)

# VAEs whose encode and decode are pure functions around their submodules `encoder` and `decoder`. Other VAEs
# (Wan's keeps a feature cache on itself between frames) are intercepted at encode and decode and run alone.
STATELESS_VAES = frozenset({"AutoencoderKL", "AutoencoderTiny"})
# modules whose output is a list of one tensor per row
RAGGED_OUTPUT_MODULES = frozenset({"ZImageTransformer2DModel"})


class WeightsInUse(Protocol):
    """Weights of a module that are not always on the device."""

    auxiliary: bool  # calls need so long, or so little of the device, that steps go on beside them

    def call(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What the function of the module returns, which computes with them."""

    def release(self) -> None:
        """Free their memory on the device."""


def intercept(
    modules: Iterable[nn.Module],
    seams: list[Seam] | None = None,
    weights_of: Callable[[nn.Module], WeightsInUse | None] = lambda _module: None,
) -> Callable[[], None]:
    """Let the calls of `modules` park inside a fiber; outside of fibers they pass through.

    seams: a list to which those of the modules are added. weights_of: of a module with such a function,
    those that are not always on the device.
    The function is replaced on the instance, so isinstance checks, config, dtype and hooks of the
    module stay as they were. Returns a function that restores all modules.
    """
    replaced: list[tuple[nn.Module, str]] = []
    for module in modules:
        for part, attribute, mergeable, auxiliary in _seams_of(module):
            if attribute not in vars(part):
                seam = _intercept_seam(
                    part, attribute, weights_of(part), mergeable=mergeable, auxiliary=auxiliary
                )
                if seams is not None:
                    seams.append(seam)
                replaced.append((part, attribute))
        if hasattr(module, "cache_context") and "cache_context" not in vars(module):
            # it would mark a hook registry that all fibers share as "cond" or "uncond"
            _set(module, "cache_context", lambda *_args, **_kwargs: contextlib.nullcontext())
            replaced.append((module, "cache_context"))

    def restore() -> None:
        for part, attribute in replaced:
            vars(part).pop(attribute, None)

    return restore


def _seams_of(module: nn.Module) -> list[tuple[nn.Module, str, bool, bool]]:
    """(module, function name, whether calls may be merged, whether they run on the auxiliary lane)."""
    name = type(module).__name__
    if name in STATELESS_VAES:
        encoder, decoder = module.get_submodule("encoder"), module.get_submodule("decoder")
        return [(encoder, "forward", True, True), (decoder, "forward", True, True)]
    if hasattr(module, "encode") and hasattr(module, "decode"):
        logger.info("the VAE runs one request at a time", extra={"vae": name})
        return [(module, "encode", False, True), (module, "decode", False, True)]
    if hasattr(module, "generate"):
        # a generating language model keeps state on itself from token to token (Qwen2.5-VL's rope_deltas)
        return [(module, "forward", True, False), (module, "generate", False, False)]
    return [(module, "forward", True, False)]


def _intercept_seam(
    module: nn.Module, attribute: str, weights: WeightsInUse | None, *, mergeable: bool, auxiliary: bool
) -> Seam:
    function = getattr(module, attribute)
    parameters = inspect.signature(function).parameters.values()
    positions = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters):
        mergeable = False  # cannot be called by names alone
    optional = frozenset(p.name for p in parameters if p.default is None)
    if type(module).__name__ in RAGGED_OUTPUT_MODULES:
        function = _marks_ragged_output(function)
    if weights is not None:
        function, auxiliary = _with_weights(function, weights), auxiliary or weights.auxiliary
    name, release = f"{type(module).__name__}.{attribute}", None if weights is None else weights.release
    seam = Seam(name, function, positions, mergeable, optional, auxiliary, release)

    @functools.wraps(function)  # pipelines look up which parameters it has
    def park(*args: Any, **kwargs: Any) -> Any:
        fiber = current_fiber()
        if fiber is None:
            try:
                return function(*args, **kwargs)
            finally:
                if release is not None:
                    release()
        if fiber.skipped is not None and seam.name in fiber.skipped:
            return fiber.skipped[seam.name]((*args, *kwargs.values()))
        call = make_call(seam, fiber.keys, args, kwargs)
        call.lora_set, call.exact = fiber.lora_set, fiber.exact
        return fiber.park(call)

    _set(module, attribute, park)
    return seam


def _with_weights(function: Callable[..., Any], weights: WeightsInUse) -> Callable[..., Any]:
    """The function with the weights where it computes; Seam.release frees them."""

    @functools.wraps(function)
    def with_weights(*args: Any, **kwargs: Any) -> Any:
        return weights.call(function, args, kwargs)

    return with_weights


def _marks_ragged_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the list that it returns as a RaggedList."""

    @functools.wraps(function)
    def with_ragged_output(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        if isinstance(output, tuple):
            return (RaggedList(output[0]), *output[1:])
        output.sample = RaggedList(output.sample)
        return output

    return with_ragged_output


def _set(module: nn.Module, attribute: str, value: Callable[..., Any]) -> None:
    # not setattr: nn.Module would register the value, ConfigMixin would rewrite the config
    vars(module)[attribute] = value
