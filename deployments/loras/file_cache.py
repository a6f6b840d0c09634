"""Adapter files near the replica: content-addressed on disk, the least recently read out first."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
import threading
from pathlib import Path

from deployments.loras.file_reader import LoraFileReader
from deployments.protocol.errors import BadRequest, NotFound

logger = logging.getLogger(__name__)

ENDING = ".safetensors"


class LoraFileCache:
    """An LoraFileReader that keeps what it has read. Replicas of one machine may share the folder."""

    def __init__(self, folder: Path | None, max_bytes: int, far: LoraFileReader | None = None) -> None:
        """folder: made if need be; None keeps nothing. far: where files come from that are not here."""
        self._folder = folder if max_bytes else None
        self._max_bytes = max_bytes
        self._far = far
        self._lock = threading.Lock()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def bytes_kept(self) -> int:
        return 0 if self._folder is None else sum(size for _, size, _ in _listing(self._folder))

    async def read(self, digest: str) -> bytes:
        """The file with this SHA-256. Raises NotFound, BadRequest when the far side gave another file."""
        kept = await asyncio.to_thread(self._kept, digest)
        if kept is not None:
            return kept
        if self._far is None:
            raise NotFound(f"there is no LoRA {digest} here; send its file along", param="loras")
        file = await self._far.read(digest)
        await asyncio.to_thread(self.keep, digest, file)
        return file

    def keep(self, digest: str, file: bytes) -> None:
        """Write the file, then make room; a full disk costs the next reading, not this request.

        Raises BadRequest if the digest is not the file's.
        """
        if hashlib.sha256(file).hexdigest() != digest:
            raise BadRequest(f"the LoRA's SHA-256 is not {digest}; upload it again", param="loras")
        if self._folder is None or len(file) > self._max_bytes:
            return
        try:
            with self._lock:
                _write(self._folder / (digest + ENDING), file)
                self._make_room(self._folder)
        except OSError as error:
            logger.warning("a LoRA could not be kept on disk", extra={"lora": digest, "error": repr(error)})

    def drop(self, digest: str) -> None:
        """Forget one file."""
        if self._folder is not None:
            (self._folder / (digest + ENDING)).unlink(missing_ok=True)

    def _kept(self, digest: str) -> bytes | None:
        """The file if it is here and still what it was."""
        if self._folder is None:
            return None
        path = self._folder / (digest + ENDING)
        try:
            file = path.read_bytes()
            if hashlib.sha256(file).hexdigest() == digest:
                os.utime(path)
                return file
            logger.warning("a kept LoRA is damaged and goes", extra={"lora": digest})
            path.unlink(missing_ok=True)
        except OSError:
            pass  # not here, or another replica made room
        return None

    def _make_room(self, folder: Path) -> None:
        listing = _listing(folder)
        excess = sum(size for _, size, _ in listing) - self._max_bytes
        for _, size, path in listing:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _write(path: Path, file: bytes) -> None:
    """Whole or not at all."""
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


def _listing(folder: Path) -> list[tuple[float, int, Path]]:
    """(last read, bytes, path), the longest unread first."""
    found = []
    for path in folder.glob("*" + ENDING):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append((status.st_mtime, status.st_size, path))
    return sorted(found)
