"""Files of callers on disk until they are checked and stored, so that their size costs no memory."""

from __future__ import annotations

import asyncio
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import BinaryIO, Self

WRITE_BYTES = 2**20  # that are collected for one write


class SpooledFile:
    """A file without a name in the folder for temporary files (TMPDIR); use it in a `with` block."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        """file: one that is complete on disk, and is closed by another; None: a new one to write to."""
        self._ours = file is None
        self._file = tempfile.TemporaryFile() if file is None else file  # noqa: SIM115  closed by __exit__
        self._pending = bytearray()

    @classmethod
    def of(cls, data: bytes) -> Self:
        """A file with this content."""
        file = cls()
        file._file.write(data)
        file._file.flush()
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ours:
            self._file.close()

    @property
    def size_bytes(self) -> int:
        """Of what was written; `flush` first."""
        return self._file.seek(0, 2)

    async def write(self, data: bytes) -> None:
        """Append. The disk is not waited for on the event loop. Raises OSError where it is full."""
        self._pending += data
        if len(self._pending) >= WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write what is pending."""
        pending, self._pending = self._pending, bytearray()
        await asyncio.to_thread(self._write, pending)

    def _write(self, data: bytearray) -> None:
        self._file.write(data)
        self._file.flush()

    @contextmanager
    def mapped(self) -> Iterator[bytes | mmap.mmap]:
        """The content, as pages that are read from disk when they are needed. Blocks."""
        if not self.size_bytes:
            yield b""
            return
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content
