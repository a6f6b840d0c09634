"""The `weft` command itself: version, help, wrong command lines, and what it imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deployments import __version__
from serve_app.cli.main import COMMANDS, main

HEAVY = {"ray", "pydantic", "fastapi", "redis", "torch"}


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"weft {__version__}\n"


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_command(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main([option]) == 0

    text = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name, "--help"]) == 0
    assert f"weft {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["paint"],
        ["--verbose"],
        ["users"],
        ["users", "add"],
        ["serve", "--port", "many"],
        ["keys", "create"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_has_status_2_and_a_reason(
    capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    assert main(wrong) == 2
    assert "weft" in capsys.readouterr().err


def test_a_role_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["users", "add", "ann@example.org", "--role", "king"]) == 2
    assert "admin" in capsys.readouterr().err


def test_an_error_of_ours_has_status_1_and_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_LEESE_S", "3")

    assert main(["models"]) == 1
    assert capsys.readouterr().err.startswith("weft: unknown environment variable WEFT_LEESE_S")


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_nothing_heavy_is_imported_to_print_a_line(option: str) -> None:
    code = (
        "import sys\n"
        "from serve_app.cli.main import main\n"
        f"status = main([{option!r}])\n"
        f"loaded = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else status)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
