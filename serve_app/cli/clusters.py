"""`weft clusters`: the Ray clusters that share the job store, and which of them claims its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated

import typer

from serve_app.cli.store_url import store_url
from serve_app.jobs.store.clusters import ClusterRecord
from serve_app.jobs.store.start_estimate import CAPACITY_TTL_S
from serve_app.jobs.store.store import JobStore
from serve_app.redis.transactions import clock_us, connect
from serve_app.settings import Settings

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Show the Ray clusters that share the job store, and choose which of them claims its jobs.",
)

ClusterArgument = Annotated[str, typer.Argument(metavar="cluster", help="Id that weft clusters list shows.")]


@app.command("list")
def list_clusters() -> None:
    """List the clusters that used the store within a day, the newest last."""

    async def list_all(store: JobStore) -> str:
        records, now_us = await store.clusters.all(), await clock_us(store.redis)
        return "\n".join(_line(record, now_us) for record in records) or "no cluster uses this store"

    _run(list_all)


@app.command("stop")
def stop_cluster(cluster: ClusterArgument) -> None:
    """Have a cluster claim no more jobs.  Those that run there end."""

    async def stop(store: JobStore) -> str:
        await store.clusters.stop(cluster)
        return f"{cluster} claims no more jobs; weft clusters use {cluster} takes this back"

    _run(stop)


@app.command("use")
def use_cluster(cluster: ClusterArgument) -> None:
    """Have a cluster claim jobs in place of the others, as soon as it is ready."""

    async def use(store: JobStore) -> str:
        await store.clusters.use(cluster)
        return f"{cluster} claims jobs as soon as it is ready; the others end those that they run"

    _run(use)


def _line(record: ClusterRecord, now_us: int) -> str:
    if now_us - record.seen_us > CAPACITY_TTL_S * 1_000_000:
        state = "gone"
    elif record.stopped:
        state = "stopped"
    else:
        state = "ready" if record.ready else "starting"
    since = datetime.fromtimestamp(record.since_us / 1e6, UTC).isoformat(" ", "seconds")
    return f"{record.id:24} {state:9} {record.release:10} since {since}  {record.place}"


def _run(command: Callable[[JobStore], Awaitable[str]]) -> None:
    """Print what `command` returns for the job store of this installation. Raises WeftError, RuntimeError."""
    settings = Settings.load()

    async def run(url: str) -> str:
        async with connect(url) as redis:
            return await command(JobStore(redis, settings))

    with store_url(settings) as url:
        print(asyncio.run(run(url)), flush=True)
