"""Trials with noise: do the rows of a call have the same bits in a larger batch?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deployments.engine.argument_roles import ArgumentRole
from deployments.engine.call import ModuleCall, Seam
from deployments.engine.stacking import map_tensors, select_rows, split, stack

# another order of summing changes about one of 10,000 16-bit values and every other 32-bit value; another
# kernel for the last elements of a vector (their place depends on the batch size) changes few of either
PROOF_VALUES = 2**17  # of 16 bits; one of more bits counts as WIDE_VALUES
WIDE_VALUES = 8
MAX_TRIALS = 256  # of one batch size
TIMED_RUNS = 3
BATCH_ROLES = frozenset(
    {ArgumentRole.BATCH, ArgumentRole.BATCH_DIM1, ArgumentRole.BROADCAST, ArgumentRole.RAGGED}
)


class BitTrials:
    """Forwards of one seam with noise of the shapes of one batch key, for calls of `call_rows` rows.

    Row i of trial t has the same noise in every batch size, so that the calls alone of trial 0 are run once
    and compared with all batch sizes.
    """

    def __init__(self, call: ModuleCall, copies: int = 1) -> None:
        """copies: 2 where the reference of a call of one row is that row beside a copy of itself, else 1.

        Keeps no tensor of the call but small ones, such as timesteps and position ids.
        """
        self.call_rows = call.batch_size
        self.copies = copies
        self._seam = call.seam
        self._device = torch.device("cpu")
        self._template = self._without_values(call)
        self._key = object()  # of the calls with noise, apart from those of requests
        self._alone: dict[tuple[int, int], list[Any]] = {}  # output rows by trial and first row of the call
        self._compared: dict[int, tuple[int, int]] = {}  # by batch size: trials and values so far

    def run(self, batch_size: int) -> bool | None:
        """One more forward: False if any row differs, True if enough values agree, None to go on.

        If one trial gives too few values for a proof, more are made, up to MAX_TRIALS. Raises what the module
        raises.
        """
        trial, compared = self._compared.get(batch_size, (0, 0))
        first = self._missing_call(batch_size)
        if first is not None:
            rows = [self._noise(trial, first + row) for row in range(self.call_rows)] * self.copies
            self._alone[trial, first] = split(self._forward(rows), [1] * len(rows))
            return None
        together = self._forward([self._noise(trial, row) for row in range(batch_size)])
        rows = split(together, [1] * batch_size)
        if not all(self._agrees(trial, first, rows) for first in self._first_rows(batch_size)):
            return False
        self._alone = {known: row for known, row in self._alone.items() if known[0] == 0}
        values = sum(_values_to_compare(row) for row in rows)
        self._compared[batch_size] = trial + 1, compared + values
        return True if compared + values >= PROOF_VALUES or trial + 1 >= MAX_TRIALS or not values else None

    def rows_to_run(self, batch_size: int) -> int:
        """Rows of the next forward."""
        return batch_size if self._missing_call(batch_size) is None else self.call_rows * self.copies

    def seconds(self, batch_size: int) -> float:
        """The shortest of some forwards with so many rows, waited for."""
        arguments = self._stacked([self._noise(0, row) for row in range(batch_size)])
        return min(_timed(lambda: self._seam.function(**arguments)) for _ in range(TIMED_RUNS))

    def beside_copies(self) -> BitTrials:
        """The same trials with a row beside a copy of itself as the reference."""
        trials = copy.copy(self)
        trials.copies = 2
        trials.restart()
        return trials

    def restart(self) -> None:
        """Forget the results so far."""
        self._alone, self._compared = {}, {}

    def release(self) -> None:
        """Free what was kept for further trials."""
        self._alone.clear()

    def _missing_call(self, batch_size: int) -> int | None:
        """The first row of a call that has not been run alone."""
        trial = self._compared.get(batch_size, (0, 0))[0]
        return next((f for f in self._first_rows(batch_size) if (trial, f) not in self._alone), None)

    def _first_rows(self, batch_size: int) -> list[int]:
        """First rows of calls that together are all rows; the last may share rows with the one before."""
        last = batch_size - self.call_rows
        return [*range(0, last, self.call_rows), last]

    def _agrees(self, trial: int, first: int, together: list[Any]) -> bool:
        """Whether the rows of the call that begins with this one have the bits that they have alone."""
        rows = together[first : first + self.call_rows] * self.copies
        return all(_has_same_bits(a, b) for a, b in zip(self._alone[trial, first], rows, strict=True))

    def _forward(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return self._seam.function(**self._stacked(rows))

    def _stacked(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        calls = [ModuleCall(self._seam, dict(row), 1, self._key) for row in rows]
        return contiguous(self._seam, stack(calls))

    def _noise(self, trial: int, row: int) -> dict[str, Any]:
        """The arguments of one row with normally distributed values in all batched tensors of floats: real
        rows may be equal by accident (clipped latents are). Its timestep is up to that of the call."""
        generator = torch.Generator().manual_seed(trial * 2**16 + row)

        def noise(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return tensor
            return torch.randn(tensor.shape, generator=generator).to(self._device, tensor.dtype)

        arguments = _map_batched(self._seam, noise, self._template)
        earlier = float(torch.rand((), generator=generator))
        for name, value in arguments.items():
            if isinstance(value, Tensor) and self._seam.role(name) is ArgumentRole.TIMESTEP:
                arguments[name] = value * earlier
        return arguments

    def _without_values(self, call: ModuleCall) -> dict[str, Any]:
        """The arguments of the call's first row; batched tensors of floats have a shape and no values."""

        def shape_of(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.clone()
            self._device = tensor.device
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        return _map_batched(self._seam, shape_of, select_rows(self._seam, call.arguments, [0]))


def contiguous(seam: Seam, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in one memory layout: convolutions choose their algorithm by it."""
    return _map_batched(seam, Tensor.contiguous, arguments)


def _map_batched(
    seam: Seam, function: Callable[[Tensor], Tensor], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        name: map_tensors(function, value) if seam.role(name) in BATCH_ROLES else value
        for name, value in arguments.items()
    }


def _timed(forward: Callable[[], Any]) -> float:
    _wait_for_device()
    began_s = time.perf_counter()
    forward()
    _wait_for_device()
    return time.perf_counter() - began_s


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _values_to_compare(output: Any) -> int:
    """The number of 16-bit values in an output, or of what counts as so many."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return sum(t.numel() * (1 if t.element_size() <= 2 else WIDE_VALUES) for t in tensors)


def _has_same_bits(output: Any, other: Any) -> bool:
    """other: of the same structure."""
    return all(_has_leaf_bits(a, b) for a, b in zip(tree_leaves(output), tree_leaves(other), strict=True))


def _has_leaf_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    if torch.equal(a, b):
        return True
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))  # NaN too
