"""What else may be on the device beside a model: ControlNets, the refiner, models of its group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deployments.planning.gguf_needs import gguf_needs
from deployments.planning.part_plan import DTYPE_BYTES, MILLION, planned_part
from deployments.protocol.card import Dtype, ModelCard
from deployments.protocol.errors import ModelFailed
from deployments.protocol.memory_needs import MemoryNeeds


@dataclass(frozen=True, slots=True)
class Other:
    """Weights that are loaded when a request needs them."""

    what: str  # such as "the refiner sdxl-refiner-1.0"
    bytes: int


def others_beside(card: ModelCard, dtype: Dtype, cards: Iterable[ModelCard]) -> list[Other]:
    """Everything that is kept beside this model once it is loaded, as far as its size is known.

    cards: the refiner's, and those of the group.
    """
    others = list(cards)
    return [
        *_controlnets(card),
        *(other for one in others if one.id == card.refiner for other in _refiner(card, one, dtype)),
        *_group(card, [one for one in others if one.id not in (card.id, card.refiner)], dtype),
    ]


def _controlnets(card: ModelCard) -> Iterator[Other]:
    """Each net once, though several kinds of control picture may use it."""
    if card.memory is None or card.memory.controlnet is None:
        return
    nets = {net.weights.path or net.weights.repo: net.weights for net in card.controls.values()}
    for name, weights in nets.items():
        size = card.memory.controlnet.parameters * MILLION * DTYPE_BYTES[weights.dtype]
        yield Other(f"the ControlNet {name}", int(size))


def _refiner(card: ModelCard, refiner: ModelCard, dtype: Dtype) -> Iterator[Other]:
    """Without the parts that it shares with the model."""
    if card.memory is None or refiner.memory is None:
        return
    own = [name for name, needs in refiner.memory.parts.items() if card.memory.parts.get(name) != needs]
    yield Other(f"the refiner {refiner.id}", _weight_bytes(refiner, refiner.memory, own, dtype))


def _group(card: ModelCard, others: list[ModelCard], dtype: Dtype) -> list[Other]:
    """As many as may be loaded beside the model, the largest ones."""
    sized = [
        Other(f"the model {other.id}", _weight_bytes(other, other.memory, other.memory.parts, dtype))
        for other in others
        if other.memory is not None
    ]
    sized.sort(key=lambda other: -other.bytes)
    return sized[: card.serving.models_loaded - 1]


def _weight_bytes(card: ModelCard, memory: MemoryNeeds, parts: Iterable[str], dtype: Dtype) -> int:
    """Of these parts, as they are in their files. One whose GGUF file cannot be used is refused by itself."""
    try:
        gguf = gguf_needs(card.weights, DTYPE_BYTES[dtype])
    except ModelFailed:
        gguf = {}
    return sum(
        planned_part(name, memory.parts[name], dtype, gguf=gguf.get(name)).weight_bytes for name in parts
    )
