"""An adapter as the register knows it (pure)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from deployments.lora_format.classify import LoraFamily
from deployments.lora_format.file_info import LoraFileInfo
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest

ID_DIGITS = 16  # of the file's digest: the same file has the same id for everybody
PUBLIC = "public"  # the owner of what everybody may use
DIGEST = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"\w[\w .+-]{0,99}")  # no colon or bracket, so that <lora:name:0.8> can say it
MAX_WORDS, MAX_WORD_CHARS, MAX_TEXT_CHARS = 16, 100, 2000

LoraSource = Literal["built-in", "upload", "url", "hub"]


@dataclass(frozen=True, slots=True)
class LoraRecord:
    """What is known of one LoRA. Its file lies under its digest."""

    id: str
    digest: str  # SHA-256 of the file, hex
    owner: str  # PUBLIC: everybody may use it
    name: str
    family: LoraFamily
    rank: int
    dtype: str
    size_bytes: int
    trigger_words: tuple[str, ...]
    description: str
    licence: str
    source: LoraSource
    created_at: float  # unix seconds; 0 for built-in ones
    model: str | None = None  # built-in: the only model it is for
    preview: bool = False  # the register has a small WebP picture of it

    def fits(self, card: ModelCard) -> bool:
        """Whether it may be used with this model, as far as its header tells."""
        return self.model in (None, card.id) and self.family in ("unknown", card.family)


LORA_RECORD = TypeAdapter(LoraRecord)


@dataclass(frozen=True, slots=True)
class LoraLabel:
    """What the one who registers an adapter says of it; None: whatever its file says."""

    name: str | None = None
    trigger_words: tuple[str, ...] | None = None
    description: str = ""
    licence: str = ""
    public: bool = False
    preview: bytes | None = None  # a small WebP picture


def lora_id(digest: str) -> str:
    return digest[:ID_DIGITS]


def make_record(
    digest: str, info: LoraFileInfo, label: LoraLabel, owner: str, source: LoraSource
) -> LoraRecord:
    """The record of a file. Raises BadRequest for a label that cannot be kept."""
    words = info.trigger_words if label.trigger_words is None else label.trigger_words
    words = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if len(words) > MAX_WORDS or any(len(w) > MAX_WORD_CHARS or not w.isprintable() for w in words):
        raise BadRequest(
            f"trigger_words are at most {MAX_WORDS}, of {MAX_WORD_CHARS} printable characters",
            param="trigger_words",
        )
    for field, text in (("description", label.description), ("licence", label.licence)):
        if len(text) > MAX_TEXT_CHARS:
            raise BadRequest(f"{field} is over {MAX_TEXT_CHARS} characters", param=field)
    return LoraRecord(
        id=lora_id(digest),
        digest=digest,
        owner=PUBLIC if label.public else owner,
        name=_name(label.name, info.name, digest),
        family=info.family,
        rank=info.rank,
        dtype=info.dtype,
        size_bytes=info.size_bytes,
        trigger_words=words,
        description=label.description,
        licence=label.licence,
        source=source,
        created_at=0.0,
        preview=label.preview is not None,
    )


def _name(wanted: str | None, by_file: str, digest: str) -> str:
    """What it is called: as wanted, else as its file says, else after its digest."""
    if wanted is None:
        return by_file if NAME.fullmatch(by_file) else f"lora-{digest[:8]}"
    if not NAME.fullmatch(wanted):
        raise BadRequest(
            "a name has 1 to 100 letters, digits, spaces or . _ + -, and begins with a letter or digit",
            param="name",
        )
    return wanted
