"""`weft models`: the model cards of this installation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

from deployments.protocol.card import ModelCard
from deployments.protocol.request import Task
from serve_app.card_settings import known_cards
from serve_app.settings import ROOT, Settings

app = typer.Typer(add_completion=False, rich_markup_mode=None)
# in the order in which they are shown
LOCAL, IMAGE, EDIT, VIDEO, GATED = (
    "in a folder of this machine",
    "image models",
    "models that edit by reference images",
    "video models",
    "models whose licence must be accepted on the hub before the download",
)
ROW = "{:24} {:16} {:8} {:>7} {:32} {}"


@app.command()
def models() -> None:
    """List the model cards by kind: id, tasks, exactness, memory of the device, licence, and the folder or
    repository of the weights."""
    for line in listing(known_cards(Settings.load()).values()):
        print(line)


def listing(cards: Iterable[ModelCard]) -> Iterator[str]:
    """The lines: a header of the columns, then each kind that has cards."""
    groups: dict[str, list[ModelCard]] = {group: [] for group in (LOCAL, IMAGE, EDIT, VIDEO, GATED)}
    for card in cards:
        groups[group_of(card)].append(card)
    yield ROW.format("id", "tasks", "exact", "memory", "licence", "weights")
    for group, members in groups.items():
        if members:
            yield f"\n{group}:"
            yield from map(_row, members)


def group_of(card: ModelCard) -> str:
    """The kind under which a card is listed."""
    if card.licence.gated:
        return GATED
    if _folder(card) is not None:
        return LOCAL
    if {Task.t2v, Task.i2v} & set(card.tasks):
        return VIDEO
    return EDIT if Task.edit in card.tasks else IMAGE


def _row(card: ModelCard) -> str:
    memory = f"{card.vram_gib:g} GiB" if card.vram_gib else "CPU" if not card.serving.num_gpus else "-"
    licence = card.licence.name if card.licence.commercial else f"{card.licence.name} (not commercial)"
    files = (f"{name} from {file.name}" for name, file in card.weights.gguf.items())
    where = ", ".join((str(card.weights.path or card.weights.repo), *files))
    folder = _folder(card)
    missing = " (missing)" if folder is not None and not folder.is_dir() else ""
    return ROW.format(card.id, "/".join(card.tasks), card.serving.exact, memory, licence, where + missing)


def _folder(card: ModelCard) -> Path | None:
    """Of the weights, where they are in a folder; None: they are fetched."""
    path = card.weights.path
    return None if path is None or "://" in path else ROOT / Path(path).expanduser()
