"""The documents are well formed and name only what exists: files, modules, make targets, settings, links."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deployments.observability.declarations import METRICS
from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.settings import Settings

ROOT = Path(__file__).parent.parent
MAX_COLUMNS = 110
GENERATED = {"benchmarks/results.md"}  # tables of figures with their commands
ENDINGS = "py|md|yaml|yml|toml|sh|svg|jsonl|html|js"
PATH = re.compile(rf"\.?[A-Za-z0-9_][\w.-]*(?:/[\w.-]+)*\.(?:{ENDINGS})|[\w.-][\w./-]*/")
MODULE = re.compile(r"(?:serve_app|deployments|tests|tools|examples|benchmarks)(?:\.\w+)+(?::\w+)?")
NO_PROSE = re.compile(r"#|\||!\[|```|<|[-*] ")
CODE = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"[A-Z][a-z]+(?:[A-Z][a-z0-9]+)+|test_\w+")
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
SETTING = re.compile(r"\bWEFT_[A-Z0-9_]+\b")
MADE_WHILE_IT_RUNS = {"secrets/", "compiled/", "data/"}


@cache
def tracked() -> frozenset[str]:
    """Every file of the repository, and every folder that has one, with a slash at its end."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    files = {name for name in listed if name and (ROOT / name).exists()}
    folders = {f"{parent}/" for name in files for parent in Path(name).parents if str(parent) != "."}
    return frozenset(files | folders)


def pages() -> list[str]:
    """Every Markdown file that is written by hand, relative to the root."""
    return sorted(name for name in tracked() if name.endswith(".md") and name not in GENERATED)


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines outside of fenced code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def summary_faults(text: str) -> list[str]:
    """A title, an empty line, three lines of prose, an empty line."""
    lines = [*text.splitlines(), "", "", "", "", "", ""]
    if not lines[0].startswith("# "):
        return ["the first line is no title"]
    summary = lines[2:5]
    if lines[1] or lines[5] or not all(line and not NO_PROSE.match(line) for line in summary):
        return ["the title is not followed by a paragraph of three lines"]
    return []


def long_lines(text: str) -> list[str]:
    """Lines over MAX_COLUMNS. Rows of tables are exempt, and the addresses of links do not count."""
    return [
        f"line {number} has {len(line)} characters"
        for number, line in enumerate(text.splitlines(), 1)
        if not line.startswith("|") and len(re.sub(r"\]\([^)]*\)", "]", line)) > MAX_COLUMNS
    ]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    titles = [line.lstrip("#").strip().lower() for _, line in prose(text) if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}


def broken_links(text: str, page: str) -> list[str]:
    """Relative links to files that do not exist, or to headings that their page does not have."""
    broken = []
    for number, line in prose(text):
        for target in LINK.findall(line):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
                broken.append(f"line {number}: {target}")
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths and modules in code spans that name no file: from the root, or the end of a longer path."""
    missing = []
    for number, line in prose(text):
        for span in CODE.findall(line):
            for word in re.split(r"[\s,;]+", span):
                name = word.partition("::")[0]
                if (
                    PATH.fullmatch(name)
                    and "..." not in name
                    and name not in MADE_WHILE_IT_RUNS
                    and not known(name)
                ):
                    missing.append(f"line {number}: {name}")
                if MODULE.fullmatch(name) and not module_exists(name):
                    missing.append(f"line {number}: {name}")
    return missing


def known(name: str) -> bool:
    """Whether it is a file or folder, or the end of its path; or a folder that Weft makes while it runs."""
    made = "..." in name or name in MADE_WHILE_IT_RUNS
    return made or name in tracked() or any(path.endswith(f"/{name}") for path in tracked())


def module_exists(name: str) -> bool:
    """`a.b`, `a.b:name` or `a.b.name`, where a/b.py or the package a/b mentions the name."""
    module, _, attribute = name.partition(":")
    parts = module.split(".")
    for length in (len(parts), len(parts) - 1):
        path, rest = "/".join(parts[:length]), parts[length:]
        wanted = [*rest, *([attribute] if attribute else [])]
        for file in (ROOT / f"{path}.py", ROOT / path / "__init__.py", ROOT / path / "__main__.py"):
            if file.exists() and all(
                re.search(rf"\b{word}\b", file.read_text(encoding="utf-8")) for word in wanted
            ):
                return True
    return False


@cache
def identifiers() -> frozenset[str]:
    """Every word of our Python files, this one left out."""
    files = (name for name in tracked() if name.endswith(".py") and name != "tests/test_docs.py")
    words = (re.findall(r"\w+", (ROOT / name).read_text(encoding="utf-8")) for name in files)
    return frozenset(word for found in words for word in found)


def unknown_names(text: str) -> list[str]:
    """Names of classes and tests in code spans that no Python file has."""
    unknown = []
    for number, line in prose(text):
        for span in CODE.findall(line):
            name = span.partition("(")[0].rpartition("::")[2]
            if NAME.fullmatch(name) and name not in identifiers():
                unknown.append(f"line {number}: {name}")
    return unknown


def unknown_targets(text: str, makefile: str) -> list[str]:
    """`make` targets in code that the Makefile does not have."""
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = re.findall(r"(?:`|^\s*)make ([a-z][\w-]*)", text, re.MULTILINE)
    return sorted(set(named) - targets)


def unknown_settings(text: str) -> list[str]:
    """Names of environment variables that Settings does not read."""
    settings = {f"WEFT_{name.upper()}" for name in Settings.model_fields}
    return sorted(set(SETTING.findall(text)) - settings)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in pages() if page.startswith("docs/")])
def test_every_page_of_docs_starts_with_three_lines_of_summary(page: str) -> None:
    assert summary_faults(read(page)) == []


@pytest.mark.parametrize("page", pages())
def test_no_line_is_longer_than_110_characters(page: str) -> None:
    assert long_lines(read(page)) == []


@pytest.mark.parametrize("page", pages())
def test_every_relative_link_leads_somewhere(page: str) -> None:
    assert broken_links(read(page), page) == []


@pytest.mark.parametrize("page", pages())
def test_every_path_and_module_that_is_named_exists(page: str) -> None:
    assert missing_paths(read(page)) == []


@pytest.mark.parametrize("page", pages())
def test_every_class_and_test_that_is_named_exists(page: str) -> None:
    assert unknown_names(read(page)) == []


@pytest.mark.parametrize("page", pages())
def test_every_make_target_that_is_named_exists(page: str) -> None:
    assert unknown_targets(read(page), read("Makefile")) == []


@pytest.mark.parametrize("page", pages())
def test_every_setting_that_is_named_exists(page: str) -> None:
    assert unknown_settings(read(page)) == []


def metric_descriptions(text: str) -> dict[str, str]:
    """What the tables of a page say of each metric."""
    return dict(re.findall(r"^\| `(weft_\w+)` \|[^|]*\|[^|]*\| (.*) \|$", text, re.MULTILINE))


def test_the_docs_describe_each_metric_as_its_help_text_does() -> None:
    described = metric_descriptions(read("docs/metrics.md"))

    assert described == {name: metric.description for name, metric in METRICS.items()}


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    """What GET /openapi.json answers."""

    async def states() -> dict[str, str]:
        return {}

    services: Any = None  # the description calls none
    state = ApiState(job_service=services, cards={}, settings=Settings.load(), model_states=states)
    described: dict[str, Any] = create_app(state).openapi()
    return described


def routes(text: str) -> set[str]:
    """Paths with the names of their parameters left out."""
    return {re.sub(r"{[^}]*}", "{}", path) for path in re.findall(r"(?<![\w.}/:$])/[a-z][\w{}/.-]*", text)}


def test_the_api_page_names_every_route_and_no_other(openapi: dict[str, Any]) -> None:
    named = routes("\n".join(line for _, line in prose(read("docs/api.md"))))
    served = routes("\n".join(openapi["paths"]))

    assert served <= named
    beside = {"/docs", "/openapi.json", "/ui/", "/v1/", "/ws/{}"}  # not described by OpenAPI
    assert named - served == beside


def test_the_api_page_names_every_field_of_a_request(openapi: dict[str, Any]) -> None:
    words = set(re.findall(r"\w+", read("docs/api.md")))
    contents = [
        content["schema"]
        for path, methods in openapi["paths"].items()
        for method in methods.values()
        for content in method.get("requestBody", {}).get("content", {}).values()
        if not path.startswith(("/admin/", "/auth/"))
    ]

    fields = {field.partition("[")[0] for schema in contents for field in schema["properties"]}
    assert len(fields) > 40
    assert fields - words == set()


def test_the_structure_page_names_every_package_and_loose_module_of_both_layers() -> None:
    named = set(CODE.findall(read("docs/structure.md")))
    top = {
        f"{path.name}/" if path.is_dir() else path.name
        for layer in ("serve_app", "deployments")
        for path in (ROOT / layer).iterdir()
        if not path.name.startswith((".", "_")) and (path.suffix == ".py" or any(path.glob("*.*")))
    }  # a folder that holds only byte code was left behind by an earlier commit

    assert len(top) > 20
    assert top - named == set()


def test_the_engine_page_names_every_module_of_the_engine() -> None:
    page = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    modules = {f"engine/{path.name}" for path in (ROOT / "deployments" / "engine").glob("[!_]*.py")}

    assert {module for module in modules if f"`{module}`" not in page} == set()


def test_the_glossary_has_thirty_terms_in_order_each_once() -> None:
    terms = re.findall(r"^\| ([a-z][a-z ,]*) \|", read("docs/glossary.md"), re.MULTILINE)[1:]

    assert len(terms) >= 30
    assert terms == sorted(set(terms))


GOOD = "# Title\n\nOne line,\nanother one\nand a third.\n\n## More\n"


@pytest.mark.parametrize(
    "page",
    [
        "One line,\nanother one\nand a third.\n",
        "# Title\nOne line,\nanother one\nand a third.\n",
        "# Title\n\nOne line,\nanother one.\n\n## More\n",
        "# Title\n\nOne line,\nanother one,\na third,\nand a fourth.\n",
        "# Title\n\n| a | table |\n| --- | --- |\n| 1 | 2 |\n",
    ],
)
def test_a_page_without_its_summary_is_found(page: str) -> None:
    assert summary_faults(GOOD) == []
    assert summary_faults(page)


def test_a_long_line_is_found_but_not_a_row_or_an_address() -> None:
    link = f"see [there](https://example.org/{'x' * 200})"

    assert long_lines("x" * 110) == long_lines(f"| {'x' * 200} |") == long_lines(link) == []
    assert long_lines("a\n" + "x" * 111) == ["line 2 has 111 characters"]


def test_a_broken_link_is_found() -> None:
    text = "[a](api.md) [b](nowhere.md) [c](api.md#no-such-heading) [d](https://example.org)"

    assert broken_links(text, "docs/page.md") == ["line 1: nowhere.md", "line 1: api.md#no-such-heading"]


def test_a_path_or_module_that_does_not_exist_is_found() -> None:
    text = "`serve_app/settings.py` `settings.py` `serve_app/nothing.py` `engine/` `no_engine/`"
    modules = "`serve_app.app:build` `serve_app.settings` `serve_app.app:no_such` `serve_app.nowhere`"

    assert missing_paths(text) == ["line 1: serve_app/nothing.py", "line 1: no_engine/"]
    assert missing_paths(modules) == ["line 1: serve_app.app:no_such", "line 1: serve_app.nowhere"]


def test_a_class_or_test_that_does_not_exist_is_found() -> None:
    text = "`GenerationRequest(...)` `NoSuchRequest` `test_no_such_thing` `test_a.py::test_no_other_thing`"

    assert unknown_names(text) == [
        "line 1: NoSuchRequest",
        "line 1: test_no_such_thing",
        "line 1: test_no_other_thing",
    ]


def test_a_make_target_or_setting_that_does_not_exist_is_found() -> None:
    assert unknown_targets("`make serve`, `make tea`\n\n    make coffee\n", "serve:\n") == ["coffee", "tea"]
    assert unknown_settings("`WEFT_PORT` and `WEFT_PROT`") == ["WEFT_PROT"]
