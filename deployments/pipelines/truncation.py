"""What text encoders do not read of prompts: watches the calls that a pipeline makes of its tokenizers.

Every family cuts in its own way (77 tokens of CLIP, a length of the call, templates around the prompt), so
nothing is known here of lengths: what a call was cut to is compared with the same text uncut.
"""

from __future__ import annotations

import html
import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

MAX_QUOTED_CHARS = 1_000  # of the text that was cut, in a warning
# Pipelines that encode all of a prompt and cut its embeddings, `max_sequence_length` after the template.
CUT_AFTER_ENCODING = "QwenImage"


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """How much of one text one text encoder reads."""

    encoder: str  # the component's name
    summarizes: bool  # CLIP, whose part beside another kind of encoder is a summary of the beginning
    text: str  # as the tokenizer gets it, with the template around the prompt
    kept: int  # tokens of the text
    total: int
    unread: tuple[int, int] | None  # characters of the text; None: all of it is read


Note = Callable[[TokenizedText], None]


def watch_tokenizers(pipeline: Any, max_sequence_length: int | None, note: Note) -> None:
    """Have `note` called for every text that this pipeline object (not its class) has cut to a length.

    max_sequence_length: of the request; None: the pipeline's own.
    """
    limit = _limit_after_encoding(pipeline, max_sequence_length)
    for component, part in list(vars(pipeline).items()):
        encoder = component.replace("tokenizer", "text_encoder")
        if isinstance(part, PreTrainedTokenizerBase):
            vars(pipeline)[component] = _watched(part, encoder, limit, note)
        elif isinstance(part, ProcessorMixin) and hasattr(part, "tokenizer"):
            processor = _copy(part, type(part))
            processor.tokenizer = _watched(part.tokenizer, "text_encoder", limit, note)
            vars(pipeline)[component] = processor


def cut_texts(tokenized: Iterable[TokenizedText], fields: Mapping[str, str]) -> dict[str, str]:
    """By field of the request, of which text encoders read which part and what was cut; without the fields
    that are read whole.

    fields: the texts of the request by name. CLIP does not count where an encoder of another kind reads the
    same text: it gives those models a summary of the first 77 tokens, by their design.
    """
    texts = {name: text for name, text in fields.items() if text}
    by_field: dict[str, list[TokenizedText]] = {}
    for one in dict.fromkeys(tokenized):
        for name in _fields_of(one, texts):
            by_field.setdefault(name, []).append(_within(one, texts[name]))
    messages = {}
    for name, all_of_field in by_field.items():
        full = [one for one in all_of_field if not one.summarizes] or all_of_field
        cut = [one for one in full if one.unread is not None]
        if cut:
            messages[name] = _in_words(name, cut)
    return messages


class _WatchedTokenizer:
    """Mixed into a tokenizer's class."""

    _encoder: str
    _limit: int | None  # of the tokens that the pipeline keeps of the encoded ones
    _note: Note

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        encoded = super().__call__(text, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("truncation"):
            for one in [text] if isinstance(text, str) else text or []:
                if isinstance(one, str):
                    self._note(self._tokenized(one, kwargs))
        return encoded

    def _tokenized(self, text: str, arguments: Mapping[str, Any]) -> TokenizedText:
        this: Any = self  # a tokenizer
        added = arguments.get("add_special_tokens", True)
        special = this.num_special_tokens_to_add() if added else 0
        length = arguments.get("max_length") or this.model_max_length
        kept = max(0, min(length - special, self._limit or length))
        total = self._count(text)
        if total <= kept:
            return TokenizedText(self._encoder, _is_clip(self), text, total, total, None)
        if this.truncation_side == "left":
            unread = (0, self._begin(text, total - kept))
        else:
            unread = (self._begin(text, kept), len(text))
        return TokenizedText(self._encoder, _is_clip(self), text, kept, total, unread)

    def _count(self, text: str) -> int:
        """Tokens of the text itself."""
        return len(self._uncut(text)["input_ids"])

    def _begin(self, text: str, index: int) -> int:
        """The character of the text at which its token `index` begins."""
        this: Any = self
        if this.is_fast:
            return int(self._uncut(text, return_offsets_mapping=True)["offset_mapping"][index][0])
        return bisect_right(range(len(text)), index, key=lambda end: self._count(text[:end])) - 1

    def _uncut(self, text: str, **options: Any) -> Any:
        # verbose: it would log that the text is long
        return super().__call__(text, add_special_tokens=False, verbose=False, **options)  # type: ignore[misc]


def _is_clip(tokenizer: object) -> bool:
    return type(tokenizer).__name__.startswith("CLIP")


def _watched(tokenizer: Any, encoder: str, limit: int | None, note: Note) -> Any:
    """A tokenizer over the same vocabulary."""
    watched = _copy(tokenizer, _watched_class(tokenizer.__class__))
    vars(watched).update(_encoder=encoder, _limit=limit, _note=note)
    return watched


def _copy(part: Any, as_class: type) -> Any:
    """A shallow copy; copy.copy would take apart what a tokenizer holds for pickling."""
    new: Any = object.__new__(as_class)
    vars(new).update(vars(part))
    return new


@cache
def _watched_class(tokenizer_class: type) -> type:
    return type(tokenizer_class.__name__, (_WatchedTokenizer, tokenizer_class), {})


def _limit_after_encoding(pipeline: Any, max_sequence_length: int | None) -> int | None:
    """Tokens, with those of the template before the prompt, that the pipeline keeps of the encoded ones."""
    if not type(pipeline).__name__.startswith(CUT_AFTER_ENCODING):
        return None
    own = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
    return int(pipeline.prompt_template_encode_start_idx + (max_sequence_length or own))


def _fields_of(one: TokenizedText, texts: Mapping[str, str]) -> list[str]:
    """The fields whose text the encoder got: the longest that is in it, several if they are equal.

    A text that was changed on its way counts as the prompt if it was cut.
    """
    words = _words(one.text)
    found = {name: text for name, field in texts.items() if (text := _words(field)) in words}
    if found:
        longest = max(map(len, found.values()))
        return [name for name, text in found.items() if len(text) == longest]
    return ["prompt"] if one.unread is not None and "prompt" in texts else []


def _words(text: str) -> str:
    """The text without what pipelines clean from a prompt: case, white space, punctuation, HTML's names."""
    text = html.unescape(html.unescape(text)).lower()
    return "".join(filter(str.isalnum, text)) or text.strip()


def _within(one: TokenizedText, field: str) -> TokenizedText:
    """The same with what is unread of the field alone, without the template around it."""
    begin = one.text.lower().find(field.strip().lower())
    if one.unread is None or begin < 0:
        return one
    first, last = one.unread
    unread = max(first, begin), min(last, begin + len(field.strip()))
    return replace(one, unread=unread if unread[0] < unread[1] else None)


def _in_words(field: str, cut: Sequence[TokenizedText]) -> str:
    """Encoders that read the same part are named together."""
    encoders: dict[tuple[int, int, str], list[str]] = {}
    for one in cut:
        first, last = one.unread or (0, 0)
        part = (one.kept, one.total, one.text[first:last].strip())
        names = encoders.setdefault(part, [])
        if one.encoder not in names:
            names.append(one.encoder)
    parts = [
        f"{' and '.join(names)} read {kept} of {total} tokens; not read: {_quoted(text)}"
        for (kept, total, text), names in encoders.items()
    ]
    return f"{field} is longer than this model reads. " + ". ".join(parts)


def _quoted(text: str) -> str:
    more = len(text) - MAX_QUOTED_CHARS
    return f'"{text}"' if more <= 0 else f'"{text[:MAX_QUOTED_CHARS]}" and {more} more characters'
