"""Files of jobs in a local directory or any fsspec file system; writes are atomic."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from deployments.protocol.errors import BadRequest, Internal, NotFound
from serve_app.job_ids import JOB_ID_PATTERN, is_job_id
from serve_app.storage.local_files import free_bytes, link_file, write_file

P = ParamSpec("P")
T = TypeVar("T")

MIN_FREE_BYTES = 256 * 2**20
EXTENSIONS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "video/mp4": "mp4",
    "video/webm": "webm",
}
MEDIA_TYPES = {extension: media_type for media_type, extension in EXTENSIONS.items()}
ADAPTER = re.compile(r"adapters/([0-9a-f]{64})\.safetensors")
PATH = re.compile(rf"(outputs|inputs)/{JOB_ID_PATTERN}/[a-z0-9_]+([.-][a-z0-9_]+)*|{ADAPTER.pattern}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that was written."""

    path: str  # relative to the root
    size_bytes: int
    sha256: str


def output_path(job_id: str, attempt: int, index: int, kind: str, media_type: str) -> str:
    """Path of a finished file of a job; it differs between attempts."""
    name = f"{attempt}-{index}" if kind == "image" else f"{attempt}-{index}-{kind}"
    return f"outputs/{job_id}/{name}.{EXTENSIONS[media_type]}"


def input_path(job_id: str, name: str) -> str:
    """Path of an input image of a job."""
    return f"inputs/{job_id}/{name}"


def adapter_path(digest: str) -> str:
    """Path of a LoRA file; all its owners share it."""
    return f"adapters/{digest}.safetensors"


def handover_path(job_id: str, attempt: int, number: int = 0) -> str:
    """Path of the state from which another attempt can resume. number: of the states of this attempt."""
    return f"inputs/{job_id}/handover-{attempt}-{number}"


class ResultStore:
    """Puts, gets and removes files under one root. Does not block the event loop.

    root: a directory or an fsspec URL.  options: further arguments of its file system.
    Failures of the storage are raised as OSError.
    """

    def __init__(
        self,
        root: str,
        min_free_bytes: int = MIN_FREE_BYTES,
        *,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(root, **options)
        except ImportError as error:
            scheme = root.partition(":")[0]
            raise BadRequest(
                f"results on {scheme} need a library: pip install 'weft[s3]' ({error})"
            ) from None
        self._local = isinstance(self._fs, LocalFileSystem)
        self._min_free_bytes = min_free_bytes

    async def put(self, path: str, data: bytes | mmap) -> StoredFile:
        """Write a file; it is durable and complete when this returns. A cancelled caller waits for that."""
        full = self._full(path)
        if self._local:
            await _in_thread(write_file, Path(full), data)
        else:
            await _in_thread(self._fs.pipe_file, full, bytes(data), **self._s3_headers(path))
        return StoredFile(path, len(data), await _in_thread(_sha256, data))

    async def get(self, path: str, *, sha256: str | None = None) -> bytes:
        """The bytes of a file. Raises NotFound, and Internal when they differ from `sha256`."""
        full = self._full(path)
        try:
            data: bytes = await _in_thread(self._fs.cat_file, full)
        except FileNotFoundError:
            raise NotFound("the file is no longer stored") from None
        if sha256 is not None and await _in_thread(_sha256, data) != sha256:
            raise Internal("the stored file is damaged; generate it again")
        return data

    async def copy(self, source: str, target: str) -> None:
        """Give a file a second name, without a copy of its bytes where possible. Raises NotFound."""
        try:
            if self._local:
                await _in_thread(link_file, Path(self._full(source)), Path(self._full(target)))
            else:
                await _in_thread(self._fs.cp_file, self._full(source), self._full(target))
        except FileNotFoundError:
            raise NotFound("the file is no longer stored") from None

    async def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes start..end of a file, both included, without a check of a digest.

        Raises NotFound.
        """
        try:
            data: bytes = await _in_thread(self._fs.cat_file, self._full(path), start=start, end=end + 1)
        except FileNotFoundError:
            raise NotFound("the file is no longer stored") from None
        return data

    async def sweep(self, job_id: str, keep: Collection[str] = ()) -> None:
        """Remove every file of a job except `keep`: inputs, and files of failed attempts."""
        await _in_thread(self._sweep, self._job(job_id), frozenset(self._full(path) for path in keep))

    async def link(self, path: str, for_s: float) -> str | None:
        """A public URL of the file, valid for `for_s`; None when the storage offers none."""
        full = self._full(path)
        try:
            url: str = await _in_thread(self._fs.sign, full, int(for_s))
        except NotImplementedError:
            return None
        return url

    async def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        await _in_thread(self._remove, self._full(path))

    async def discard(self, job_id: str, attempt: int) -> None:
        """Remove the files of one attempt."""
        await _in_thread(self._discard, self._job(job_id), f"{attempt}-")

    async def has(self, path: str) -> bool:
        """Whether the file exists."""
        return await _in_thread(self._exists, self._full(path))

    async def adapters(self) -> list[str]:
        """Digests of the stored LoRA files."""
        found = await _in_thread(self._files, f"{self._root}/adapters")
        return [match[1] for full in found if (match := ADAPTER.search(full))]

    async def jobs_older_than(self, age_s: float) -> list[str]:
        """Ids of jobs none of whose files, incomplete ones included, was written within `age_s`."""
        return await _in_thread(self._jobs_written_before, time.time() - age_s)

    async def free_space_ok(self) -> bool:
        """Whether there is disk space for new jobs; always true for object stores."""
        if not self._local:
            return True
        return await _in_thread(free_bytes, Path(self._root)) >= self._min_free_bytes

    def _full(self, path: str) -> str:
        if not PATH.fullmatch(path):
            raise NotFound("there is no such file")
        return f"{self._root}/{path}"

    def _s3_headers(self, path: str) -> dict[str, str]:
        """Headers of an S3 object, so that a browser opens a link to it as its media type."""
        if "s3" not in self._fs.protocol:
            return {}
        media_type = MEDIA_TYPES.get(path.rpartition(".")[2], "application/octet-stream")
        return {"ContentType": media_type, "CacheControl": "private, max-age=86400, immutable"}

    def _job(self, job_id: str) -> str:
        if not is_job_id(job_id):
            raise NotFound("there is no such job")
        return job_id

    def _sweep(self, job_id: str, keep: frozenset[str]) -> None:
        for directory in (f"{self._root}/outputs/{job_id}", f"{self._root}/inputs/{job_id}"):
            kept = False
            for full in self._files(directory):
                if full in keep:
                    kept = True
                else:
                    self._remove(full)
            if self._local and not kept:
                with suppress(OSError):  # it does not exist, or a lost attempt is writing into it
                    os.rmdir(directory)

    def _discard(self, job_id: str, start: str) -> None:
        for full in self._files(f"{self._root}/outputs/{job_id}"):
            if full.rpartition("/")[2].lstrip(".").startswith(start):
                self._remove(full)

    def _files(self, directory: str) -> list[str]:
        try:
            return [str(full) for full in self._fs.ls(directory, detail=False, refresh=True)]
        except FileNotFoundError:
            return []

    def _jobs_written_before(self, before: float) -> list[str]:
        newest: dict[str, float] = {}
        for folder in ("outputs", "inputs"):
            for full in self._files(f"{self._root}/{folder}"):
                job_id = full.rstrip("/").rpartition("/")[2]
                if is_job_id(job_id):
                    newest[job_id] = max(self._modified_at(full), newest.get(job_id, 0.0))
        return [job_id for job_id, written in newest.items() if written < before]

    def _modified_at(self, directory: str) -> float:
        """When the folder of a job last changed, in unix seconds."""
        if self._local:
            return Path(directory).stat().st_mtime
        found = self._fs.find(directory, detail=True).values()
        return max((entry["LastModified"].timestamp() for entry in found), default=0.0)

    def _remove(self, full: str) -> None:
        with suppress(FileNotFoundError):  # removed by a concurrent sweep
            self._fs.rm_file(full)

    def _exists(self, full: str) -> bool:
        return bool(self._fs.exists(full))


def _sha256(data: bytes | mmap) -> str:
    return hashlib.sha256(data).hexdigest()


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a function run in a thread. A cancelled caller waits: no write outlives its task."""
    running = asyncio.ensure_future(asyncio.to_thread(_as_os_error, partial(function, *args, **kwargs)))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def _as_os_error(work: Callable[[], T]) -> T:
    """The result of `work`; errors of object store clients are raised as OSError."""
    try:
        return work()
    except (OSError, NotImplementedError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def unopenable(url: str) -> str | None:
    """Why fsspec cannot open this URL: an unknown scheme, or a package that is not installed; else None."""
    scheme, _ = fsspec.core.split_protocol(url)
    try:
        fsspec.get_filesystem_class(scheme or "file")
    except (ValueError, ImportError) as error:
        return str(error)
    return None
