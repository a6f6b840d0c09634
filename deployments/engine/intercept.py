"""Where fibers park: the seams of a pipeline's heavy modules, cut once per loaded model."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from deployments.engine.call import RaggedList, Seam, make_call
from deployments.engine.fiber import current_fiber

logger = logging.getLogger(__name__)

# VAEs whose encode and decode are pure functions of their input around these two submodules. Others
# (Wan's keeps a feature cache on itself between frames) are cut at encode/decode and run alone.
STATELESS_VAES = frozenset({"AutoencoderKL", "AutoencoderTiny"})
# They answer with a list of one tensor per picture.
RAGGED_OUTPUT_MODULES = frozenset({"ZImageTransformer2DModel"})


def intercept(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Cut the seams of `modules`: inside a fiber their calls park, elsewhere they pass through.

    The function is replaced on the instance, so isinstance checks, config, dtype and hooks of the
    module stay as they were. Returns a function that undoes it all.
    """
    replaced: list[tuple[nn.Module, str]] = []
    for module in modules:
        for part, attribute, mergeable, auxiliary_lane in _seams_of(module):
            if attribute not in vars(part):
                _intercept_seam(part, attribute, mergeable, auxiliary_lane)
                replaced.append((part, attribute))
        if hasattr(module, "cache_context") and "cache_context" not in vars(module):
            # it marks a shared hook registry as "cond" or "uncond" while other fibers run in between
            _set(module, "cache_context", lambda *_args, **_kwargs: contextlib.nullcontext())
            replaced.append((module, "cache_context"))

    def restore() -> None:
        for part, attribute in replaced:
            vars(part).pop(attribute, None)

    return restore


def _seams_of(module: nn.Module) -> list[tuple[nn.Module, str, bool, bool]]:
    """(module, function name, whether its calls may be merged, whether they are computed aside)."""
    name = type(module).__name__
    if name in STATELESS_VAES:
        encoder, decoder = module.get_submodule("encoder"), module.get_submodule("decoder")
        return [(encoder, "forward", True, True), (decoder, "forward", True, True)]
    if hasattr(module, "encode") and hasattr(module, "decode"):
        logger.info("the VAE runs one request at a time", extra={"vae": name})
        return [(module, "encode", False, True), (module, "decode", False, True)]
    if hasattr(module, "generate"):
        # a language model that writes keeps notes on itself (Qwen2.5-VL's rope_deltas) from token to token
        return [(module, "forward", True, False), (module, "generate", False, False)]
    return [(module, "forward", True, False)]


def _intercept_seam(module: nn.Module, attribute: str, mergeable: bool, auxiliary_lane: bool) -> None:
    function = getattr(module, attribute)
    parameters = inspect.signature(function).parameters.values()
    positions = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters):
        mergeable = False  # cannot be called by names alone
    optional = frozenset(p.name for p in parameters if p.default is None)
    if type(module).__name__ in RAGGED_OUTPUT_MODULES:
        function = _marks_ragged_output(function)
    seam = Seam(
        f"{type(module).__name__}.{attribute}", function, positions, mergeable, optional, auxiliary_lane
    )

    def park(*args: Any, **kwargs: Any) -> Any:
        fiber = current_fiber()
        if fiber is None:
            return function(*args, **kwargs)
        call = make_call(seam, fiber, args, kwargs)
        call.lora_set = fiber.lora_set
        return fiber.park(call)

    _set(module, attribute, park)


def _marks_ragged_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its list of pictures marked as one."""

    @functools.wraps(function)
    def with_ragged_output(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        if isinstance(output, tuple):
            return (RaggedList(output[0]), *output[1:])
        output.sample = RaggedList(output.sample)
        return output

    return with_ragged_output


def _set(module: nn.Module, attribute: str, value: Callable[..., Any]) -> None:
    vars(module)[attribute] = value  # past nn.Module.__setattr__: no registration, no config rewrite
