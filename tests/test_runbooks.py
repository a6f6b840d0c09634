"""The commands that the pages for operators print: programs, subcommands, options and files that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ray.scripts.scripts import cli as ray_cli
from ray.serve.scripts import cli as serve_cli
from typer.main import get_command

from serve_app.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = ("operations", "security", "reliability", "machines", "scaling", "metrics")
WEFT = get_command(app)


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of each in a block of commands, or in code within a sentence."""
    for page in PAGES:
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
        lines = [line.partition("  #")[0] for line in blocks.splitlines()]
        sentences = re.sub(r"```.*?```", "", text, flags=re.S)
        lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", sentences)]
        for line in lines:
            for part in re.split(r"\s*(?:&&|;|\|)\s+", line):
                yield page, re.sub(r"^(?:[A-Z_]+=\S+\s+)+", "", part.strip(" ()"))


def called(program: str) -> list[tuple[str, list[str]]]:
    """(page, words) of each command of this program, also of those that `ray exec` and the like carry."""
    found = []
    for page, command in commands():
        for text in (command, *re.findall(r"'([^']+)'", command)):
            try:
                words = shlex.split(text)
            except ValueError:  # half of a quoted text
                continue
            if len(words) > 1 and words[0] == program:
                found.append((page, words[1:]))
    return found


def problem_of(command: Any, words: list[str]) -> str:
    """What of the words a command does not know; empty: nothing.

    command: one of click or of typer, which has a click of its own.
    """
    while hasattr(command, "get_command"):
        names = [word for word in words if re.fullmatch(r"[a-z][a-z-]+", word)]
        if not names:
            break
        found = command.get_command(None, names[0])
        if found is None:
            return f"no command {names[0]}"
        options = words[: words.index(names[0])]
        if wrong := unknown(command, options):
            return wrong
        command, words = found, words[words.index(names[0]) + 1 :]
    return unknown(command, words)


def unknown(command: Any, words: list[str]) -> str:
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
    given = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
    return ", ".join(sorted(given - known))


@pytest.mark.parametrize(
    ("program", "command", "at_least"),
    [("weft", lambda: WEFT, 12), ("ray", lambda: ray_cli, 4), ("serve", lambda: serve_cli, 3)],
)
def test_commands_and_their_options_exist(program: str, command: Callable[[], Any], at_least: int) -> None:
    found = called(program)

    wrong = [(page, words, text) for page, words in found if (text := problem_of(command(), words))]

    assert wrong == []
    assert len(found) >= at_least
    assert problem_of(command(), ["misspelt"]) == "no command misspelt"


def test_kustomizations_that_are_applied_exist() -> None:
    folders = [words[words.index("-k") + 1] for _, words in called("kubectl") if "-k" in words]

    assert [folder for folder in folders if not (ROOT / folder / "kustomization.yaml").exists()] == []
    assert folders


def test_scripts_and_modules_that_are_started_exist() -> None:
    scripts = [words[0] for _, words in called("sh") if words[0].endswith(".sh")]
    modules = [
        words[words.index("-m") + 1]
        for program in ("python", ".venv/bin/python")
        for _, words in called(program)
        if "-m" in words
    ]

    assert [script for script in scripts if not (ROOT / script).exists()] == []
    assert [module for module in modules if find_spec(module) is None] == []
    assert scripts
    assert "tools.cloud_check" in modules


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_outputs_and_variables_of_the_modules_exist(cloud: str) -> None:
    text = "\n".join(file.read_text() for file in (ROOT / f"configs/terraform/{cloud}").glob("*.tf"))
    outputs = set(re.findall(r'^output "(\w+)"', text, re.M))
    found = called("terraform")

    asked = {words[2] for _, words in found if words[:2] == ["output", "-raw"]}

    assert asked
    assert asked <= outputs


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = {words[0] for _, words in called("make")}

    assert [target for target in found if f"\n{target}:" not in makefile] == []
    assert found
