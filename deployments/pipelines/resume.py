"""Stopping denoising loops between two steps, and continuing them on another replica to the same bits.

What a loop of diffusers carries from step to step: latents, the noise scheduler's state and the generators'.
The next replica calls the unmodified pipeline from its beginning. Up to the step of the state its denoiser
and its noise scheduler return at once, and then it gets latents, scheduler and generators of the state
(replay.py). So everything else, such as masks, control pictures and embeddings, is made by the pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from deployments.pipelines.scheduler_state import Tables, UnknownState, encode
from deployments.pipelines.transfers import HostCopy
from deployments.protocol.card import Weights
from deployments.protocol.request import ResolvedRequest

FORMAT = 2


@dataclass(frozen=True, slots=True)
class SavedCall:
    """The state of one picture's or video's pipeline call after a step."""

    step: int  # finished steps
    steps: int  # of all
    pipeline: str  # class names
    scheduler: str
    scheduler_values: Mapping[str, Any]  # as scheduler_state encodes them
    outputs: Mapping[str, Any]  # form of the first output of each denoiser, see replay.py
    generators: int
    device: str  # type of the device of the latents
    tensors: Mapping[str, Tensor]  # latents, generator.<i>, scheduler.<i>


@dataclass(slots=True)
class RunningCall:
    """What the state of a pipeline call is read from while it runs."""

    pipeline: Any
    generators: Sequence[torch.Generator]
    outputs: dict[str, Any]  # see SavedCall
    tables: Tables | None = None


@dataclass(slots=True)
class Progress:
    """How far the denoising of a picture is; updated by its pipeline call after every step."""

    step: int = 0  # finished steps
    latents: Tensor | None = None  # after that step, as the pipeline packs them; never changed in place
    before: int = 0  # steps of another pipeline object that come before its own
    after: int = 0  # and after them
    steps: int = 0  # of all; known after the first
    call: RunningCall | None = None  # None: it has no step yet, or cannot be continued
    saved: SavedCall | None = None  # the state it continues from, until it is there
    # modules whose forwards were shared in batch sizes not proven exact, on this and on earlier replicas
    unproven: frozenset[str] = frozenset()

    @property
    def done(self) -> int:
        """Finished steps, on this or an earlier replica."""
        return self.step if self.saved is None else self.saved.step

    def forget(self) -> None:
        """Start from the beginning."""
        self.step, self.latents, self.call, self.saved, self.unproven = 0, None, None, None, frozenset()


@dataclass(slots=True)
class State:
    """The state of a request's pictures, whose copies to the host may not have been made yet."""

    about: dict[str, Any] = field(default_factory=lambda: {"format": FORMAT, "unproven": [], "pictures": []})
    copies: dict[str, HostCopy | Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """For `restore`. Blocks; call it in a thread."""
        about = torch.tensor(list(json.dumps(self.about).encode()), dtype=torch.uint8)
        tensors = {
            name: (copy.wait() if isinstance(copy, HostCopy) else copy).contiguous()
            for name, copy in self.copies.items()
        }
        return bytes_of(tensors | {"about": about})


def origin_of(weights: Weights) -> str:
    """What must be equal for a state to be continued: the weights, and the libraries that compute."""
    return f"{weights!r}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def capture(pictures: Sequence[Progress], origin: str) -> State | None:
    """The state of all pictures of a request, between two steps of each. Call it on the engine's thread.

    None before the first step of any, and for pipelines that cannot be continued.
    """
    state = State()
    state.about["origin"] = origin
    state.about["unproven"] = sorted(frozenset[str]().union(*(picture.unproven for picture in pictures)))
    for index, picture in enumerate(pictures):
        state.about["pictures"].append(_add(state, f"{index}.", picture))
    return state if any(state.about["pictures"]) else None


def size_bytes(pictures: Sequence[Progress]) -> int:
    """About how many bytes `capture` would return, for the latents and what the noise schedulers keep."""
    total = 0
    for picture in pictures:
        if picture.saved is not None:
            total += sum(tensor.nbytes for tensor in picture.saved.tensors.values())
        elif picture.call is not None and picture.call.tables is not None and picture.latents is not None:
            changed = picture.call.tables.changed(picture.call.pipeline.scheduler)
            total += picture.latents.nbytes + sum(_tensor_bytes(value) for value in changed.values())
    return total


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(item) for item in value)
    return value.nbytes if isinstance(value, Tensor) else 0


def _add(state: State, prefix: str, picture: Progress) -> dict[str, Any] | None:
    """Add the tensors of a picture's state; returns the rest of it, None if it starts from the beginning."""
    if picture.saved is not None:  # not even there yet
        state.copies |= {prefix + name: tensor for name, tensor in picture.saved.tensors.items()}
        return _as_json(picture.saved)
    call, latents = picture.call, picture.latents
    if call is None or call.tables is None or latents is None:
        return None
    copies: dict[str, HostCopy | Tensor] = {"latents": HostCopy(latents)}
    for index, generator in enumerate(call.generators):
        copies[f"generator.{index}"] = generator.get_state()

    def store(tensor: Tensor) -> str:
        name = f"scheduler.{len(copies)}"
        copies[name] = HostCopy(tensor)
        return name

    scheduler = call.pipeline.scheduler
    try:
        values = {name: encode(value, store) for name, value in call.tables.changed(scheduler).items()}
    except UnknownState:
        return None
    state.copies |= {prefix + name: copy for name, copy in copies.items()}
    return _as_json(
        SavedCall(
            picture.step,
            picture.steps,
            type(call.pipeline).__name__,
            type(scheduler).__name__,
            values,
            call.outputs,
            len(call.generators),
            latents.device.type,
            {},
        )
    )


def _as_json(saved: SavedCall) -> dict[str, Any]:
    return {name: getattr(saved, name) for name in SavedCall.__slots__ if name != "tensors"}


def restore(state: bytes, request: ResolvedRequest, origin: str) -> list[Progress] | None:
    """The progress of all pictures from a State's bytes; those without a state start from the beginning.

    None: all of them do, because the state does not match the request or is of another origin.
    """
    try:
        tensors = tensors_of(state)
        about = json.loads(bytes(tensors.pop("about").tolist()))
        if (about["format"], about["origin"]) != (FORMAT, origin):
            return None
        if len(about["pictures"]) != request.num_images:
            return None
        unproven = frozenset(about["unproven"])
        pictures = [
            Progress() if entry is None else Progress(saved=_saved(entry, index, tensors), unproven=unproven)
            for index, entry in enumerate(about["pictures"])
        ]
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return None
    return pictures if any(picture.saved for picture in pictures) else None


def _saved(entry: dict[str, Any], index: int, tensors: Mapping[str, Tensor]) -> SavedCall:
    prefix = f"{index}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if "latents" not in own:
        raise KeyError("latents")
    return SavedCall(**entry, tensors=own)
