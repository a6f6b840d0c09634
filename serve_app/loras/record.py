"""A LoRA as the registry stores it (pure)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import TypeAdapter

from deployments.lora_format.classify import LoraFamily
from deployments.lora_format.file_info import LoraFileInfo
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest

ID_DIGITS = 16  # of the file's digest: the same file has the same id for every owner
PUBLIC = "public"  # the owner of LoRAs that every caller may use
NAME = re.compile(r"\w[\w .+-]{0,99}")  # no colon or bracket, so that it can stand in <lora:name:0.8>
MAX_WORDS, MAX_WORD_CHARS, MAX_TEXT_CHARS = 16, 100, 2000

SAME_NAMES = ({"sd", "sdxl"}, {"flux", "hunyuan_video"})  # families whose files may have the same names

LoraSource = Literal["built-in", "upload", "url", "hub"]


@dataclass(frozen=True, slots=True)
class LoraRecord:
    """What is known of one LoRA. Its file is stored under its digest."""

    id: str
    digest: str  # SHA-256 of the file, 64 hex digits
    owner: str  # PUBLIC: every caller may use it
    name: str
    family: str  # a LoraFamily, or the family of the card that the LoRA comes with
    rank: int
    dtype: str
    size_bytes: int
    trigger_words: tuple[str, ...]
    description: str
    licence: str
    source: LoraSource
    created_at: float  # unix seconds; 0 for built-in ones
    model: str | None = None  # built-in: id of the only model it is for
    preview: bool = False  # the registry has a small WebP picture of it
    notes: tuple[str, ...] = ()  # sentences: what is in the file without effect, or is missing

    def fits(self, card: ModelCard) -> bool:
        """Whether it may be used with this model, as far as its header says."""
        return self.model in (None, card.id) and fits_family(self.family, card)


LORA_RECORD = TypeAdapter(LoraRecord)


@dataclass(frozen=True, slots=True)
class LoraLabel:
    """What a caller states on registration; None: the value in the file's metadata."""

    name: str | None = None
    trigger_words: tuple[str, ...] | None = None
    description: str = ""
    licence: str = ""
    public: bool = False
    preview: bytes | None = None  # a small WebP picture


def fits_family(family: str, card: ModelCard) -> bool:
    """Whether a LoRA of this family may be used with the model, as far as names show; the shapes decide
    later, and alone for a model of another family than LoRA files are known of."""
    if card.family not in get_args(LoraFamily):
        return True
    return family in ("unknown", card.family) or {family, card.family} in SAME_NAMES


def lora_id(digest: str) -> str:
    """The id of the file with this SHA-256 (hex)."""
    return digest[:ID_DIGITS]


def make_record(
    digest: str, info: LoraFileInfo, label: LoraLabel, owner: str, source: LoraSource
) -> LoraRecord:
    """The record of a file; created_at is set by the registry. Raises BadRequest for a label that is too
    long."""
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
        notes=info.notes,
    )


def default_name(digest: str) -> str:
    """The name of a LoRA that has none."""
    return f"lora-{digest[:8]}"


def _name(stated: str | None, in_file: str, digest: str) -> str:
    if stated is None:
        return in_file if NAME.fullmatch(in_file) else default_name(digest)
    if not NAME.fullmatch(stated):
        raise BadRequest(
            "a name has 1 to 100 letters, digits, spaces or . _ + -, and begins with a letter or digit",
            param="name",
        )
    return stated
