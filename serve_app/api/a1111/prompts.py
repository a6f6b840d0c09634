"""A1111's prompt syntax (pure)."""

import re

from deployments.protocol.adjustment import Adjustment

# innermost first; no bracket within, so that no text is read twice
WEIGHTED = re.compile(r"\(([^()\[\]:<>]{1,2000}):\s*[+-]?[0-9]{1,4}(?:\.[0-9]{0,8})?\s*\)")
SCHEDULED = re.compile(r"\[[^\[\]]{0,2000}:[^\[\]]{0,2000}\]|\bAND\b|\bBREAK\b")
MAX_DEPTH = 8


def plain_prompt(prompt: str, field: str) -> tuple[str, tuple[Adjustment, ...]]:
    """The prompt without weights such as (fox:1.2), and warnings of what has no effect.

    field: of the prompt, for the warnings.
    """
    notices: list[Adjustment] = []
    text = prompt
    for _ in range(MAX_DEPTH):
        text, count = WEIGHTED.subn(r"\1", text)
        if not count:
            break
    if text != prompt:
        message = f"weights of words as in (word:1.2) have no effect here; {field} was read without them"
        notices.append(Adjustment("prompt_weights_ignored", field, message))
    if SCHEDULED.search(text):
        message = (
            f"{field} holds [a:b:0.5], AND or BREAK, which have no effect here: they are read as words; "
            "leave them out"
        )
        notices.append(Adjustment("prompt_syntax_ignored", field, message))
    return text, tuple(notices)
