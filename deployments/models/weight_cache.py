"""A card's weights on this node: fetched once from the hub or a bucket, whichever replica comes first."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from deployments.protocol.card import Weights
from deployments.protocol.errors import ModelUnavailable

logger = logging.getLogger(__name__)

FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # of a hub repository that is no pipeline
MODEL_CACHE = "WEFT_MODEL_CACHE"  # Settings.model_cache; Ray's processes inherit it
COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # torch's own setting


def fetch(weights: Weights, *, pipeline: bool) -> None:
    """Have them on this node; quick where they are. pipeline: a whole one, not a single module.

    Raises ModelUnavailable with the reason.
    """
    began = time.monotonic()
    name = weights.path or weights.repo
    try:
        if weights.repo is not None:
            _from_hub(weights, pipeline=pipeline)
        elif "://" in (weights.path or ""):
            local_folder(str(weights.path))
    except (OSError, ValueError, ImportError) as error:
        raise ModelUnavailable(f"the weights {name} cannot be fetched: {error}") from error
    logger.info("weights are here", extra={"weights": name, "seconds": round(time.monotonic() - began, 3)})


def local_folder(url: str) -> Path:
    """The folder at this fsspec URL (s3://, gs://, file://, ...) as one on this node, fetched if need be.

    It is there whole or not at all; others on this node who want it at the same time wait for the first.
    Raises FileNotFoundError when there is nothing at the URL, OSError, ImportError without its driver.
    """
    folder = _cache() / hashlib.sha256(url.encode()).hexdigest()[:24]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _file_lock(folder.with_suffix(".lock")):
        if folder.is_dir():
            return folder
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        filesystem, path = fsspec.core.url_to_fs(url)
        if not filesystem.isdir(path):
            raise FileNotFoundError(f"there is no folder at {url}")
        filesystem.get(path.rstrip("/") + "/", f"{partial}/", recursive=True)
        partial.rename(folder)
    return folder


def _from_hub(weights: Weights, *, pipeline: bool) -> None:
    """Into the hub's own cache (HF_HOME), which locks by itself."""
    options: dict[str, Any] = {"revision": weights.revision}
    if pipeline:
        from diffusers import DiffusionPipeline

        DiffusionPipeline.download(weights.repo, variant=weights.variant, use_safetensors=True, **options)
        return
    from huggingface_hub import snapshot_download

    snapshot_download(str(weights.repo), allow_patterns=FILES, **options)


def keep_compiled_code() -> None:
    """Have torch's compiler keep its code on this node, for replicas that start later.

    Call it before torch is imported, which else chooses a temporary folder for good.
    """
    os.environ.setdefault(COMPILED, str(_cache() / "compiled"))


def _cache() -> Path:
    return Path(os.environ.get(MODEL_CACHE) or Path.home() / ".cache" / "weft" / "models")


@contextmanager
def _file_lock(lock: Path) -> Iterator[None]:
    """Among the processes of this node; a killed one lets go."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
