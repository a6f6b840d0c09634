"""LoRA files on the replica's disk: content-addressed, the least recently read removed first."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
import threading
from pathlib import Path

from deployments.loras.file_reader import LoraFileReader, check_digest
from deployments.protocol.errors import NotFound

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"


class LoraFileCache:
    """A LoraFileReader that keeps on disk what it has read. Replicas of one machine may share the folder.

    Not a cachetools map: the state is the folder itself, which several processes read and write.
    """

    def __init__(self, folder: Path | None, max_bytes: int, remote: LoraFileReader | None = None) -> None:
        """folder: created if missing; None keeps nothing. remote: the source of files that are not in it."""
        self._folder = folder if max_bytes else None
        self._max_bytes = max_bytes
        self._remote = remote
        self._lock = threading.Lock()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    async def read(self, digest: str) -> bytes:
        """The file with this SHA-256 (hex). Raises NotFound, BadRequest when the remote gave another file."""
        cached = await asyncio.to_thread(self._cached, digest)
        if cached is not None:
            return cached
        if self._remote is None:
            raise NotFound(f"there is no LoRA {digest} here; send its file along", param="loras")
        file = await self._remote.read(digest)
        await asyncio.to_thread(self.put, digest, file)
        return file

    def put(self, digest: str, file: bytes) -> None:
        """Write the file, then remove old ones until max_bytes hold. A write that fails is logged, not
        raised.

        Raises BadRequest if digest is not the file's SHA-256.
        """
        check_digest(file, digest)
        if self._folder is None or len(file) > self._max_bytes:
            return
        try:
            with self._lock:
                _write_atomically(self._folder / (digest + SUFFIX), file)
                self._evict(self._folder)
        except OSError as error:
            logger.warning(
                "a LoRA file could not be written to disk", extra={"lora": digest, "error": repr(error)}
            )

    def remove(self, digest: str) -> None:
        """Delete one file; nothing happens where there is none."""
        if self._folder is not None:
            (self._folder / (digest + SUFFIX)).unlink(missing_ok=True)

    def _cached(self, digest: str) -> bytes | None:
        """The file if it is on disk and undamaged."""
        if self._folder is None:
            return None
        path = self._folder / (digest + SUFFIX)
        try:
            file = path.read_bytes()
            if hashlib.sha256(file).hexdigest() == digest:
                os.utime(path)
                return file
            logger.warning("a damaged LoRA file was removed from disk", extra={"lora": digest})
            path.unlink(missing_ok=True)
        except OSError:
            pass  # not here, or evicted by another replica
        return None

    def _evict(self, folder: Path) -> None:
        files = _least_recently_read_first(folder)
        excess = sum(size for _, size, _ in files) - self._max_bytes
        for _, size, path in files:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _write_atomically(path: Path, file: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as partial:
            partial.write(file)
            partial.flush()
            os.fsync(partial.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _least_recently_read_first(folder: Path) -> list[tuple[float, int, Path]]:
    """(unix seconds of the last read, bytes, path) of every file."""
    found = []
    for path in folder.glob("*" + SUFFIX):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append((status.st_mtime, status.st_size, path))
    return sorted(found)
