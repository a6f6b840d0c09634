"""Which numbers of rows a module computes to the same bits: proven by trial on this very machine.

A kernel may sum in another order when the number of rows changes (bf16 on a GPU: 3e-3 of the values).
Then a picture would depend on its neighbours.  Two measures take that away.  Linear layers that see few
rows (time and guidance embeddings, modulation) are padded to 16: they are cheap, and nearly all of the
differences come from them.  Everything else is proven: forwards are padded to a few numbers of rows, and
each is used for a shape only after a forward of noise has shown that every row, at every place, has the very
bits that it has alone.  Where none does, calls are not merged.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.argument_roles import ArgumentRole
from deployments.engine.call import ModuleCall, RaggedList, Seam, select_rows, split
from deployments.engine.lora_rows import run_with_lora_rows

logger = logging.getLogger(__name__)

MIN_LINEAR_ROWS = 16  # linear layers with fewer are padded to this many
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # fewer to prove, and to compile, than all numbers
KEYS_KEPT = 512
# convolutions at the picture's own size: a second row costs as much as the first, so none is padded
FULL_RESOLUTION = frozenset({"Encoder.forward", "Decoder.forward"})
# another order of summing shows in one of some 10,000 values of 16 bits, in float32 in every other
PROOF_VALUES = 2**17
MAX_TRIALS = 64  # of one number of rows
_BATCH_ROLES = frozenset({ArgumentRole.BATCH, ArgumentRole.BATCH_DIM1, ArgumentRole.RAGGED})


class BucketProver:
    """Finds for each forward a number of rows that gives every row the bits it has alone.

    Every method runs on the engine's thread.
    """

    def __init__(self, max_batch_size: int, set_buckets: Callable[[Hashable, Sequence[int]], None]) -> None:
        """allow: told for each key which numbers of rows its forwards may have."""
        self._buckets = [bucket for bucket in BUCKETS if bucket <= max_batch_size]
        self._set_buckets = set_buckets
        self._known: OrderedDict[Hashable, _Proofs] = OrderedDict()

    def forward(self, calls: Sequence[ModuleCall], arguments: Mapping[str, Any]) -> tuple[list[Any], int]:
        """One output per call, and the number of rows that ran.

        calls: they share a key; arguments: theirs, stacked.
        """
        seam, key, sizes = calls[0].seam, calls[0].key, [call.batch_size for call in calls]
        rows = sum(sizes)
        arguments = _contiguous(seam, arguments)
        proofs = self._known.get(key)
        if proofs is None:
            proofs = self._first_proofs(seam, key, arguments)
        else:
            self._known.move_to_end(key)
        for bucket in self._buckets:
            if bucket < max(rows, proofs.min_bucket):
                continue
            if self._is_proven(seam, key, proofs, bucket, arguments):
                all_sizes = [*sizes, bucket - rows] if bucket > rows else sizes
                lora_sets = [call.lora_set for call in calls] + [None] * (len(all_sizes) - len(sizes))
                run = partial(_run, seam, arguments, rows, bucket)
                return split(run_with_lora_rows(lora_sets, all_sizes, run), all_sizes)[: len(calls)], bucket
        return _one_by_one(seam, calls, proofs.min_bucket), max(proofs.min_bucket, 1)

    def _first_proofs(self, seam: Seam, key: Hashable, arguments: Mapping[str, Any]) -> _Proofs:
        """Whether a row has the same bits alone and beside another, or at least always beside another."""
        proofs = self._known[key] = _Proofs(min_bucket=1, proven={1: True})
        if len(self._known) > KEYS_KEPT:
            self._known.popitem(last=False)
        if len(self._buckets) > 1 and not self._is_proven(seam, key, proofs, 2, arguments):
            proofs.min_bucket = 2
            proofs.proven = {1: False}
            full = seam.name in FULL_RESOLUTION
            if full or not self._is_proven(seam, key, proofs, 2, arguments):
                proofs.min_bucket = (
                    1  # two rows differ among themselves, or cost too much: each call by itself
                )
                proofs.proven = dict.fromkeys(self._buckets, False)
        logger.info("rows are computed alike", extra={"seam": seam.name, "from": proofs.min_bucket})
        self._set_buckets(
            key, [b for b in self._buckets if b >= proofs.min_bucket and proofs.proven.get(b, True)]
        )
        return proofs

    def _is_proven(
        self, seam: Seam, key: Hashable, proofs: _Proofs, bucket: int, arguments: Mapping[str, Any]
    ) -> bool:
        """Whether `bucket` rows have the bits that each has alone; tried once per key."""
        known = proofs.proven.get(bucket)
        if known is None:
            known = proofs.proven[bucket] = _is_bit_equal(seam, arguments, proofs.min_bucket, bucket)
            if not known:
                logger.info("a number of rows changes bits", extra={"seam": seam.name, "rows": bucket})
                left = [b for b in self._buckets if b >= proofs.min_bucket and proofs.proven.get(b, True)]
                self._set_buckets(key, left or [1])
        return known


@dataclass(slots=True)
class _Proofs:
    """What is known of one key."""

    min_bucket: int  # rows of a forward for one row: 1, or 2 where that row is padded by a copy of itself
    proven: dict[int, bool]  # bucket -> every row has the bits it has alone


def pad_small_linears(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Let every plain Linear in `modules` compute at least 16 rows; returns a function that undoes it.

    On a CPU in float32 this alone makes a FLUX transformer bit-equal for all numbers of rows.
    """
    padded: list[nn.Module] = []
    for module in modules:
        for part in module.modules():
            if type(part) is nn.Linear and "forward" not in vars(part):
                _pad(part)
                padded.append(part)

    def restore() -> None:
        for part in padded:
            vars(part).pop("forward", None)

    return restore


def _pad(linear: nn.Linear) -> None:
    plain, width = linear.forward, linear.in_features

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // width
        if rows >= MIN_LINEAR_ROWS:
            return plain(x)
        full = x.new_zeros((MIN_LINEAR_ROWS, width))
        full[:rows] = x.reshape(rows, width)
        return plain(full)[:rows].reshape(*x.shape[:-1], -1)

    vars(linear)["forward"] = forward


def _is_bit_equal(seam: Seam, arguments: Mapping[str, Any], min_bucket: int, bucket: int) -> bool:
    """Whether each of `bucket` rows comes out as in a forward of `alone` copies of it.

    The rows are noise of the shapes of `arguments`: real ones may agree by luck (clipped latents do).  Where
    a forward gives too few values to tell luck from proof, as many forwards are compared as it takes.
    """
    compared, trials = 0, 0
    while compared < PROOF_VALUES:
        trial = _noise(seam, select_rows(arguments, [0] * bucket, seam), trials)
        together = split(seam.function(**trial), [1] * bucket)
        for row in range(bucket):
            apart = split(seam.function(**select_rows(trial, [row] * min_bucket, seam)), [1] * min_bucket)
            if not all(_same_bits(copy, together[row]) for copy in apart):
                return False
        trials += 1
        values = sum(_values_to_compare(row) for row in together)
        if trials == MAX_TRIALS or not values:
            break
        compared += values
    return True


def _values_to_compare(output: Any) -> int:
    """How many values of 16 bits an output has; one of 32 bits is proof enough by itself."""
    if isinstance(output, Tensor):
        return output.numel() if output.element_size() <= 2 else PROOF_VALUES
    if isinstance(output, Mapping):
        return sum(map(_values_to_compare, output.values()))
    return sum(map(_values_to_compare, output)) if isinstance(output, list | tuple) else 0


def _contiguous(seam: Seam, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in one memory layout: convolutions choose their algorithm by it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.contiguous()
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(plain(item) for item in value)
        return value

    return {
        name: plain(value) if seam.role(name) in _BATCH_ROLES else value for name, value in arguments.items()
    }


def _noise(seam: Seam, arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def noisy(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                return value
            return torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        if isinstance(value, Mapping):
            return {name: noisy(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(noisy(item) for item in value)
        return value

    return {
        name: noisy(value) if seam.role(name) in _BATCH_ROLES else value for name, value in arguments.items()
    }


def _one_by_one(seam: Seam, calls: Sequence[ModuleCall], min_bucket: int) -> list[Any]:
    """Each call by itself, or each of its rows where a row alone means two."""
    outputs = []
    for call in calls:
        arguments = _contiguous(seam, call.arguments)
        if min_bucket == 1:
            outputs.append(
                run_with_lora_rows([call.lora_set], [call.batch_size], partial(seam.function, **arguments))
            )
            continue
        lora_sets = [call.lora_set] + [None] * (min_bucket - 1)  # of a row and its padding
        rows = (select_rows(arguments, [row] * min_bucket, seam) for row in range(call.batch_size))
        answers = [
            run_with_lora_rows(lora_sets, [1] * min_bucket, partial(seam.function, **row)) for row in rows
        ]
        outputs.append(_joined([split(answer, [1] * min_bucket)[0] for answer in answers]))
    return outputs


def _run(seam: Seam, arguments: Mapping[str, Any], rows: int, count: int) -> Any:
    """The module's output for `count` rows: the given ones and copies of the last."""
    if count == rows:
        return seam.function(**arguments)
    return seam.function(**select_rows(arguments, [*range(rows), *[rows - 1] * (count - rows)], seam))


def _same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        if torch.equal(a, b):
            return True
        return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))  # NaN too
    if isinstance(a, Mapping):
        return all(_same_bits(value, b[name]) for name, value in a.items())
    if isinstance(a, list | tuple):
        return all(_same_bits(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _joined(parts: list[Any]) -> Any:
    """One output from those of single rows."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return type(first)(**{name: _joined([part[name] for part in parts]) for name in first})
    if isinstance(first, RaggedList):
        return RaggedList(entry for part in parts for entry in part)
    if isinstance(first, list | tuple):
        return type(first)(_joined(list(column)) for column in zip(*parts, strict=True))
    return first
