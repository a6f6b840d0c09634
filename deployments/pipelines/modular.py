"""Modular pipelines of diffusers with the interface of its other pipelines.

A Modular pipeline is a tree of blocks over components, and its call takes whatever inputs the blocks name. So
its class says nothing of its parameters: a class is made for each, whose `__call__` has them.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.utils.outputs import BaseOutput

logger = logging.getLogger(__name__)

KEYWORD = inspect.Parameter.KEYWORD_ONLY


@dataclass
class ModularPictures(BaseOutput):
    """What a Modular pipeline made."""

    images: Any = None


@dataclass
class ModularVideos(BaseOutput):
    """What a Modular pipeline made."""

    frames: Any = None


class ModularAdapter:
    """A Modular pipeline; attributes that are not set here are those of it.

    Copies share it. What is set on a copy (a noise scheduler, a tokenizer) is what its call uses.
    """

    _modular: Any

    def __init__(self, modular: Any) -> None:
        vars(self)["_modular"] = modular

    def __getattr__(self, name: str) -> Any:
        if name == "_modular":  # while a copy is made
            raise AttributeError(name)
        return getattr(self._modular, name)

    @property
    def components(self) -> dict[str, Any]:
        """Its components by name, without those that are not loaded."""
        every = {**self._modular.components, **self._own()}
        return {name: every[name] for name in self._modular.components if every[name] is not None}

    def set_progress_bar_config(self, **config: Any) -> None:
        """Of all its loops."""
        for block in _tree(_blocks_of(self._modular)):
            if hasattr(block, "set_progress_bar_config") and hasattr(block, "progress_bar"):
                block.set_progress_bar_config(**config)

    def _own(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_modular"}

    def _run(self, arguments: Mapping[str, Any], guidance_scale: float | None) -> Any:
        modular = copy.copy(self._modular)
        vars(modular).update(self._own())
        guider = modular.components.get("guider")
        if guider is not None:  # it has state
            changes = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
            vars(modular)["guider"] = guider.new(**changes)
        if "videos" in {output.name for output in _blocks_of(modular).outputs}:
            return ModularVideos(frames=modular(**arguments, output="videos"))
        return ModularPictures(images=modular(**arguments, output="images"))


def adapt(modular: Any) -> ModularAdapter:
    """The Modular pipeline as an object whose class has the parameters of its blocks, and `guidance_scale`
    where it has a guider that takes it. Steps that only rewrite inputs are removed from the pipeline if their
    model is not loaded."""
    _leave_out_rewriters(modular)
    inputs = _blocks_of(modular).inputs
    names = [block_input.name for block_input in inputs if block_input.name is not None]
    guider = modular.components.get("guider")
    guided = guider is not None and "guidance_scale" in inspect.signature(type(guider).__init__).parameters
    adapted = type(
        type(modular).__name__,
        (ModularAdapter,),
        {"__call__": _call(dict.fromkeys([*names, *(["guidance_scale"] if guided else [])]), guided)},
    )
    made: ModularAdapter = adapted(modular)
    return made


def _call(names: Mapping[str, None], guided: bool) -> Callable[..., Any]:
    """A `__call__` with these parameters. guided: guidance_scale is for the guider."""

    def call(self: ModularAdapter, **arguments: Any) -> Any:
        scale = arguments.pop("guidance_scale", None) if guided else None
        return self._run(arguments, scale)

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    parameters += [inspect.Parameter(name, KEYWORD, default=None) for name in names]
    vars(call)["__signature__"] = inspect.Signature(parameters)
    return call


def _leave_out_rewriters(modular: Any) -> None:
    """Remove steps that only rewrite inputs (FLUX.3's prompt upsampler), if their model is missing."""
    blocks = getattr(_blocks_of(modular), "sub_blocks", {})
    for name, block in list(blocks.items()):
        unloaded = [
            spec.name for spec in block.expected_components if modular.components.get(spec.name) is None
        ]
        inputs = {block_input.name for block_input in block.inputs}
        if unloaded and {output.name for output in block.intermediate_outputs} <= inputs:
            logger.warning(
                "a step of the pipeline is left out, because the weights have no model for it",
                extra={"step": name, "models": unloaded},
            )
            del blocks[name]


def _blocks_of(modular: Any) -> Any:
    return modular._blocks  # noqa: SLF001  its public name gives a copy


def _tree(block: Any) -> Iterator[Any]:
    yield block
    for inner in getattr(block, "sub_blocks", {}).values():
        yield from _tree(inner)
