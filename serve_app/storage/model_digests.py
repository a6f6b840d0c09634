"""What a model's weights are, by content: so that a cached picture is never that of another model.

Small files count whole. Of a large one count its size, its first mebibyte (for safetensors: the header, with
every tensor's name, shape and place) and blocks spread over the rest: weights that were trained further
differ almost everywhere, and reading tens of gigabytes would hold up the first request for minutes. Who
changes a few bytes in the middle by hand must give the folder another name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from pathlib import Path

from deployments.protocol.card import ModelCard, Weights
from deployments.protocol.request import ResolvedRequest
from serve_app.settings import ROOT

WHOLE_BYTES = 8 * 2**20  # a file up to this size is read whole
HEAD_BYTES = 2**20
BLOCK_BYTES = 2**16
BLOCKS = 32
COMMIT = re.compile(r"[0-9a-f]{40}")

_FileStats = tuple[tuple[str, int, int], ...]  # (path, size, mtime in ns) of every file


class ModelDigests:
    """Digests of weights that lie where we can see them. Folders are looked at again each time."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[_FileStats, str]] = {}

    async def of(
        self, card: ModelCard, request: ResolvedRequest, refiner: ModelCard | None
    ) -> dict[str, str] | None:
        """Digests of all weights with a part in this request, by use; None where one is not to be seen."""
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
        return None if None in digests.values() else {use: digest or "" for use, digest in digests.items()}

    def _all(self, used: dict[str, Weights]) -> dict[str, str | None]:
        return {use: self._one(weights) for use, weights in used.items()}

    def _one(self, weights: Weights) -> str | None:
        detail = f"{weights.variant or ''}/{weights.dtype}"
        if weights.path is not None:
            folder = self._folder(ROOT / Path(weights.path).expanduser())
            return None if folder is None else f"{folder}/{detail}"
        commit = _commit(weights.repo or "", weights.revision)
        return None if commit is None else f"{weights.repo}@{commit}/{detail}"

    def _folder(self, folder: Path) -> str | None:
        stats = _files(folder)
        if not stats:
            return None
        known = self._known.get(folder)
        if known is None or known[0] != stats:
            whole = hashlib.sha256()
            for name, size, _ in stats:
                whole.update(f"{name} {size} {_file_digest(folder / name, size)}\n".encode())
            known = self._known[folder] = (stats, whole.hexdigest())
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


def _commit(repo: str, revision: str) -> str | None:
    """The commit a hub revision stands for, as the download before it noted; it names the content."""
    if COMMIT.fullmatch(revision):
        return revision
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    noted = hub / f"models--{repo.replace('/', '--')}" / "refs" / revision
    commit = noted.read_text().strip() if noted.is_file() else ""
    return commit if COMMIT.fullmatch(commit) else None
