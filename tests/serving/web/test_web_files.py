"""Checks of the page that need no browser: nothing missing, nothing foreign, nothing inline."""

from __future__ import annotations

import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

WEB = Path(__file__).parents[3] / "serve_app" / "web"
FILES = sorted(path for path in WEB.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
STYLES = [path for path in FILES if path.suffix == ".css"]
MODULES = [
    path for path in SCRIPTS if path.name != "early.js"
]  # a plain script: it runs before the first paint
MOST_SCRIPT_BYTES = 75_000  # gzipped file by file, as they are sent
LOCALES = sorted((WEB / "locales").glob("*.json"))
OUTSIDE = {"../docs", "../api/"}  # what the ingress serves beside the page
NAMESPACES = {"http://www.w3.org/2000/svg"}  # names, not addresses


class Page(HTMLParser):
    """Every element of index.html with its attributes, and the text inside script and style."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self.feed((WEB / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("script", "style") and data.strip():
            self.inline.append(data)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _name(path: Path) -> str:
    return str(path.relative_to(WEB))


def _locale(path: Path) -> dict[str, str | dict[str, str]]:
    texts: dict[str, str | dict[str, str]] = json.loads(_text(path))
    return texts


def _places(entry: str | dict[str, str]) -> set[str]:
    forms = entry.values() if isinstance(entry, dict) else [entry]
    return {name for form in forms for name in re.findall(r"\{(\w+)\}", form)}


def _string_literals() -> set[str]:
    return {literal for path in MODULES for literal in re.findall(r'"([^"\n]*)"', _text(path))}


def test_everything_the_document_refers_to_exists() -> None:
    named = [attrs.get(key) for _, attrs in Page().elements for key in ("src", "href")]

    missing = [name for name in named if name and name not in OUTSIDE and not (WEB / name).is_file()]

    assert missing == []


@pytest.mark.parametrize("module", MODULES, ids=_name)
def test_everything_a_module_imports_exists(module: Path) -> None:
    named = re.findall(r'(?:from|import)\s*\(?\s*"(\.[^"]+)"', _text(module))
    types = {name for name in named if name.endswith("types.js")}  # types.d.ts: for the checker only

    assert [name for name in named if name not in types and not (module.parent / name).is_file()] == []


def test_files_named_in_scripts_and_styles_exist() -> None:
    named = set(re.findall(r'"((?:icons|js|css)/[\w./-]+)"', "".join(map(_text, SCRIPTS))))
    named |= set(re.findall(r"url\([\"']?([^)\"']+)", "".join(map(_text, STYLES))))

    assert [name for name in named if not (WEB / name).is_file()] == []


def test_every_module_is_preloaded_so_that_the_start_is_one_round_trip() -> None:
    elements = Page().elements
    preloaded = {attrs["href"] for tag, attrs in elements if attrs.get("rel") == "modulepreload"}
    started = {attrs["src"] for tag, attrs in elements if tag == "script" and attrs.get("type") == "module"}

    assert preloaded | started == {_name(path) for path in MODULES}


def test_all_scripts_together_stay_small() -> None:
    assert sum(len(gzip.compress(path.read_bytes())) for path in SCRIPTS) <= MOST_SCRIPT_BYTES


def test_the_document_holds_no_script_and_no_style_of_its_own() -> None:
    page = Page()

    assert page.inline == []
    assert [tag for tag, _ in page.elements if tag == "style"] == []
    for tag, attrs in page.elements:
        assert [name for name in attrs if name == "style" or name.startswith("on")] == [], tag


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_no_script_writes_markup_or_evaluates_text(script: Path) -> None:
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|[\"']style[\"']\s*[,:]"
    )

    assert re.findall(forbidden, _text(script)) == []


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".png"], ids=_name)
def test_no_file_names_another_host(path: Path) -> None:
    addresses = set(re.findall(r"(?:https?|wss?)://[\w.:/-]+", _text(path)))

    assert addresses - NAMESPACES == set()
    assert re.findall(r"[\"'(]//\w", _text(path)) == []


def test_addresses_are_relative_so_that_any_prefix_works() -> None:
    text = "".join(_text(path) for path in FILES if path.suffix in (".html", ".css", ".webmanifest"))

    assert re.findall(r"(?:src|href|url)\s*[=(:]\s*[\"']?/", text) == []


def test_every_text_the_page_asks_for_is_there_and_every_text_there_is_asked_for() -> None:
    known = set(_locale(WEB / "locales" / "en.json"))
    literals = _string_literals()
    asked = {key for path in MODULES for key in re.findall(r'\bt\(\s*"([^"]+)"', _text(path))}

    assert asked - known == set()
    assert known - literals == set()


@pytest.mark.parametrize("path", LOCALES, ids=_name)
def test_every_language_has_the_same_keys_and_places(path: Path) -> None:
    english, texts = _locale(WEB / "locales" / "en.json"), _locale(path)

    assert texts.keys() == english.keys()
    assert {key: _places(text) for key, text in texts.items()} == {
        key: _places(text) for key, text in english.items()
    }


def test_every_language_offered_has_a_file() -> None:
    offered = re.search(r"LANGUAGES = \{([^}]*)\}", _text(WEB / "js" / "i18n.js"))

    assert offered is not None
    assert sorted(re.findall(r"(\w+):", offered[1])) == [path.stem for path in LOCALES]


def test_every_icon_used_is_drawn_and_every_one_drawn_is_used() -> None:
    drawn = set(re.findall(r'<symbol id="icon-([\w-]+)"', _text(WEB / "icons" / "sprite.svg")))
    code = "".join(map(_text, MODULES))
    asked = set(re.findall(r'(?:icon|button|tool|roundButton|message)\(\s*"([\w-]+)"', code))

    assert asked <= drawn
    assert drawn - _string_literals() == set()


def test_the_manifest_names_an_app_with_icons_that_exist() -> None:
    manifest = json.loads(_text(WEB / "manifest.webmanifest"))

    assert {"name", "short_name", "start_url", "display", "icons"} <= manifest.keys()
    assert manifest["start_url"] == "./"
    for icon in manifest["icons"]:
        assert (WEB / icon["src"]).is_file()
