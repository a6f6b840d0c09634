"""Fills one forward with calls of a key, in the batch sizes that they allow (pure: no torch, no clock)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from deployments.engine.scheduled_job import ParkedCall


class Batch:
    """Calls that share a forward. Its rows are padded to the next batch size that all of them allow."""

    def __init__(self, lead: ParkedCall) -> None:
        self.rows = lead.batch_size  # without padding
        self.sizes = lead.sizes  # that all calls allow, ascending; None: any

    @property
    def padded_rows(self) -> int:
        """Rows that the forward will have."""
        return self.rows if self.sizes is None else padded(self.sizes, self.rows) or self.rows

    def add(self, waiting: Sequence[ParkedCall], indices: Sequence[int], limit: int) -> list[int]:
        """Add those of the calls at these indices that fit into at most `limit` rows with padding. Returns
        their indices."""
        added = []
        for i in indices:
            if self.rows >= limit:
                break
            call = waiting[i]
            rows, sizes = self.rows + call.batch_size, common_sizes(self.sizes, call.sizes)
            size = rows if sizes is None else padded(sizes, rows)
            if size is not None and size <= limit:
                self.rows, self.sizes = rows, sizes
                added.append(i)
        return added


def common_sizes(sizes: tuple[int, ...] | None, others: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The batch sizes that both allow; None: any."""
    if sizes is None or sizes is others:
        return others
    if others is None:
        return sizes
    return tuple([size for size in sizes if size in others])


def padded(sizes: Sequence[int], rows: int) -> int | None:
    """The smallest of these ascending batch sizes with at least so many rows; None if all are smaller."""
    index = bisect_left(sizes, rows)
    return sizes[index] if index < len(sizes) else None
