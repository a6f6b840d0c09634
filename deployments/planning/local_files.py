"""Where this machine keeps weights: folders that cards name, downloads, the hub's cache. Loads no torch."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from deployments.protocol.card import Weights
from deployments.protocol.gguf_file import GgufFile

ROOT = Path(__file__).resolve().parents[2]  # relative paths of weights start at the repository
MODEL_CACHE = "WEFT_MODEL_CACHE"
COMMIT = re.compile(r"[0-9a-f]{40}")


def model_cache() -> Path:
    """The folder of downloaded weights that are not the hub's."""
    return Path(os.environ.get(MODEL_CACHE) or Path.home() / ".cache" / "weft" / "models")


def gguf_file_here(file: GgufFile) -> Path | None:
    """The path of a GGUF file on this machine; None for one that has to be fetched. A local one may be
    missing."""
    if not file.is_remote:
        return ROOT / Path(str(file.path)).expanduser()
    place = _in_hub_cache(file) if file.repo is not None else fetched_path(str(file.path))
    return place if place is not None and place.is_file() else None


def pipeline_folder(weights: Weights) -> Path | None:
    """The folder on this machine that a model's weights are in, which may be missing; None for weights that
    have to be fetched."""
    if weights.path is not None:
        return None if "://" in weights.path else ROOT / Path(weights.path).expanduser()
    commit = recorded_commit(str(weights.repo), weights.revision)
    folder = None if commit is None else _hub_folder(str(weights.repo)) / "snapshots" / commit
    return folder if folder is not None and folder.is_dir() else None


def fetched_path(url: str) -> Path:
    """Where the copy of the file at this URL is, once it is fetched."""
    return model_cache() / "files" / hashlib.sha256(url.encode()).hexdigest()[:24] / url.rpartition("/")[2]


def recorded_commit(repo: str, revision: str) -> str | None:
    """The commit of a hub revision, as the download of it has recorded; it identifies the content."""
    if COMMIT.fullmatch(revision):
        return revision
    recorded = _hub_folder(repo) / "refs" / revision
    commit = recorded.read_text().strip() if recorded.is_file() else ""
    return commit if COMMIT.fullmatch(commit) else None


def _in_hub_cache(file: GgufFile) -> Path | None:
    """The place of a file in the hub's cache, as huggingface_hub lays it out."""
    commit = recorded_commit(str(file.repo), file.revision)
    return None if commit is None else _hub_folder(str(file.repo)) / "snapshots" / commit / str(file.file)


def _hub_folder(repo: str) -> Path:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    return hub / f"models--{repo.replace('/', '--')}"
