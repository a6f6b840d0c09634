"""`weft models`: the model cards of this installation."""

from __future__ import annotations

import typer

from serve_app.card_settings import known_cards
from serve_app.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def models() -> None:
    """List the model cards: id, tasks, exactness, licence, and the folder or repository of the weights."""
    for card in known_cards(Settings.load()).values():
        files = (f"{name} from {file.name}" for name, file in card.weights.gguf.items())
        where = ", ".join((str(card.weights.path or card.weights.repo), *files))
        print(f"{card.id:24} {'/'.join(card.tasks):16} {card.serving.exact:8} {card.licence.name:32} {where}")
