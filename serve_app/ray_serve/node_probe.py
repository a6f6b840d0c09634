"""What a node of a Ray cluster can reach, write and run, found by tasks on that node."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil

from deployments import __version__
from deployments.protocol.errors import WeftError
from deployments.spot_notices import find_service
from serve_app.ray_serve.node_types import read_node_types
from serve_app.ray_serve.private_api import HEAD_STORE_PASSWORD, HEAD_STORE_USER, HEAD_STORE_VARIABLE
from serve_app.redis.info import RedisInfo, query_info
from serve_app.redis.reachable import check_redis
from serve_app.settings import ROOT, Settings
from serve_app.storage.results import ResultStore, input_path

PACKAGES = ("ray", "torch", "diffusers", "transformers")
GPUS_TIMEOUT_S = 120.0
MARK = "doctor"  # name of the file that a node stores
PREFIX_OF_RAY = "RAY"  # of the keys of a head that keeps its state
CONFIG_OPTION, ADDRESS_OPTION = "--autoscaling-config=", "--gcs-address="  # of Ray's autoscaler


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The answers of one node. Texts are empty where nothing is wrong."""

    token: str = ""  # RAY_AUTH_MODE
    versions: Mapping[str, str] = field(default_factory=dict)  # by package
    settings: str = ""  # why they cannot be read; then nothing below is known
    store: str = ""  # why the job store cannot be used
    clock_ahead_s: float | None = None  # of the job store's clock to this node's
    storage: str = ""  # why a file cannot be stored
    folders: Mapping[str, str] = field(default_factory=dict)  # those that cannot be written, with the reason
    gpus: tuple[str, ...] = ()  # that torch computes on
    gpu_failure: str = ""  # why not on others
    gpus_are_logical: bool = False
    metadata_url: str = ""  # where notices of the cloud are read; empty: not at all
    metadata_answers: bool = False
    store_of_ray: RedisInfo | None = None  # of a head that keeps its state
    store_of_ray_failure: str = ""
    store_is_shared: bool = False  # whether jobs and Ray's state are in one server
    node_types: Mapping[str, Mapping[str, float]] | None = None  # that Ray's autoscaler may start, on a head


def probe_node(*, gpus: bool, head_of: str | None, mark: str) -> NodeFacts:
    """What this process finds on its node.

    gpus: look for GPUs, which imports torch. head_of: the address of the cluster whose head this is.
    mark: id under which a file is stored; `remove_mark` removes it.
    """
    facts = NodeFacts(token=os.environ.get("RAY_AUTH_MODE", "").lower(), versions=_versions())
    try:
        settings = Settings.load()
    except WeftError as error:
        return replace(facts, settings=error.message)
    store, clock_ahead_s = _store(settings)
    facts = replace(
        facts,
        store=store,
        clock_ahead_s=clock_ahead_s,
        storage=_store_mark(settings, mark),
        folders=dict(_unwritable(settings)),
        gpus_are_logical=settings.logical_gpus,
        metadata_url=settings.metadata_url,
        metadata_answers=bool(settings.metadata_url) and find_service(settings.metadata_url) is not None,
    )
    if gpus:
        names, failure = _gpus()
        facts = replace(facts, gpus=names, gpu_failure=failure)
    if head_of is not None:
        facts = _with_store_of_ray(replace(facts, node_types=_node_types(head_of)), settings)
    return facts


def read_marks(marks: list[str]) -> list[str]:
    """Those of these ids whose file this node does not find in the storage."""
    results = _results(Settings.load())

    async def read() -> list[str]:
        return [mark for mark in marks if not await results.has(input_path(mark, MARK))]

    return asyncio.run(read())


def remove_mark(mark: str) -> None:
    """Remove the file that `probe_node` stored. Raises OSError."""
    asyncio.run(_results(Settings.load()).sweep(mark))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "weft": f"{__version__} (code {_code_digest()})"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _code_digest() -> str:
    """Eight hex digits that differ where our source files do."""
    digest = hashlib.sha256()
    for folder in ("deployments", "serve_app"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _store(settings: Settings) -> tuple[str, float | None]:
    if settings.redis_url is None:
        return "REDIS_URL is not set for the Ray processes of this node", None
    url = settings.redis_url.get_secret_value()
    try:
        check_redis(url, settings.redis_prefix)
        return "", query_info(url, settings.redis_prefix).clock_ahead_s
    except (WeftError, RuntimeError) as error:
        return str(error), None


def _results(settings: Settings) -> ResultStore:
    return ResultStore(settings.results_root, settings.min_free_bytes, options=settings.results_options)


def _store_mark(settings: Settings, mark: str) -> str:
    async def write_and_read() -> str:
        results = _results(settings)
        stored = await results.put(input_path(mark, MARK), mark.encode())
        return (
            "" if await results.get(stored.path) == mark.encode() else "it returns other bytes than written"
        )

    try:
        return asyncio.run(write_and_read())
    except (OSError, WeftError) as error:
        return f"{type(error).__name__}: {error}"


def _unwritable(settings: Settings) -> Iterator[tuple[str, str]]:
    """The folders of weights, compiled code and LoRA files that cannot be written, each with the reason."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    cache = settings.model_cache or Path.home() / ".cache/weft/models"
    for folder in (hub, cache.expanduser(), settings.adapter_cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            yield str(folder), error.strerror or str(error)


def _gpus() -> tuple[tuple[str, ...], str]:
    hidden = ("CUDA_VISIBLE_DEVICES",)  # by Ray, of a task that asks for no GPU
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deployments.models.usable_gpus"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=GPUS_TIMEOUT_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return (), f"torch gives no answer within {GPUS_TIMEOUT_S:.0f} s"
    except subprocess.CalledProcessError as error:
        return (), (error.stderr.strip().splitlines() or ["torch cannot be asked"])[-1]
    names, failure = json.loads(done.stdout.splitlines()[-1])
    return tuple(names), failure


def _with_store_of_ray(facts: NodeFacts, settings: Settings) -> NodeFacts:
    """The facts, with those of the server of RAY_REDIS_ADDRESS where the head has one."""
    address = os.environ.get(HEAD_STORE_VARIABLE, "")
    if not address:
        return facts
    scheme, _, place = address.rpartition("://")
    user, password = (
        quote(next((os.environ[name] for name in names if os.environ.get(name)), ""), safe="")
        for names in (HEAD_STORE_USER, HEAD_STORE_PASSWORD)
    )
    url = f"{scheme or 'redis'}://{f'{user}:{password}@' if password else ''}{place}"
    jobs = settings.redis_url.get_secret_value() if settings.redis_url is not None else ""
    is_shared = (urlsplit(url).hostname, urlsplit(url).port) == (urlsplit(jobs).hostname, urlsplit(jobs).port)
    try:
        return replace(facts, store_of_ray=query_info(url, PREFIX_OF_RAY), store_is_shared=is_shared)
    except RuntimeError as error:
        return replace(facts, store_of_ray_failure=str(error), store_is_shared=is_shared)


def _node_types(cluster: str) -> dict[str, dict[str, float]] | None:
    """By name, the resources of each node type that this cluster's autoscaler, which runs here, may start."""
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            options = [part for part in command if part.startswith(CONFIG_OPTION)]
            if options and f"{ADDRESS_OPTION}{cluster}" in command:
                return read_node_types(Path(options[0].removeprefix(CONFIG_OPTION)))
        except (psutil.Error, OSError, ValueError):
            continue
    return None
