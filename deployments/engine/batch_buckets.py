"""Batch buckets: batch sizes for which every row is computed to the bits that it has alone.

A kernel may sum in another order when the batch size changes (bf16 on a GPU: relative differences of 3e-3),
and then an image would depend on the other requests of its batch. Two measures prevent this. Linear layers
that see fewer than 16 rows (time and guidance embeddings, modulation), which cause most of the differences,
are padded to 16 rows at little cost. And forwards are padded to a few batch sizes, the buckets; each is used
for a batch key only after a forward of noise has shown that every row, at every index, has the very bits that
it has alone. If no bucket passes, calls are not merged.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from deployments.engine.argument_roles import ArgumentRole
from deployments.engine.call import ModuleCall, Seam
from deployments.engine.lora_rows import run_with_lora_rows
from deployments.engine.stacking import RaggedList, map_tensors, select_rows, split

logger = logging.getLogger(__name__)

MIN_LINEAR_ROWS = 16  # linear layers with fewer rows are padded to this many
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # fewer to prove and to compile than all batch sizes
KEYS_KEPT = 512
# convolutions at the image's own resolution: a second row costs as much as the first, so none is padded
FULL_RESOLUTION = frozenset({"Encoder.forward", "Decoder.forward"})
# another order of summing changes about one of 10,000 16-bit values, and every other 32-bit value
PROOF_VALUES = 2**17
MAX_TRIALS = 64  # of one bucket
_BATCH_ROLES = frozenset({ArgumentRole.BATCH, ArgumentRole.BATCH_DIM1, ArgumentRole.RAGGED})


@dataclass(slots=True)
class _Proofs:
    """What is known of one batch key."""

    min_bucket: int  # of a forward for one row: 1, or 2 where that row is padded by a copy of itself
    proven: dict[int, bool]  # by bucket: whether every row has the bits that it has alone


class BucketProver:
    """Runs each forward in a bucket that gives every row the bits that it has alone.

    All methods run on one thread.
    """

    def __init__(self, max_batch_size: int, set_buckets: Callable[[Hashable, Sequence[int]], None]) -> None:
        """set_buckets: called with a key and its buckets whenever they change."""
        self._buckets = [bucket for bucket in BUCKETS if bucket <= max_batch_size]
        self._set_buckets = set_buckets
        # not cachetools' LRUCache: one lookup per forward, 1 us instead of 0.1
        self._proofs: OrderedDict[Hashable, _Proofs] = OrderedDict()

    def forward(self, calls: Sequence[ModuleCall], arguments: Mapping[str, Any]) -> tuple[list[Any], int]:
        """One output per call, and the batch size that ran.

        calls: with equal keys; arguments: theirs, stacked.
        """
        seam, key, sizes = calls[0].seam, calls[0].key, [call.batch_size for call in calls]
        rows = sum(sizes)
        arguments = _contiguous(seam, arguments)
        proofs = self._proofs.get(key)
        if proofs is None:
            proofs = self._first_proofs(seam, key, arguments)
        else:
            self._proofs.move_to_end(key)
        for bucket in self._buckets:
            if bucket < max(rows, proofs.min_bucket):
                continue
            if self._is_proven(seam, key, proofs, bucket, arguments):
                all_sizes = [*sizes, bucket - rows] if bucket > rows else sizes
                lora_sets = [call.lora_set for call in calls] + [None] * (len(all_sizes) - len(sizes))
                run = partial(_run_padded, seam, arguments, rows, bucket)
                return split(run_with_lora_rows(lora_sets, all_sizes, run), all_sizes)[: len(calls)], bucket
        return _run_one_by_one(seam, calls, proofs.min_bucket), max(proofs.min_bucket, 1)

    def _first_proofs(self, seam: Seam, key: Hashable, arguments: Mapping[str, Any]) -> _Proofs:
        """Proofs whose min_bucket is 1 if a row has the same bits alone and beside another, 2 if it has them
        at least always beside another, and 1 with no bucket proven otherwise."""
        proofs = self._proofs[key] = _Proofs(min_bucket=1, proven={1: True})
        if len(self._proofs) > KEYS_KEPT:
            self._proofs.popitem(last=False)
        if len(self._buckets) > 1 and not self._is_proven(seam, key, proofs, 2, arguments):
            proofs.min_bucket, proofs.proven = 2, {1: False}
            too_dear = seam.name in FULL_RESOLUTION
            if too_dear or not self._is_proven(seam, key, proofs, 2, arguments):
                proofs.min_bucket, proofs.proven = 1, dict.fromkeys(self._buckets, False)
        logger.info("smallest batch size proven", extra={"seam": seam.name, "rows": proofs.min_bucket})
        self._set_buckets(key, self._usable(proofs))
        return proofs

    def _is_proven(
        self, seam: Seam, key: Hashable, proofs: _Proofs, bucket: int, arguments: Mapping[str, Any]
    ) -> bool:
        """Whether every row of this bucket has the bits that it has alone; tried once per key."""
        known = proofs.proven.get(bucket)
        if known is None:
            known = _is_bit_equal(seam, arguments, proofs.min_bucket, bucket)
            proofs.proven[bucket] = known
            if not known:
                logger.info("a batch size changes bits", extra={"seam": seam.name, "rows": bucket})
                self._set_buckets(key, self._usable(proofs) or [1])
        return known

    def _usable(self, proofs: _Proofs) -> list[int]:
        """Buckets that are proven or have not been tried."""
        return [b for b in self._buckets if b >= proofs.min_bucket and proofs.proven.get(b, True)]


def pad_small_linears(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Let every plain Linear in `modules` compute at least 16 rows. Returns a function that restores them.

    On a CPU in float32 this alone makes a FLUX transformer bit-equal for all batch sizes.
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
    """Whether each of `bucket` rows has the bits that it has in a forward of `min_bucket` copies of it.

    The rows are noise of the shapes of `arguments`: real rows may be equal by accident (clipped latents are).
    If one forward gives too few values for a proof, more are compared, up to MAX_TRIALS.
    """
    compared, trials = 0, 0
    while compared < PROOF_VALUES:
        trial = _noise(seam, select_rows(seam, arguments, [0] * bucket), seed=trials)
        together = split(seam.function(**trial), [1] * bucket)
        for row in range(bucket):
            apart = split(seam.function(**select_rows(seam, trial, [row] * min_bucket)), [1] * min_bucket)
            if not all(_has_same_bits(copy, together[row]) for copy in apart):
                return False
        trials += 1
        values = sum(_values_to_compare(row) for row in together)
        if trials == MAX_TRIALS or not values:
            break
        compared += values
    return True


def _values_to_compare(output: Any) -> int:
    """The number of 16-bit values in an output; a tensor of wider values counts as a full proof."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() if tensor.element_size() <= 2 else PROOF_VALUES for tensor in tensors)


def _has_same_bits(output: Any, other: Any) -> bool:
    """other: of the same structure."""
    return all(_has_leaf_bits(a, b) for a, b in zip(tree_leaves(output), tree_leaves(other), strict=True))


def _has_leaf_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    if torch.equal(a, b):
        return True
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))  # NaN too


def _contiguous(seam: Seam, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in one memory layout: convolutions choose their algorithm by it."""
    return {
        name: map_tensors(Tensor.contiguous, value) if seam.role(name) in _BATCH_ROLES else value
        for name, value in arguments.items()
    }


def _noise(seam: Seam, arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The arguments with normally distributed values in all batched tensors of floats."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    return {
        name: map_tensors(noise, value) if seam.role(name) in _BATCH_ROLES else value
        for name, value in arguments.items()
    }


def _run_padded(seam: Seam, arguments: Mapping[str, Any], rows: int, bucket: int) -> Any:
    """The module's output for the given rows and as many copies of the last as fill the bucket."""
    if bucket == rows:
        return seam.function(**arguments)
    return seam.function(**select_rows(seam, arguments, [*range(rows), *[rows - 1] * (bucket - rows)]))


def _run_one_by_one(seam: Seam, calls: Sequence[ModuleCall], min_bucket: int) -> list[Any]:
    """Each call in a forward of its own, or each of its rows if a row alone needs a bucket of 2."""
    outputs = []
    for call in calls:
        arguments = _contiguous(seam, call.arguments)
        if min_bucket == 1:
            alone = partial(seam.function, **arguments)
            outputs.append(run_with_lora_rows([call.lora_set], [call.batch_size], alone))
            continue
        lora_sets = [call.lora_set] + [None] * (min_bucket - 1)  # of a row and its padding
        parts = []
        for row in range(call.batch_size):
            padded = partial(seam.function, **select_rows(seam, arguments, [row] * min_bucket))
            output = run_with_lora_rows(lora_sets, [1] * min_bucket, padded)
            parts.append(split(output, [1] * min_bucket)[0])
        outputs.append(_join(parts))
    return outputs


def _join(parts: Sequence[Any]) -> Any:
    """One output from outputs of single rows."""

    def join(*leaves: Any) -> Any:
        if isinstance(leaves[0], Tensor):
            return torch.cat(leaves)
        return RaggedList(chain(*leaves)) if isinstance(leaves[0], RaggedList) else leaves[0]

    return tree_map(join, *parts, is_leaf=lambda node: isinstance(node, RaggedList))
