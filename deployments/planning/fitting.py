"""The highest rung of the ladder on which a model fits, and what the rest of the memory is used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.planning.account import (
    MIB,
    PlannedBytes,
    auxiliary_bytes,
    lora_bytes,
    row_bytes,
    rows_of_call,
)
from deployments.planning.gguf_needs import GgufNeeds
from deployments.planning.ladder import Rung, placement_of, rungs, weights_of
from deployments.planning.machine import Machine
from deployments.planning.part_plan import DENOISERS, PartPlan, block_sizes, planned_part
from deployments.protocol.card import Dtype, ModelCard
from deployments.protocol.memory_needs import MemoryNeeds

MAX_ROWS = 64  # of one forward, as the engine allows
EARLY_CALLS = 4  # calls that share a forward before more LoRAs are kept, and more share it after that
STREAMED_CALLS = 2  # at least, where weights are copied in every step: each copy then serves two requests
HOST_FRACTION = 0.9  # of the host's memory that weights may take


@dataclass(frozen=True, slots=True)
class Fitted:
    """A way to hold the model, with its bytes."""

    rung: Rung
    parts: tuple[PartPlan, ...]
    bytes: PlannedBytes
    rows: int
    lora_slots: int
    least: PlannedBytes  # with as few rows and LoRAs as the model can run with

    @property
    def host_bytes(self) -> int:
        """Of the weights that are kept in memory of the host."""
        return sum(part.host_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Fitting:
    """One model on one machine."""

    card: ModelCard
    needs: MemoryNeeds
    machine: Machine
    dtype: Dtype
    others_bytes: int = 0  # of ControlNets, the refiner and models of the group, all of them
    gguf: Mapping[str, GgufNeeds] = field(default_factory=dict)  # by part

    def best(self) -> Fitted | None:
        """The first rung that fits, with what the rest of the memory has space for; None: none fits."""
        for rung in rungs(self.card, self.machine):
            fitted = self._least(rung)
            if self._fits(fitted):
                return self._filled(fitted)
        return None

    def least(self) -> Fitted | None:
        """The way that takes least of the device, and is possible with the host's memory where one is; None
        where the card's settings leave no way at all."""
        ways = [self._least(rung) for rung in rungs(self.card, self.machine)]
        return min(ways, key=lambda way: (not self._host_has(way), way.bytes.peak), default=None)

    def _least(self, rung: Rung) -> Fitted:
        """With as few rows and LoRAs as the model can run with."""
        calls = STREAMED_CALLS if rung.denoiser == "streamed" else 1
        rows = min(calls * rows_of_call(self.card), self._max_rows)
        return self._on(rung, self._parts(rung, 0), rows, min(1, self._max_slots))

    def _filled(self, fitted: Fitted) -> Fitted:
        """With more blocks, rows and LoRAs on the device, as far as there is memory."""
        if self.machine.limit_bytes is None:
            return fitted
        if fitted.rung.denoiser == "streamed":
            fitted = self._with_blocks(fitted)
        early = min(EARLY_CALLS * rows_of_call(self.card), self._max_rows)
        fitted = self._with_rows(fitted, early)
        if fitted.rows >= early:
            fitted = self._with_loras(fitted)
        if fitted.lora_slots == self._max_slots:
            fitted = self._with_rows(fitted, self._max_rows)
        return fitted

    def _with_blocks(self, fitted: Fitted) -> Fitted:
        """With the most blocks of the denoiser on the device."""
        needs = [needs for name, needs in self.needs.parts.items() if name in DENOISERS]
        most = max(len(block_sizes(one)) for one in needs)
        for blocks in range(most, 0, -1):
            more = self._on(fitted.rung, self._parts(fitted.rung, blocks), fitted.rows, fitted.lora_slots)
            if self._fits(more):
                return more
        return fitted

    def _with_rows(self, fitted: Fitted, most: int) -> Fitted:
        """With so many rows at most."""
        free, each = self._free(fitted), self._row_bytes(fitted.rung)
        rows = max(fitted.rows, min(most, fitted.rows + free // each))
        return self._on(fitted.rung, fitted.parts, rows, fitted.lora_slots, fitted.least)

    def _with_loras(self, fitted: Fitted) -> Fitted:
        """With as many LoRAs as the card allows, at most."""
        each = lora_bytes(self.needs, self.dtype)
        fit = self._free(fitted) // each if each else self._max_slots
        slots = max(fitted.lora_slots, min(self._max_slots, fitted.lora_slots + fit))
        return self._on(fitted.rung, fitted.parts, fitted.rows, slots, fitted.least)

    def _on(
        self,
        rung: Rung,
        parts: tuple[PartPlan, ...],
        rows: int,
        lora_slots: int,
        least: PlannedBytes | None = None,
    ) -> Fitted:
        planned = PlannedBytes(
            weights=sum(part.held_bytes for part in parts),
            others=self.others_bytes if rung.with_others else 0,
            loras=lora_slots * lora_bytes(self.needs, self.dtype),
            prompts=self.card.serving.prompt_cache_mib * MIB,
            steps=rows * self._row_bytes(rung),
            auxiliary=auxiliary_bytes(parts, self.needs, tiled=rung.tiled),
            dequantisation=max((part.workspace_bytes for part in parts if part.name in DENOISERS), default=0),
        )
        return Fitted(rung, parts, planned, rows, lora_slots, least or planned)

    def _row_bytes(self, rung: Rung) -> int:
        return row_bytes(self.needs, self.dtype, controlled=rung.with_others and bool(self.card.controls))

    def _parts(self, rung: Rung, resident_blocks: int) -> tuple[PartPlan, ...]:
        serving = self.card.serving
        return tuple(
            planned_part(
                name,
                needs,
                dtype_of_part(name, self.dtype),
                placement_of(name, needs.parameters, rung),
                None if name in self.gguf else weights_of(name, needs.parameters, rung, serving),
                min(resident_blocks, len(block_sizes(needs))) if name in DENOISERS else 0,
                self.gguf.get(name),
            )
            for name, needs in self.needs.parts.items()
        )

    def _fits(self, fitted: Fitted) -> bool:
        limit = self.machine.limit_bytes
        return (limit is None or fitted.bytes.peak <= limit) and self._host_has(fitted)

    def _host_has(self, fitted: Fitted) -> bool:
        host = self.machine.host_bytes
        return host is None or fitted.host_bytes <= HOST_FRACTION * host

    def _free(self, fitted: Fitted) -> int:
        assert self.machine.limit_bytes is not None
        return self.machine.limit_bytes - fitted.bytes.peak

    @property
    def _max_rows(self) -> int:
        return self.card.serving.max_rows or MAX_ROWS

    @property
    def _max_slots(self) -> int:
        return self.card.serving.adapters_on_device if self.card.lora_limit else 0


def dtype_of_part(name: str, dtype: Dtype) -> Dtype:
    """VAEs overflow in float16."""
    return "float32" if name == "vae" and dtype == "float16" else dtype
