"""What is served on which simulated device: a model, and waves of requests one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.protocol.request import ControlType, Exactness


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests that start together; the next wave starts when all of them have ended."""

    requests: int = 4
    steps: int = 4
    images: int = 1  # of each request
    sizes: tuple[tuple[int, int], ...] = ()  # width and height, in turns; empty: the card's
    frames: int = 0  # of a video; 0: the card's
    scheduler: str = "auto"
    previews: int = 0
    control: ControlType | None = None  # a control picture for every request
    loras: int = 0  # LoRA files, which the requests use in turns
    rank: int = 16  # of the files with even index; the others have twice as much
    cold_loras: bool = False  # LoRAs are read and copied while other requests run
    proven: bool = False  # it starts when the proofs that earlier waves called for have been run
    cancel_after: int = 0  # the last request is cancelled after so many of its steps; 0: not


@dataclass(frozen=True, slots=True)
class Scenario:
    """A model on a device, and what is asked of it."""

    model: str  # one of models.MODELS
    gpu: str = "a100-80"  # one of costs.KINDS
    memory_gib: float = 0.0  # an allocation above it fails; 0: the GPU's memory
    rows: int = 4  # the card's max_rows
    exact: Exactness = "off"  # whether batch sizes need a proof that they change no bit
    proofs: bool = True  # whether proofs find equal bits; without values there is nothing to compare
    together: bool = True  # forwards take all rows that wait from the start, as the step scheduler learns to
    warm_up: bool = False
    waves: tuple[Wave, ...] = (Wave(),)
