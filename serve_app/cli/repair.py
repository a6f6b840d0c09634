"""`weft repair`: shows what is wrong with the embedded job store, and mends it."""

from __future__ import annotations

from typing import Annotated

import typer

from serve_app.redis.append_only import inspect
from serve_app.redis.embedded import locked_log
from serve_app.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def repair(
    yes: Annotated[bool, typer.Option("--yes", help="Repair; without it, only show what is wrong.")] = False,
) -> None:
    """Show what is wrong with the embedded job store, and repair it with --yes.  Exit status 1 while damaged.

    What a repair takes out of the store's files is kept beside them.
    """
    settings = Settings.load()
    with locked_log(settings.data_dir) as (directory, server):
        while (damage := inspect(directory, server)) is not None:
            print(damage.text)
            if damage.repair is None:
                print(f"Nothing of it can be repaired; {damage.advice}.")
                raise typer.Exit(1)
            if not yes:
                loss = "nothing that was confirmed" if damage.safe else "what follows it, which may be jobs"
                print(f"`weft repair --yes` removes {loss}, and keeps a copy.")
                raise typer.Exit(1)
            print(damage.repair())
    print(f"the job store in {directory} is whole")
