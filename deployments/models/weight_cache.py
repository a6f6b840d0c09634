"""Weights on this node: downloaded once from the hub or a bucket, by the first replica that needs them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from deployments.planning.local_files import MODEL_CACHE, ROOT, fetched_path, model_cache
from deployments.protocol.card import Weights
from deployments.protocol.gguf_file import GgufFile
from deployments.protocol.installation import Installation, S3Access

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0  # for the size of a download
FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]  # of a single module or a Modular pipeline
WEIGHTS = (".safetensors", ".safetensors.index.json")  # of a component: not its configuration
HUB_TOKEN = "HF_TOKEN"  # read by huggingface_hub at every call
COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # torch's own setting


def use_installation(installation: Installation) -> None:
    """Have this process fetch weights as the installation says; what that leaves open is as the node says."""
    if installation.hub_token is not None:
        os.environ[HUB_TOKEN] = installation.hub_token.get_secret_value()
    if installation.model_cache is not None:
        os.environ[MODEL_CACHE] = str(installation.model_cache.expanduser())
    if installation.s3 != S3Access():
        fsspec.config.conf["s3"] = installation.s3.options


def fetch(weights: Weights, *, pipeline: bool) -> None:
    """Download the weights to this node, if they are not complete here already.

    pipeline: whether they are a whole pipeline, not a single module.
    Raises what the hub and fsspec raise: see load_errors.explain.
    """
    started = time.monotonic()
    name = weights.path or weights.repo
    if weights.repo is not None:
        hub_folder(weights, pipeline=pipeline)
    elif "://" in (weights.path or ""):
        local_folder(str(weights.path), without=tuple(weights.gguf))
    for file in weights.gguf.values():
        gguf_path(file)
    seconds = round(time.monotonic() - started, 3)
    logger.info("weights are complete", extra={"weights": name, "seconds": seconds})


def local_path(weights: Weights) -> Path:
    """The folder that a card names; a relative one is under the repository."""
    folder = Path(weights.path or "").expanduser()
    return folder if folder.is_absolute() else ROOT / folder


class FileNotFetched(Exception):
    """A GGUF file could not be downloaded. Its cause is what the hub or fsspec raised."""

    def __init__(self, file: GgufFile) -> None:
        super().__init__(f"the GGUF file {file.name} is not here")
        self.file = file


def gguf_path(file: GgufFile) -> Path:
    """The path of a GGUF file on this node, downloaded if it is not here. Raises FileNotFetched."""
    try:
        return _gguf_path(file)
    except Exception as error:
        raise FileNotFetched(file) from error


def _gguf_path(file: GgufFile) -> Path:
    if file.repo is not None:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(file.repo, str(file.file), revision=file.revision))
    if not file.is_remote:
        return ROOT / Path(str(file.path)).expanduser()
    target = fetched_path(str(file.path))

    def download(partial: Path) -> None:
        filesystem, path = fsspec.core.url_to_fs(file.path)
        if not filesystem.isfile(path):
            raise FileNotFoundError(f"there is no file at {file.path}")
        _check_space(filesystem.size(path), target.parent.parent)
        partial.mkdir()
        filesystem.get_file(path, str(partial / target.name))

    return _once(target.parent, download) / target.name


def local_folder(url: str, without: Collection[str] = ()) -> Path:
    """The local copy of the folder at this fsspec URL (s3://, gs://, file://, ...), downloaded if missing.

    It is complete or absent; other processes on this node that need it meanwhile wait for the download.
    without: components whose weights are left out.
    Raises FileNotFoundError when the URL has no folder, OSError (ENOSPC) when it is larger than the space
    left, other OSErrors, ImportError without its driver.
    """
    name = " without ".join((url, *sorted(without)))
    folder = model_cache() / hashlib.sha256(name.encode()).hexdigest()[:24]

    def download(partial: Path) -> None:
        filesystem, path = fsspec.core.url_to_fs(url)
        if not filesystem.isdir(path):
            raise FileNotFoundError(f"there is no folder at {url}")
        if not without:
            _check_space(filesystem.du(path), folder.parent)
            filesystem.get(path.rstrip("/") + "/", f"{partial}/", recursive=True)
            return
        begin = path.rstrip("/") + "/"
        sizes = filesystem.find(path, detail=True)
        wanted = {name: one["size"] for name, one in sizes.items() if not _is_left_out(name, without)}
        _check_space(sum(wanted.values()), folder.parent)
        for name in wanted:
            place = partial / name.removeprefix(begin)
            place.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(name, str(place))

    return _once(folder, download)


def _is_left_out(path: str, components: Collection[str]) -> bool:
    """Whether a file holds weights of one of these components."""
    return path.endswith(WEIGHTS) and path.split("/")[-2] in components


def _once(folder: Path, download: Callable[[Path], None]) -> Path:
    """The folder, filled by the first process of this node that needs it; it is complete or absent.

    download: puts all of it into the folder that it is given, and that is not there yet.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _file_lock(folder.with_suffix(".lock")):
        if folder.is_dir():
            return folder
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        download(partial)
        partial.rename(folder)
    return folder


def _check_space(needed: int, folder: Path) -> None:
    """Raises OSError (ENOSPC) where the disk of this folder has less."""
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def hub_folder(weights: Weights, *, pipeline: bool) -> Path:
    """The folder of a hub repository in the hub's own cache (HF_HOME), downloaded as far as it is not there.

    pipeline: whether it is a whole pipeline, not a single module. Raises what the hub raises.
    """
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": weights.revision}
    if pipeline:
        from diffusers import DiffusionPipeline

        own: dict[str, Any] = {"variant": weights.variant, "use_safetensors": True}
        own |= dict.fromkeys(weights.gguf)  # of components that are given it downloads nothing
        try:
            folder = Path(DiffusionPipeline.download(weights.repo, **options, **own))
        except OSError as error:  # a Modular pipeline has another index
            if "no file named model_index.json" not in str(error):
                raise
        else:
            if weights.gguf:
                configs = [f"{name}/config.json" for name in weights.gguf]
                snapshot_download(str(weights.repo), allow_patterns=configs, **options)
            return folder

    return Path(snapshot_download(str(weights.repo), allow_patterns=FILES, **options))


def hub_files(repo: str, patterns: Sequence[str]) -> Path:
    """The folder with the files of a hub repository whose paths match one of these patterns, downloaded where
    they are missing. Raises what the hub raises."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=[*patterns]))


def hub_token() -> str | None:
    """The hub's token, from the environment or from the file that `hf auth login` writes."""
    from huggingface_hub import get_token

    return get_token()


def cache_folder(weights: Weights) -> Path:
    """The folder of this node into which such weights are downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) if weights.repo is not None else model_cache()


def remote_bytes(weights: Weights) -> int | None:
    """About how many bytes the download of these weights has; None where the other side does not say."""
    try:
        if weights.repo is not None:
            from huggingface_hub import HfApi

            info = HfApi().model_info(
                weights.repo, revision=weights.revision, files_metadata=True, timeout=ASK_TIMEOUT_S
            )
            files = [file for file in info.siblings or () if file.rfilename.endswith(".safetensors")]
            files = [file for file in files if file.rfilename.partition("/")[0] not in weights.gguf]
            variant = f".{weights.variant}." if weights.variant else ""
            return sum(file.size or 0 for file in files if variant in file.rfilename) or None
        filesystem, path = fsspec.core.url_to_fs(weights.path)
        return int(filesystem.du(path)) or None
    except Exception as error:  # it is for a message only
        logger.info("the size of weights is not known", extra={"error": repr(error)})
        return None


def keep_compiled_code() -> None:
    """Have torch's compiler keep its code on this node, for replicas that start later.

    Call this before torch is imported: at its import, torch chooses a temporary folder otherwise.
    """
    os.environ.setdefault(COMPILED, str(model_cache() / "compiled"))


@contextmanager
def _file_lock(lock: Path) -> Iterator[None]:
    """Hold a lock among the processes of this node. It is released when its process is killed."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
