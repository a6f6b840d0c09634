"""Text of callers as it is written into files: no control characters, no forged lines.

Programs that read these files show the text in terminals, logs and pages, and find the settings by the
beginnings of lines. The exact text of a prompt is in the JSON, which escapes what is not written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from deployments.protocol.visible_text import visible

# how readers of A1111's form find its parts; the last line of our own begins so, too
_LINE_MARK = re.compile(r"^([^\S\n]*)(negative prompt|steps):", re.IGNORECASE | re.MULTILINE)


def prompt_lines(text: str) -> str:
    """The text for A1111's form: visible, in its own lines, none of which begins a part of that form."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _LINE_MARK.sub(r"\1\2 :", visible(text, keep="\n\t"))


def as_json(values: Mapping[str, object]) -> str:
    """JSON that contains the exact texts, and none of the characters that `visible` escapes."""
    # these characters occur within its strings only, where the escape stands for the character itself
    return visible(json.dumps(values, ensure_ascii=False))
