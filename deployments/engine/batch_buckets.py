"""Batch buckets: batch sizes in which every row is computed to the bits that its call has alone.

A kernel may sum in another order when the batch size changes (bf16 on a GPU: relative differences of 3e-3),
and then an image would depend on the other requests of its batch. Two measures prevent this. Linear layers
that see fewer than 16 rows (time and guidance embeddings, modulation), which cause most of the differences,
are padded to 16 rows at little cost. And forwards are padded to a few batch sizes, the buckets; each is used
for calls of a batch key and a number of rows only after a forward of noise has shown that every row, at every
index, has the very bits that it has in such a call alone (bit_trials.py).

Trials run apart from the calls of requests: before traffic, while nothing waits, and for a small share of the
rows while something does. An error in a trial means that the batch size is not allowed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from deployments.engine.argument_roles import ArgumentRole
from deployments.engine.batch_filling import common_sizes, padded
from deployments.engine.bit_trials import BitTrials, contiguous
from deployments.engine.call import ModuleCall, Seam
from deployments.engine.cost_model import RowLimit
from deployments.engine.device_errors import DeviceBroken, is_device_broken
from deployments.engine.lora_rows import run_with_lora_rows
from deployments.engine.memory_meter import MemoryMeter
from deployments.engine.out_of_memory import free_device_memory
from deployments.engine.proof_state import ProofState
from deployments.engine.stacking import select_rows, split, stack
from deployments.protocol.request import Exactness

logger = logging.getLogger(__name__)

MIN_LINEAR_ROWS = 16  # linear layers with fewer rows are padded to this many
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # fewer to prove and to compile than all batch sizes
PADDED = "pads_rows"  # attribute of a Linear whose forward computes at least MIN_LINEAR_ROWS rows
GROUPS_KEPT = 512
MAX_REFUSED = 3  # batch sizes; where none of so many is proven, no larger one is tried
FIRST_TRIALS = 8  # rows up to which batch sizes are tried before more of a key have waited at once
# a row beside a copy of itself, where only that has the same bits as in larger batches: at most so many times
# the seconds of a row alone
CHEAP_DOUBLING = 1.2


@dataclass(slots=True, eq=False)
class _Group:
    """Calls of one key and one number of rows."""

    seam: Seam
    key: Hashable
    trials: BitTrials
    shape: str
    verdicts: dict[int, bool] = field(default_factory=dict)  # by batch size
    proven_sizes: tuple[int, ...] = ()  # ascending
    relaxed_sizes: tuple[int, ...] | None = ()  # the same; None, any size, where no size could be proven


class BucketProver:
    """Runs forwards in batch sizes that give every row the bits that its call has alone.

    All methods but `states` run on one thread.
    """

    def __init__(
        self,
        max_batch_size: int,
        policy: Exactness,
        row_limit: RowLimit,
        meter: MemoryMeter | None = None,
    ) -> None:
        """policy: of calls that have none. row_limit: rows of a key that fit the device's memory. meter:
        measures the memory of trials, so that it knows more of them when requests come."""
        self._buckets = [bucket for bucket in BUCKETS if bucket <= max_batch_size]
        self._policy = policy
        self._row_limit = row_limit
        self._meter = meter
        # not cachetools' LRUCache: one lookup per call, 1 us instead of 0.1
        self._groups: OrderedDict[tuple[Hashable, int], _Group] = OrderedDict()
        self._listed: tuple[_Group, ...] = ()  # the same groups, for another thread
        self._wanted_rows: dict[Hashable, int] = {}  # by key, where more than FIRST_TRIALS
        self._unfinished: list[_Group] = []  # groups with batch sizes to try
        self._doubled: set[Seam] = set()  # a call of one row runs beside a copy of itself

    def rows_to_run(self) -> int | None:
        """Rows of the next trial's forward; None if there is nothing to try."""
        following = self._next_trial()
        return None if following is None else following[0].trials.rows_to_run(following[1])

    def seam_to_run(self) -> Seam | None:
        """Of the next trial's forward; None if there is nothing to try."""
        following = self._next_trial()
        return None if following is None else following[0].seam

    def states(self) -> list[ProofState]:
        """What is known; may be called from any thread."""
        return [
            ProofState(
                group.seam.name,
                group.shape,
                group.trials.call_rows,
                group.proven_sizes,
                tuple(sorted(size for size, equal in group.verdicts.items() if not equal)),
                tuple(self._untried(group)),
            )
            for group in self._listed
        ]

    def sizes(self, call: ModuleCall) -> tuple[int, ...] | None:
        """The batch sizes that the call may share, ascending; None: any; empty: it runs alone.

        The first call of its key and number of rows has trials made.
        """
        if call.seam.auxiliary:  # at the image's own resolution a second row costs as much as the first
            return ()
        name = (call.key, call.batch_size)
        group = self._groups.get(name)
        if group is None:
            group = self._new_group(call)
        else:
            self._groups.move_to_end(name)
        return group.proven_sizes if (call.exact or self._policy) == "strict" else group.relaxed_sizes

    def forget(self, seams: Collection[Seam]) -> None:
        """Keep nothing of these seams any more: their modules are going to be freed."""
        for name, group in list(self._groups.items()):
            if group.seam in seams:
                del self._groups[name]
                self._wanted_rows.pop(group.key, None)
        self._listed = tuple(self._groups.values())
        self._unfinished = [group for group in self._unfinished if group.seam not in seams]
        self._doubled.difference_update(seams)

    def want(self, key: Hashable, rows: int) -> None:
        """So many rows of this key have waited at once: try batch sizes up to theirs."""
        if rows <= FIRST_TRIALS:
            return
        self._wanted_rows[key] = max(rows, self._wanted_rows.get(key, 0))
        for group in self._groups.values():
            if group.key is key:
                self._resume_trials(group)

    def forward(self, calls: Sequence[ModuleCall]) -> tuple[list[Any], int, Sequence[ModuleCall]]:
        """One output per call, the batch size that ran, and the calls that shared it without a proof.

        calls: with equal keys. Those that may not share a batch size run one by one.
        """
        if len(calls) == 1:
            return [self._run_alone(calls[0])], calls[0].batch_size * self._copies_alone(calls[0]), ()
        rows = sum([call.batch_size for call in calls])
        kinds = {(call.batch_size, call.exact): call for call in calls}  # those of one kind share alike
        sizes = self.sizes(calls[0])
        for call in kinds.values():
            sizes = common_sizes(sizes, self.sizes(call))
        bucket = rows if sizes is None else padded(sizes, rows)
        if bucket is None:
            return [self._run_alone(call) for call in calls], rows, ()
        outputs = _run_together(calls, rows, bucket)
        unproven = {size for size, _ in kinds if not self._is_proven(calls[0].key, size, bucket)}
        return outputs, bucket, [call for call in calls if call.batch_size in unproven] if unproven else ()

    def _is_proven(self, key: Hashable, call_size: int, size: int) -> bool:
        """Whether calls of so many rows have the bits of a call alone in a forward of `size` rows."""
        group = self._groups.get((key, call_size))
        return group is not None and bool(group.verdicts.get(size))

    def run_trial(self, *, before_traffic: bool = False) -> None:
        """One forward of the trials of the smallest batch size that has not been tried.

        before_traffic: no request has been computed yet, so that the reference of a call of one row may still
        become that row beside a copy of itself. Raises DeviceBroken when the device failed for good.
        """
        following = self._next_trial()
        if following is None:
            return
        group, size = following
        try:
            equal = self._run_measured(group, size)
            if equal is False and before_traffic and self._try_doubling(group, size):
                return
        except Exception as error:
            if is_device_broken(error):
                raise DeviceBroken(()) from error
            extra = {"seam": group.seam.name, "rows": size, "error": repr(error)}
            logger.info("a trial of a batch size failed; it is not used", extra=extra)
            free_device_memory()
            equal = False
        if equal is not None:
            self._conclude(group, size, equal=equal)

    def _run_measured(self, group: _Group, size: int) -> bool | None:
        """One forward of the group's trials, with its memory measured."""
        if self._meter is None:
            return group.trials.run(size)
        rows = group.trials.rows_to_run(size)
        started, ran = self._meter.start(group.key, rows), 0
        try:
            equal = group.trials.run(size)
            ran = rows
        finally:
            self._meter.stop(started, "steps", group.key, ran)
        return equal

    def _new_group(self, call: ModuleCall) -> _Group:
        copies = 2 if call.batch_size == 1 and call.seam in self._doubled else 1
        group = _Group(call.seam, call.key, BitTrials(call, copies), _shape_of(call))
        self._groups[call.key, call.batch_size] = group
        if len(self._groups) > GROUPS_KEPT:
            _, oldest = self._groups.popitem(last=False)
            self._wanted_rows.pop(oldest.key, None)
            if oldest in self._unfinished:
                self._unfinished.remove(oldest)
        self._listed = tuple(self._groups.values())
        for other in self._groups.values():  # more batch sizes can be filled with calls of different rows
            if other.key is call.key:
                self._resume_trials(other)
        return group

    def _next_trial(self) -> tuple[_Group, int] | None:
        """The group and the smallest batch size that is to be tried."""
        sizes = [(group, sizes[0]) for group in self._unfinished if (sizes := self._untried(group))]
        return min(sizes, key=lambda item: item[1]) if sizes else None

    def _resume_trials(self, group: _Group) -> None:
        if group not in self._unfinished and self._untried(group):
            self._unfinished.append(group)

    def _untried(self, group: _Group) -> list[int]:
        """Batch sizes that the group's calls can share with others of its key and that are to be tried,
        ascending. None any more after MAX_REFUSED were refused and none proven."""
        key, rows, verdicts = group.key, group.trials.call_rows, group.verdicts
        if len(verdicts) >= MAX_REFUSED and not any(verdicts.values()):
            return []
        smallest = next((n for n in range(1, rows) if (key, n) in self._groups), rows)
        wanted = max(FIRST_TRIALS, self._wanted_rows.get(key, 0))
        most, limit = padded(BUCKETS, wanted) or wanted, self._row_limit(key)
        if limit is not None:
            most = min(most, limit)
        return [b for b in self._buckets if rows + smallest <= b <= most and b not in verdicts]

    def _conclude(self, group: _Group, size: int, *, equal: bool) -> None:
        """Write down whether the rows of the group have the same bits in this batch size."""
        group.verdicts = {**group.verdicts, size: equal}  # `states` may be reading the other one
        if not equal:
            logger.info("a batch size changes bits", extra={"seam": group.seam.name, "rows": size})
        proven = tuple(sorted(b for b, is_equal in group.verdicts.items() if is_equal))
        group.proven_sizes = proven
        if proven:
            group.relaxed_sizes = proven
        if self._untried(group):
            return
        self._unfinished.remove(group)
        group.trials.release()
        if not proven and _is_denoiser(group.seam):
            group.relaxed_sizes = None
        extra = {
            "seam": group.seam.name,
            "shape": group.shape,
            "rows": group.trials.call_rows,
            "proven": proven,
        }
        logger.info("batch sizes proven", extra=extra)

    def _try_doubling(self, group: _Group, size: int) -> bool:
        """Make a row beside a copy of itself the reference of the group if only that is proven and cheap."""
        alone = group.trials
        if size != 2 or alone.call_rows != 1 or alone.copies != 1:
            return False
        doubled, equal = alone.beside_copies(), None
        if alone.seconds(2) > CHEAP_DOUBLING * alone.seconds(1):
            return False
        while equal is None:
            equal = doubled.run(2)
        if equal:
            group.trials = doubled
            self._doubled.add(group.seam)
            self._conclude(group, 2, equal=True)
        return equal

    def _copies_alone(self, call: ModuleCall) -> int:
        """2 where the call's only row runs beside a copy of itself, else 1."""
        group = self._groups.get((call.key, call.batch_size))
        return 1 if group is None else group.trials.copies

    def _run_alone(self, call: ModuleCall) -> Any:
        """The call's output by its reference: its own rows, or its only row beside a copy of itself."""
        seam, arguments = call.seam, contiguous(call.seam, call.arguments)
        copies = self._copies_alone(call)
        if copies == 1:
            run = partial(seam.function, **arguments)
            return run_with_lora_rows([call.lora_set], [call.batch_size], run)
        run = partial(seam.function, **select_rows(seam, arguments, [0] * copies))
        output = run_with_lora_rows([call.lora_set, None], [1, copies - 1], run)
        return split(output, [1, copies - 1])[0]


def pad_small_linears(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Let every Linear in `modules` compute at least 16 rows. Returns a function that restores them.

    On a CPU in float32 this alone makes a FLUX transformer bit-equal for all batch sizes.
    """
    before: list[tuple[nn.Module, Callable[[Tensor], Tensor] | None]] = []
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Linear) and PADDED not in vars(part):
                # a hook that computes with stored weights has a forward of its own there
                before.append((part, vars(part).get("forward")))
                vars(part)["forward"] = _padded(part)
                vars(part)[PADDED] = True

    def restore() -> None:
        for part, own in before:
            del vars(part)[PADDED]
            if own is None:
                vars(part).pop("forward", None)
            else:
                vars(part)["forward"] = own

    return restore


def _padded(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    plain, width = linear.forward, linear.in_features

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // width
        if rows >= MIN_LINEAR_ROWS:
            return plain(x)
        full = x.new_zeros((MIN_LINEAR_ROWS, width))
        full[:rows] = x.reshape(rows, width)
        return plain(full)[:rows].reshape(*x.shape[:-1], -1)

    return forward


def _run_together(calls: Sequence[ModuleCall], rows: int, batch_size: int) -> list[Any]:
    """One output per call, from one forward of their rows and copies of the last that fill the batch."""
    seam, sizes = calls[0].seam, [call.batch_size for call in calls]
    lora_sets = [call.lora_set for call in calls]
    arguments = contiguous(seam, stack(calls))
    if batch_size > rows:
        arguments = select_rows(seam, arguments, [*range(rows), *[rows - 1] * (batch_size - rows)])
        sizes, lora_sets = [*sizes, batch_size - rows], [*lora_sets, None]
    output = run_with_lora_rows(lora_sets, sizes, partial(seam.function, **arguments))
    return split(output, sizes)[: len(calls)]


def _is_denoiser(seam: Seam) -> bool:
    """Whether the module is a part of every step, whose forwards are worth sharing without a proof."""
    return any(seam.role(name) is ArgumentRole.TIMESTEP for name in seam.positions)


def _shape_of(call: ModuleCall) -> str:
    """The shape of one row of the first batched tensor, and its type: "4096x64 bfloat16"."""
    for name, value in call.arguments.items():
        if call.seam.role(name) is ArgumentRole.BATCH and isinstance(value, Tensor) and value.ndim:
            return f"{'x'.join(map(str, value.shape[1:]))} {str(value.dtype).removeprefix('torch.')}"
    return ""
