"""What a noise scheduler of diffusers keeps from step to step, as plain values and tensors.

Everything that `step` changes on the object after `set_timesteps` has filled its tables: its place in them,
and of multistep methods the earlier outputs of the model and the earlier sample.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

SCALARS = (type(None), bool, int, float, str)
NOT_STATE = frozenset({"_internal_dict", "host_timesteps"})  # the config, and a copy of the timesteps


class UnknownState(Exception):
    """A value of the noise scheduler that cannot be written down."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What the noise scheduler had after its `set_timesteps`."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, scheduler: Any) -> Tables:
        return cls(dict(vars(scheduler)))

    def changed(self, scheduler: Any) -> dict[str, Any]:
        """What `step` has set since then, by name; lists always, because they are changed in place."""
        missing = object()
        return {
            name: value
            for name, value in vars(scheduler).items()
            if name not in NOT_STATE
            and not isinstance(value, types.FunctionType | types.MethodType)
            and (isinstance(value, list) or value is not self.values.get(name, missing))
        }


def watch_tables(scheduler: Any, keep: Callable[[Tables], None]) -> None:
    """Have `keep` called with the tables of this noise scheduler (not its class) whenever they are filled."""
    set_timesteps = scheduler.set_timesteps

    def watched(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        keep(Tables.of(scheduler))

    watched.__wrapped__ = set_timesteps  # type: ignore[attr-defined]  # pipelines inspect its signature
    vars(scheduler)["set_timesteps"] = watched


def encode(value: Any, store: Callable[[Tensor], str]) -> Any:
    """The value for JSON. store: takes a tensor and returns its name. Raises UnknownState."""
    if isinstance(value, Tensor):
        return {"tensor": store(value), "host": value.device.type == "cpu"}
    if type(value) in SCALARS:
        return value
    if type(value) is list:
        return [encode(item, store) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, store) for item in value]}
    raise UnknownState(f"a value of type {type(value).__name__}")


def decode(value: Any, load: Callable[[str, bool], Tensor]) -> Any:
    """The value that `encode` wrote. load: the tensor of this name, on the host or on the device."""
    if isinstance(value, list):
        return [decode(item, load) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return load(value["tensor"], value["host"])
        return tuple(decode(item, load) for item in value["tuple"])
    return value
