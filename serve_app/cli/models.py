"""`weft models`: the model cards of this installation, and models that are added to them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from deployments.protocol.card import Dtype, ModelCard
from deployments.protocol.errors import BadRequest, WeftError
from deployments.protocol.request import Task
from serve_app.card_settings import known_cards
from serve_app.cli.add_model import UNKNOWN_LICENCE, Wanted, add_model, files_in, model_id_of
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


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """List the model cards by kind: id, tasks, exactness, memory of the device, licence, and the folder or
    repository of the weights. With add: make models of checkpoints."""
    if context.invoked_subcommand is None:
        for line in listing(known_cards(Settings.load()).values()):
            print(line)


@app.command()
def add(
    path: Annotated[
        Path, typer.Argument(help="A .safetensors file of a whole model, or a folder of such files.")
    ],
    config: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub repository of a pipeline of the same kind: its configuration, and the parts "
            "that the file lacks.  Default: the one that diffusers names for such files."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Id of the model.  Default: by the file's name.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights that are written.")] = "bfloat16",
    licence: Annotated[str, typer.Option(help="Name of the model's licence.")] = UNKNOWN_LICENCE,
    to: Annotated[
        Path | None, typer.Option(help="Folder for the models.  Default: models in WEFT_DATA_DIR.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put it in the place of a model of this id.")
    ] = False,
) -> None:
    """Make models of checkpoints in one file, such as those of Civitai: convert each to a folder, and write
    its card.

    Only safetensors files are read. What cannot be used is said with the reason, and the other files of a
    folder are imported all the same; the exit status is 1 then.
    """
    settings = Settings.load()
    files = files_in(path)
    if name is not None and len(files) > 1:
        raise BadRequest("--name is for one file; leave it out for a folder")
    wanted = Wanted(config, dtype, licence, to or settings.data_dir / "models", replace)
    failed = 0
    for file in files:
        try:
            for line in add_model(file, name or model_id_of(file), wanted, known_cards(settings), settings):
                print(line, flush=True)
        except WeftError as error:
            failed += 1
            print(f"{file.name}: {error.message}", file=sys.stderr, flush=True)
    if failed:
        raise typer.Exit(1)


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
