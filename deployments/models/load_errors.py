"""Why weights cannot be fetched or read, as an error that names the cause and the cure."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import diffusers
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from deployments.engine.device_errors import causes_of, is_device_broken
from deployments.engine.out_of_memory import in_gib, is_out_of_memory
from deployments.models.weight_cache import (
    FileNotFetched,
    cache_folder,
    hub_token,
    local_path,
    remote_bytes,
)
from deployments.protocol.card import Licence, Weights
from deployments.protocol.errors import ModelFailed, ModelUnavailable, WeftError

TOKEN = "HF_TOKEN"
# of the HTTP libraries under huggingface_hub and fsspec, by name: which one it is differs by version
NETWORK_ERRORS = frozenset(
    {
        "TransportError",
        "ConnectionError",
        "TimeoutError",
        "Timeout",
        "EndpointConnectionError",
        "ClientConnectionError",
    }
)
BUSY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_TEXT_CHARS = 500  # of a library's message in ours


def explain(error: Exception, weights: Weights, licence: Licence | None = None) -> Exception:
    """The error to raise for one that was raised while these weights were fetched or read.

    ModelUnavailable where the network or the other side may recover, ModelFailed where someone has to change
    something. A lack of memory and a broken device stay what they are: others handle them.
    licence: of the model, for the message about weights that are only given to those who accept it.
    """
    if isinstance(error, WeftError) or is_out_of_memory(error) or is_device_broken(error):
        return error
    if isinstance(error, FileNotFetched) and isinstance(error.__cause__, Exception):
        return _of_a_file(error, error.__cause__, licence)
    name = weights.path or weights.repo
    passing = _passing_reason(error)
    if passing is not None:
        return ModelUnavailable(f"the weights {name} cannot be fetched: {passing}")
    for cause in causes_of(error):
        reason = _hub_reason(cause, weights, licence) or _file_reason(cause, weights)
        if reason is not None:
            return ModelFailed(f"the weights {name} cannot be loaded: {reason}")
    return ModelFailed(
        f"the weights {name} cannot be loaded: {_text(error)}; compare the folder with the model's, and "
        "weights with the card's"
    )


def _of_a_file(error: FileNotFetched, cause: Exception, licence: Licence | None) -> Exception:
    """The error for a GGUF file that was not fetched for this cause."""
    file = error.file
    alone = Weights(repo=file.repo, revision=file.revision) if file.repo else Weights(path=file.path)
    explained = explain(cause, alone, licence)
    if not isinstance(explained, WeftError):
        return explained
    about = f"the GGUF file {file.name}, which weights.gguf of the card names, is not here"
    return type(explained)(f"{about}: {explained.message}")


def _hub_reason(cause: BaseException, weights: Weights, licence: Licence | None) -> str | None:
    """What the hub refuses and how it would not; None for another error."""
    repo, status = weights.repo, _status(cause)
    if isinstance(cause, OfflineModeIsEnabled):
        return "they are not on this node, and HF_HUB_OFFLINE forbids to fetch them; unset it once"
    if repo is None:
        return None
    page = f"https://huggingface.co/{repo}"
    if isinstance(cause, GatedRepoError) or status == 403:
        terms = f" ({licence.name}, {licence.url})" if licence is not None and licence.url else ""
        return (
            f"the hub gives them only to those who accepted their licence{terms}; accept it at {page}, and "
            f"set {TOKEN} to a token of that account that may read gated repositories{_token_state()}"
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"{page} has no revision {weights.revision!r}; correct weights.revision in the card"
    if isinstance(cause, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"the hub shows no {page} to this token; correct weights.repo in the card, or set {TOKEN} to a "
            f"token that may read it{_token_state()}"
        )
    if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
        return f"{page} lacks a file: {_text(cause)}; correct weights.variant or weights.revision in the card"
    return None


def _file_reason(cause: BaseException, weights: Weights) -> str | None:
    """What is wrong with the files or the disk; None for another error."""
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        space = _space(cause, weights)
        return f"the disk has no space for them{space}; free some, or set WEFT_MODEL_CACHE or HF_HOME"
    if isinstance(cause, PermissionError) or type(cause).__name__ == "NoCredentialsError":
        is_s3 = "s3://" in (weights.path or "")
        keys = "; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if is_s3 else ""
        return f"access is denied: {_text(cause)}{keys}"
    if isinstance(cause, SafetensorError | json.JSONDecodeError | UnicodeDecodeError):
        damaged = _damaged_file(weights) or "a file"
        return f"{damaged} is damaged or cut: {_text(cause)}; remove it and fetch it again"
    if isinstance(cause, FileNotFoundError):
        return f"{_text(cause)}; put the files there or correct the path in the card"
    if isinstance(cause, AttributeError | ImportError):
        return (
            f"diffusers {diffusers.__version__} lacks what its model_index.json names: {_text(cause)}; use "
            "weights of a pipeline that it has, or install what is missing"
        )
    return None


def _damaged_file(weights: Weights) -> str | None:
    """The first file of a local folder that cannot be read, as a path in it; None where none is found."""
    if weights.is_remote:
        return None
    folder = local_path(weights)
    for file in sorted(folder.rglob("*")):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except (OSError, ValueError, SafetensorError):
            return str(file.relative_to(folder))
    return None


def _passing_reason(error: BaseException) -> str | None:
    """What the network or the other side does not do now; None when it is none of these."""
    for cause in causes_of(error):
        if isinstance(cause, OfflineModeIsEnabled):  # a ConnectionError to huggingface_hub
            return None
        status = _status(cause)
        if status in BUSY_STATUSES:
            return f"the hub answers {status}" + (" (too many requests)" if status == 429 else "")
        if any(kind.__name__ in NETWORK_ERRORS for kind in type(cause).__mro__):
            return f"{constants.ENDPOINT} does not answer ({_text(cause)})"
    return None


def _status(cause: BaseException) -> int | None:
    """The HTTP status of an answer of the hub; None for an error that is none."""
    if not isinstance(cause, HfHubHTTPError):
        return None
    response = getattr(cause, "response", None)
    return None if response is None else int(response.status_code)


def _token_state() -> str:
    return "" if hub_token() else f" (now there is no {TOKEN})"


def _space(error: OSError, weights: Weights) -> str:
    """ " (33.0 GiB needed, 0.2 GiB free in /models)", of the disk that is full."""
    needed = remote_bytes(weights)
    folder = Path(error.filename or cache_folder(weights))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    parts = [] if needed is None else [f"{in_gib(needed)} needed"]
    parts.append(f"{in_gib(shutil.disk_usage(existing).free)} free in {existing}")
    return f" ({', '.join(parts)})"


def _text(error: BaseException) -> str:
    """The message of a library on one line, cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + " ..."
