"""What `weft serve` checks before it starts anything: all that can be known at once, one sentence each."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deployments.planning.gguf_needs import header_of
from deployments.planning.local_files import gguf_file_here
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, ModelFailed
from serve_app.card_settings import card_notices
from serve_app.cli.ports import check_address
from serve_app.cli.serve_config import served_cards
from serve_app.redis.reachable import check_redis
from serve_app.setting_values import ignored_variables
from serve_app.settings import ROOT, Settings
from serve_app.signing import TEST_NOTICE, signing_identity

PROBE_BYTES = 64 * 2**10  # a folder that cannot take these is full
DATA_FOLDERS = ("valkey", "results", "adapter-cache")
PRIVATE_CHARS = 32  # of a generated secret, at least
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HTTP_SETTING = "--port, WEFT_PORT or http_options.port of the Serve config"


def check_start(
    settings: Settings, config: Mapping[str, Any], file: Path, report: Callable[[str], None]
) -> None:
    """Returns when the service can be started; a warning goes to `report`.

    Raises BadRequest or NotFound with one sentence on the first cause that would stop it, and its cure.
    """
    served = served_cards(config, file)
    cards = served.values()
    _check_storage(settings, cards)
    _check_model_folders(settings)
    _check_device(settings.model_device)
    _check_ray_token()
    check_weights(cards)
    check_folder(settings.data_dir, "WEFT_DATA_DIR", DATA_FOLDERS)
    if settings.model_cache is not None:
        check_folder(settings.model_cache.expanduser(), "WEFT_MODEL_CACHE")
    for name in ("api_key", "jwt_secret", "ray_token"):
        _check_kept_secret(settings.data_dir / name)
    free = shutil.disk_usage(settings.data_dir).free
    if free < settings.min_free_bytes:
        report(
            f"warning: {free / 2**20:.0f} MiB are free at {settings.data_dir}, and jobs are refused below "
            f"{settings.min_free_bytes / 2**20:.0f} MiB (WEFT_MIN_FREE_BYTES)"
        )
    check_ports(config)
    if settings.redis_url is not None:
        check_redis(settings.redis_url.get_secret_value(), settings.redis_prefix)
    for notice in (*ignored_variables(Settings.model_fields), *card_notices(served, settings)):
        report(notice)
    identity = signing_identity(settings)  # raises BadRequest for certificates that cannot be read
    if identity is not None and identity.is_test:
        report(TEST_NOTICE)


def check_ports(config: Mapping[str, Any]) -> None:
    """Raises BadRequest unless every port that the Serve config chooses is free."""
    http = config["http_options"]
    check_address(http["host"], http["port"], "HTTP", HTTP_SETTING)
    grpc = config.get("grpc_options") or {}
    if grpc.get("grpc_servicer_functions"):
        # Serve binds it to all interfaces
        check_address("0.0.0.0", grpc.get("port", 9000), "gRPC", "grpc_options.port of the Serve config")


def check_folder(folder: Path, variable: str, parts: Iterable[str] = ()) -> None:
    """Create the folder, and write to it. Raises BadRequest when that is not possible.

    parts: folders in it that must be usable where they exist; others, such as lost+found, are not ours.
    """
    cure = f"correct {variable}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in (folder, *(folder / name for name in parts)):
            if part.exists() and not part.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(part))
            if part.exists() and not os.access(part, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "permission denied", str(part))
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * PROBE_BYTES)
    except (FileExistsError, NotADirectoryError) as error:
        where = error.filename or folder
        raise BadRequest(f"{where} cannot be a folder: it or one above it is a file; {cure}") from None
    except OSError as error:
        if error.errno in FULL:
            raise BadRequest(f"the disk of {folder} is full; free some space, or {cure}") from None
        where = error.filename or folder
        raise BadRequest(
            f"{where} cannot be written ({error.strerror}); give this user the permission, or {cure}"
        ) from None


def check_weights(cards: Iterable[ModelCard]) -> None:
    """Raises BadRequest for the first card whose local weights or LoRAs are not there."""
    for card in cards:
        for weights in card.all_weights:
            if not weights.is_remote:
                folder = ROOT / Path(str(weights.path)).expanduser()
                if not folder.is_dir() or not any(folder.iterdir()):
                    raise BadRequest(
                        f"the weights of {card.id} are missing: there is nothing in {folder}; put them "
                        "there, correct weights.path in its card, or take the model out of the Serve config"
                    )
        _check_gguf(card)
        for adapter in card.adapters:
            if not (ROOT / Path(adapter.path).expanduser()).is_file():
                raise BadRequest(
                    f"the LoRA {adapter.id} of {card.id} is missing: there is no file {adapter.path}; "
                    "correct adapters in its card"
                )


def _check_gguf(card: ModelCard) -> None:
    """Raises BadRequest for a GGUF file of this machine that is missing or cannot be used."""
    for name, file in card.weights.gguf.items():
        try:
            path = gguf_file_here(file)
            if path is not None:
                header_of(path)
        except ModelFailed as error:
            raise BadRequest(f"the weights of {name} of {card.id} cannot be used: {error.message}") from None


def _check_model_folders(settings: Settings) -> None:
    """Raises BadRequest unless the folders with base models are there."""
    folders = {
        "MODEL_CHECKPOINT_DIR": settings.model_checkpoint_dir,
        "MODEL_REFINER_CHECKPOINT_DIR": settings.model_refiner_checkpoint_dir,
    }
    for name, folder in folders.items():
        if folder is None or folder.is_dir():
            continue
        cause = (
            "is a file, and models are read from folders in diffusers' layout: save it as one by "
            "from_single_file and save_pretrained of its pipeline"
            if folder.is_file()
            else "is not there; correct it, or take it out"
        )
        raise BadRequest(f"{name} names {folder}, which {cause}")


def _check_device(wanted: str | None) -> None:
    """Raises BadRequest for a device that this machine does not have. Torch is asked in another process."""
    if wanted in (None, "cpu"):
        return
    command = [sys.executable, "-m", "deployments.models.devices", "list"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode:
        return  # the replica says why
    there: list[str] = json.loads(asked.stdout)
    if not any(name == wanted or name.startswith((f"{wanted} ", f"{wanted}:")) for name in there):
        raise BadRequest(f"MODEL_DEVICE is {wanted}, and this machine has {', '.join(there)}")


def _check_storage(settings: Settings, cards: Iterable[ModelCard]) -> None:
    """Raises BadRequest when the place for results, or a bucket with weights, cannot be used as it is set."""
    if settings.results_root.startswith("s3://"):
        _check_bucket(settings, f"results go to {settings.results_root}")
        return
    _check_results_url(settings.results_url)
    for place in (place for card in cards for place in _paths(card)):
        if place.startswith("s3://"):
            _check_bucket(settings, f"weights come from {place}")
            return
    for name in ("S3_ENDPOINT_URL", "S3_ENDPOINT", "S3_REGION"):
        if any(os.environ.get(prefix + name) for prefix in ("", "WEFT_")):
            raise BadRequest(
                f"{name} is set without a bucket, so results would be kept at {settings.results_root}; "
                f"set S3_BUCKET_NAME too, or take {name} out"
            )


def _paths(card: ModelCard) -> Iterator[str]:
    """Where its weights are that are not on the hub."""
    for weights in card.all_weights:
        paths = [weights.path, *(file.path for file in weights.gguf.values())]
        yield from (path for path in paths if path is not None)


def _check_bucket(settings: Settings, use: str) -> None:
    """Raises BadRequest when s3:// addresses cannot be opened. use: what for, to begin a sentence."""
    key, secret = settings.aws_access_key_id, settings.aws_secret_access_key
    if (key is None) != (secret is None):
        missing = "AWS_ACCESS_KEY_ID" if key is None else "AWS_SECRET_ACCESS_KEY"
        raise BadRequest(
            f"{use}, and {missing} is not set; set both parts of the key, or neither to use the role of the "
            "machine"
        )
    if settings.s3_endpoint_url and urlsplit(settings.s3_endpoint_url).scheme not in ("http", "https"):
        raise BadRequest("S3_ENDPOINT_URL must begin with https://, such as https://account.example.com")
    if importlib.util.find_spec("s3fs") is None:
        raise BadRequest(f"{use}, and s3fs is not installed; run pip install 'weft[s3]'")


def _check_results_url(url: str) -> None:
    """Raises BadRequest for a scheme that cannot be opened, and for a folder that cannot be written."""
    if not url:
        return
    if "://" not in url:
        check_folder(Path(url), "WEFT_RESULTS_URL")
        return
    from serve_app.storage.results import unopenable  # fsspec takes a tenth of a second

    if reason := unopenable(url):
        raise BadRequest(
            f"WEFT_RESULTS_URL cannot be opened ({reason}); write a folder, or s3://bucket/folder"
        )


def _check_ray_token() -> None:
    """Raises BadRequest for what Ray itself would end the process for, without a sentence."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() not in ("", "token", "disabled"):
        raise BadRequest(f"RAY_AUTH_MODE is {mode!r}; set it to token, or leave it out")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and mode.lower() != "disabled" and not _has_text(Path(path).expanduser()):
        raise BadRequest(
            f"RAY_AUTH_TOKEN_PATH names {path}, which is missing, empty or not readable; correct it, or "
            "leave it out and a token is generated"
        )


def _check_kept_secret(path: Path) -> None:
    """Raises BadRequest for a generated secret that was cut or cannot be read."""
    if not path.exists():
        return
    try:
        length = len(path.read_text(encoding="ascii").strip())
    except (OSError, UnicodeDecodeError):
        length = 0
    if length < PRIVATE_CHARS:
        raise BadRequest(
            f"{path} should hold a generated secret and is cut or not readable; delete it, and the next "
            "start generates a new one"
        )


def _has_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False
