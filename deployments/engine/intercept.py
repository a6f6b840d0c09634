"""Where fibers park: the seams of a pipeline's heavy modules, cut once per loaded model."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from deployments.engine.call import Entries, Seam, make_call
from deployments.engine.fiber import current_fiber

logger = logging.getLogger(__name__)

# VAEs whose encode and decode are pure functions of their input around these two submodules. Others
# (Wan's keeps a feature cache on itself between frames) are cut at encode/decode and run alone.
PLAIN_VAES = frozenset({"AutoencoderKL", "AutoencoderTiny"})
# They answer with a list of one tensor per picture.
LISTING_MODULES = frozenset({"ZImageTransformer2DModel"})


def intercept(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Cut the seams of `modules`: inside a fiber their calls park, elsewhere they pass through.

    The function is replaced on the instance, so isinstance checks, config, dtype and hooks of the
    module stay as they were. Returns a function that undoes it all.
    """
    cuts: list[tuple[nn.Module, str]] = []
    for module in modules:
        for part, attribute, mergeable, aside in _seams_of(module):
            if attribute not in vars(part):
                _cut(part, attribute, mergeable, aside)
                cuts.append((part, attribute))
        if hasattr(module, "cache_context") and "cache_context" not in vars(module):
            # it marks a shared hook registry as "cond" or "uncond" while other fibers run in between
            _set(module, "cache_context", lambda *_args, **_kwargs: contextlib.nullcontext())
            cuts.append((module, "cache_context"))

    def restore() -> None:
        for part, attribute in cuts:
            vars(part).pop(attribute, None)

    return restore


def _seams_of(module: nn.Module) -> list[tuple[nn.Module, str, bool, bool]]:
    """(module, function name, whether its calls may be merged, whether they are computed aside)."""
    name = type(module).__name__
    if name in PLAIN_VAES:
        encoder, decoder = module.get_submodule("encoder"), module.get_submodule("decoder")
        return [(encoder, "forward", True, True), (decoder, "forward", True, True)]
    if hasattr(module, "encode") and hasattr(module, "decode"):
        logger.info("the VAE runs one request at a time", extra={"vae": name})
        return [(module, "encode", False, True), (module, "decode", False, True)]
    if hasattr(module, "generate"):
        # a language model that writes keeps notes on itself (Qwen2.5-VL's rope_deltas) from token to token
        return [(module, "forward", True, False), (module, "generate", False, False)]
    return [(module, "forward", True, False)]


def _cut(module: nn.Module, attribute: str, mergeable: bool, aside: bool) -> None:
    function = getattr(module, attribute)
    parameters = inspect.signature(function).parameters.values()
    positions = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters):
        mergeable = False  # cannot be called by names alone
    optional = frozenset(p.name for p in parameters if p.default is None)
    if type(module).__name__ in LISTING_MODULES:
        function = _listing(function)
    seam = Seam(f"{type(module).__name__}.{attribute}", function, positions, mergeable, optional, aside)

    def parks(*args: Any, **kwargs: Any) -> Any:
        fiber = current_fiber()
        if fiber is None:
            return function(*args, **kwargs)
        call = make_call(seam, fiber, args, kwargs)
        call.owner = fiber.owner
        return fiber.park(call)

    _set(module, attribute, parks)


def _listing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its list of pictures marked as one."""

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        if isinstance(output, tuple):
            return (Entries(output[0]), *output[1:])
        output.sample = Entries(output.sample)
        return output

    return marked


def _set(module: nn.Module, attribute: str, value: Callable[..., Any]) -> None:
    vars(module)[attribute] = value  # past nn.Module.__setattr__: no registration, no config rewrite
