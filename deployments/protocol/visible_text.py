"""Text of callers as it may be shown: nothing in it steers a terminal or changes the order of reading."""

from __future__ import annotations

import unicodedata

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSAFE_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # controls, halves of surrogates, line and paragraph separators


def visible(text: str, keep: str = "") -> str:
    r"""The text with controls, separators of lines and marks of direction as \uXXXX.

    keep: those of them that stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"\\u{ord(c):04x}" if _is_unsafe(c) and c not in keep else c for c in text)


def _is_unsafe(character: str) -> bool:
    return character in _BIDI or unicodedata.category(character) in _UNSAFE_CATEGORIES
