"""Digests of model weights, so that a cached result is never one of other weights.

Small files are hashed completely. Of a large file its size, its first mebibyte (for safetensors: the header
with the name, shape and position of every tensor) and blocks spread over the rest are hashed: weights that
were trained further differ almost everywhere, and reading tens of gigabytes would delay the first request by
minutes. A change of a few bytes by hand is not noticed: rename the folder then.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from deployments.planning.local_files import gguf_file_here, recorded_commit
from deployments.protocol.card import ModelCard, Weights
from deployments.protocol.gguf_file import GgufFile
from deployments.protocol.request import ResolvedRequest
from serve_app.settings import ROOT

WHOLE_BYTES = 8 * 2**20  # a file up to this size is read completely
HEAD_BYTES = 2**20
BLOCK_BYTES = 2**16
BLOCKS = 32

_FileStats = tuple[tuple[str, int, int], ...]  # (path, size, mtime in ns) of every file


class ModelDigests:
    """Digests of weights that this process can read. Folders are checked for changes at each call."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[_FileStats, str]] = {}

    async def of(
        self, card: ModelCard, request: ResolvedRequest, refiner: ModelCard | None
    ) -> dict[str, str] | None:
        """By use, the digests of all weights that this request uses; None when one cannot be read."""
        used: dict[str, Weights] = {"model": card.weights}
        for control in request.controls:
            net = card.controls[control.type]
            parts = {"net": net.weights, "preprocessor": net.preprocessor, "detector": net.detector}
            used |= {f"{control.type}/{name}": part for name, part in parts.items() if part is not None}
        if request.refiner is not None:
            if refiner is None:
                return None
            used["refiner"] = refiner.weights
        digests = await asyncio.to_thread(self._all, used)
        if None in digests.values():
            return None
        form = {"model": f"{digests['model']}/{card.serving.quantisation}"}
        return {use: digest or "" for use, digest in digests.items()} | form

    def _all(self, used: dict[str, Weights]) -> dict[str, str | None]:
        return {use: self._one(weights) for use, weights in used.items()}

    def _one(self, weights: Weights) -> str | None:
        parts = [self._pipeline(weights)]
        parts += [self._gguf(name, file) for name, file in sorted(weights.gguf.items())]
        return None if None in parts else "/".join(str(part) for part in parts)

    def _gguf(self, name: str, file: GgufFile) -> str | None:
        """Of the file from which a component is read."""
        if file.repo is not None:
            commit = recorded_commit(file.repo, file.revision)
            return None if commit is None else f"{name}={file.name}@{commit}"
        path = gguf_file_here(file)
        if path is None or not path.is_file():
            return None
        status = path.stat()
        stats: _FileStats = ((path.name, status.st_size, status.st_mtime_ns),)
        return f"{name}={self._digest(path.parent, stats, path)}"

    def _pipeline(self, weights: Weights) -> str | None:
        detail = f"{weights.variant or ''}/{weights.dtype}"
        if weights.path is not None:
            folder = self._folder(ROOT / Path(weights.path).expanduser())
            return None if folder is None else f"{folder}/{detail}"
        commit = recorded_commit(weights.repo or "", weights.revision)
        return None if commit is None else f"{weights.repo}@{commit}/{detail}"

    def _folder(self, folder: Path) -> str | None:
        stats = _files(folder)
        return self._digest(folder, stats, folder) if stats else None

    def _digest(self, folder: Path, stats: _FileStats, key: Path) -> str:
        """Of these files of a folder, computed anew where they have changed. key: what they are known by."""
        known = self._known.get(key)
        if known is None or known[0] != stats:
            whole = hashlib.sha256()
            for name, size, _ in stats:
                whole.update(f"{name} {size} {_file_digest(folder / name, size)}\n".encode())
            known = self._known[key] = (stats, whole.hexdigest())
        return known[1]


def _files(folder: Path) -> _FileStats:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in found]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _file_digest(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        if size <= WHOLE_BYTES:
            digest.update(stream.read())
        else:
            digest.update(stream.read(HEAD_BYTES))
            for number in range(BLOCKS):
                stream.seek(HEAD_BYTES + (size - HEAD_BYTES - BLOCK_BYTES) * number // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
