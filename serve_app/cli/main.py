"""`weft`: the command line.

The module of a command is imported when that command is called: Ray alone takes a second, and
`weft --version` and `weft --help` need none of it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from dotenv import load_dotenv
from typer.core import TyperGroup
from typer.main import get_command

from deployments import __version__
from deployments.protocol.errors import BadRequest, WeftError

DOTENV = Path(__file__).resolve().parents[2] / ".env"
COMMANDS = {  # name -> (module that holds its Typer app, name of that app, help)
    "serve": (
        "serve_app.cli.serve",
        "app",
        "Start the whole service on this machine and serve until Ctrl+C.",
    ),
    "models": ("serve_app.cli.models", "app", "List the model cards, or add models from files."),
    "bench": (
        "serve_app.cli.bench",
        "app",
        "Measure a model on this machine by batch size, and keep the profile.",
    ),
    "plan": ("serve_app.cli.plan", "app", "Print how a model runs on a GPU, and the memory that it needs."),
    "verify": ("serve_app.cli.verify", "app", "Check the content credentials of a file, and print them."),
    "users": ("serve_app.cli.users", "users", "Add, list, disable and enable users."),
    "keys": ("serve_app.cli.users", "keys", "Create, list and revoke API keys."),
    "clusters": (
        "serve_app.cli.clusters",
        "app",
        "Show the clusters that share the job store, and choose which of them claims its jobs.",
    ),
    "repair": (
        "serve_app.cli.repair",
        "app",
        "Show what is wrong with the embedded job store, and mend it.",
    ),
    "doctor": (
        "serve_app.cli.doctor",
        "app",
        "Check a running installation; exit status 1 when it is unsafe.",
    ),
}


@dataclass
class Options:
    """What the command line asks for beside the command; set by `weft`, for one call of `main`."""

    debug: bool = False


options = Options()


class LazyCommands(TyperGroup):
    """The group of all commands, each imported by `get_command`."""

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: Any, name: str) -> Any:
        """The command of this name; None when there is none."""
        if name not in COMMANDS:
            return None
        module, app_name, _ = COMMANDS[name]
        return get_command(getattr(import_module(module), app_name))

    def format_commands(self, _ctx: Any, formatter: Any) -> None:
        """List the commands in the help text without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


app = typer.Typer(
    cls=LazyCommands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"weft {__version__}")
        raise typer.Exit


@app.callback()
def weft(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="When a command fails, print where in the code.")
    ] = False,
) -> None:
    """Serve diffusion models on Ray."""
    options.debug = debug
    try:
        load_dotenv(DOTENV)
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{DOTENV} cannot be read ({error}); correct it or its permissions") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 when a command failed (the reason is on stderr), 2 for a wrong command line."""
    options.debug = False
    try:
        app(args=argv, prog_name="weft")
    except SystemExit as end:
        return int(end.code or 0)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        print(f"weft: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception) -> str:
    """The reason of a failure in one line, without secrets."""
    from serve_app.setting_values import without_secrets  # not needed to print a version

    text = " ".join(str(error).split())
    if isinstance(error, WeftError | RuntimeError):
        return without_secrets(text)
    return without_secrets(f"{type(error).__name__}: {text} (weft --debug ... shows where)")
