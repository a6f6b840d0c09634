"""Intercepts a pipeline's heavy modules, once per loaded model: inside a fiber their calls park."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

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


def intercept(modules: Iterable[nn.Module], seams: list[Seam] | None = None) -> Callable[[], None]:
    """Let the calls of `modules` park inside a fiber; outside of fibers they pass through.

    seams: a list to which those of the modules are added.
    The function is replaced on the instance, so isinstance checks, config, dtype and hooks of the
    module stay as they were. Returns a function that restores all modules.
    """
    replaced: list[tuple[nn.Module, str]] = []
    for module in modules:
        for part, attribute, mergeable, auxiliary in _seams_of(module):
            if attribute not in vars(part):
                seam = _intercept_seam(part, attribute, mergeable=mergeable, auxiliary=auxiliary)
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


def _intercept_seam(module: nn.Module, attribute: str, *, mergeable: bool, auxiliary: bool) -> Seam:
    function = getattr(module, attribute)
    parameters = inspect.signature(function).parameters.values()
    positions = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters):
        mergeable = False  # cannot be called by names alone
    optional = frozenset(p.name for p in parameters if p.default is None)
    if type(module).__name__ in RAGGED_OUTPUT_MODULES:
        function = _marks_ragged_output(function)
    seam = Seam(f"{type(module).__name__}.{attribute}", function, positions, mergeable, optional, auxiliary)

    def park(*args: Any, **kwargs: Any) -> Any:
        fiber = current_fiber()
        if fiber is None:
            return function(*args, **kwargs)
        call = make_call(seam, fiber.keys, args, kwargs)
        call.lora_set, call.exact = fiber.lora_set, fiber.exact
        return fiber.park(call)

    _set(module, attribute, park)
    return seam


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
