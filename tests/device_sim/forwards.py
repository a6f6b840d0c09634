"""Measures every execution of a model's heavy modules, for requests and for proofs, with its rows."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from deployments.engine.intercept import STATELESS_VAES
from tests.device_sim.measurements import Measurements


def measure(modules: Iterable[nn.Module], measurements: Measurements) -> None:
    """Have each execution of these modules counted as one forward.

    On their classes: the engine replaces `forward` on the instances and calls the class's own through it.
    """
    for module in modules:
        for kind, method in _methods_of(module):
            function = getattr(kind, method)
            if not hasattr(function, "_sim_measured"):
                setattr(kind, method, _measured(f"{kind.__name__}.{method}", function, measurements))


def _methods_of(module: nn.Module) -> list[tuple[type[nn.Module], str]]:
    """Where the engine intercepts this module: deployments/engine/intercept.py."""
    if type(module).__name__ in STATELESS_VAES:
        return [(type(module.get_submodule(part)), "forward") for part in ("encoder", "decoder")]
    if hasattr(module, "encode") and hasattr(module, "decode"):
        return [(type(module), "encode"), (type(module), "decode")]
    return [(type(module), "forward")]


def _measured(name: str, function: Any, measurements: Measurements) -> Any:
    @functools.wraps(function)  # the engine reads its signature
    def measured(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with measurements.forward(name, _rows(args, kwargs)):
            return function(self, *args, **kwargs)

    measured._sim_measured = True  # type: ignore[attr-defined]
    return measured


def _rows(args: Any, kwargs: Any) -> int:
    """The first dimension of the first tensor, which all these modules take rows in."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    return int(tensors[0].shape[0]) if tensors else 0
