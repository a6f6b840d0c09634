"""One name for one thing: no class name twice, and no private words in code, docs, logs and metrics."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("serve_app/", "deployments/")
DRAWN = ("tools/tiny_models/*", "tests/tools/*", "models/*")  # what the tiny models draw: houses, trees

# Words with a meaning of their own in earlier versions, and their ordinary uses: (path, text of the line).
WORDS: dict[str, list[tuple[str, str]]] = {
    "aside": [
        ("*.html", "aside"),
        ("*.css", "aside"),
        ("*.js", "aside"),
        ("benchmarks/decode.py", '_aside|"aside"'),
        ("*", "set aside|aside from"),
    ],
    "brevity": [],
    "chore": [],
    "chores": [],
    "courier": [],
    "crowd": [("*", "prompt|a crowd of")],
    "dearest": [],
    "desk": [("*", "prompt|on a desk")],
    "desks": [],
    "floor": [("*", r"\.floor\b|rounding_mode")],
    "floors": [],
    "footage": [],
    "foresee": [],
    "foresees": [],
    "heir": [],
    "heirs": [],
    "house": [
        *((path, "") for path in DRAWN),
        ("*", "prompt|tree|drawing|picture of|a (red|brown) house|by the sea"),
    ],
    "houses": [*((path, "") for path in DRAWN)],
    "innocent": [],
    "knob": [],
    "knobs": [],
    "misfit": [],
    "misfits": [],
    "nobody": [("CHANGELOG.md", "nobody-by-default")],
    "painted": [*((path, "") for path in DRAWN), ("*", "prompt|background|colou?r")],
    "parcel": [],
    "parcels": [],
    "patiently": [],
    "reel": [],
    "roof": [("*", "prompt")],
    "room": [("*", "prompt")],
    "rooms": [],
    "sameness": [],
    "shall": [],
    "shelf": [],
    "shelves": [],
    "shell": [("*", r"nologin|shell=|bash|\bsh\b|SHELL|shell (command|script)")],
    "somebody": [],
    "stir": [],
    "stirred": [],
    "stopwatch": [],
    "stumble": [],
    "stumbled": [],
    "tell": [("*", "tell .*apart")],
    "telling": [],
    "tells": [("*", "tells .*apart")],
    "told": [("*", "told apart")],
    "twin": [],
    "twins": [],
    "visit": [],
    "visited": [("*", ":visited")],
    "visits": [],
    "weave": [],
    "weaves": [],
    "whoever": [],
    "wish": [],
    "wished": [],
    "wishes": [],
    "workshop": [],
    "worn": [],
    "woven": [],
}
# Words that no class, function, parameter or variable of the two layers is named after, but prose may use.
NAMES = set(
    """alike bank books company correction corrections gate gates halt hear heard hints luck mix mixer
    nearby news pace paces readings said say saying tally""".split()
)
SKIPPED = (
    "models/tiny",
    "docs/pictures",
    "benchmarks/plots",
    "benchmarks/results",
    "LICENSE",
    "tests/test_names.py",
)
SUFFIXES = {".css", ".html", ".js", ".md", ".mjs", ".py", ".sh", ".toml", ".ts", ".yaml", ".yml", ""}
PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of an identifier: JobDesk -> Job, Desk


def files() -> Iterator[tuple[str, str]]:
    """Path below ROOT and text of every source and documentation file."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in sorted(set(listed.splitlines())):
        if (
            (ROOT / path).is_file()
            and Path(path).suffix in SUFFIXES
            and not path.startswith(SKIPPED)
            and ROOT / path != Path(__file__)
        ):
            yield path, (ROOT / path).read_text(encoding="utf-8")


def parts(text: str) -> set[str]:
    return {part.lower() for part in PART.findall(text)}


def is_ordinary(word: str, path: str, line: str) -> bool:
    return any(fnmatch(path, glob) and re.search(text, line) for glob, text in WORDS[word])


def defined(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module defines."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name


def test_no_class_name_means_two_things() -> None:
    found = defaultdict(list)
    for path, text in files():
        if path.startswith(LAYERS) and path.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef):
                    found[node.name.strip("_")].append(f"{path}:{node.lineno}")

    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_no_private_word_comes_back() -> None:
    found = []
    for path, text in files():
        for number, line in enumerate(text.splitlines(), 1):
            words = {word for word in parts(line) & WORDS.keys() if not is_ordinary(word, path, line)}
            found += [f"{path}:{number}: {word}: {line.strip()}" for word in sorted(words)]

    assert found == [], "\n".join(found)


def test_no_name_is_made_of_a_private_word() -> None:
    found = []
    for path, text in files():
        if path.startswith(LAYERS) and path.endswith(".py"):
            names = [(0, Path(path).stem), *defined(ast.parse(text))]
            found += [f"{path}:{line}: {name}" for line, name in names if parts(name) & NAMES]

    assert found == [], "\n".join(found)
