"""LoRAs on the wire: how a request asks for them, and what is told of those that are registered."""

import base64
import binascii
import json
from typing import Annotated, Any, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import MAX_LORA_WEIGHT, MAX_LORAS, Strict
from serve_app.loras.record import PUBLIC, LoraLabel, LoraRecord
from serve_app.loras.spec import LoraSpec

MAX_FILE_CHARS = 32 * 2**20  # of base64: 24 MiB
SOURCES = ("id", "url", "base64", "upload", "hub")
FILES = "files are image, mask_image, control_image, lora_file, and those that loras names as uploads"
AS_TEXT = 'send loras as JSON text, [{"id": "night", "weight": 0.8}], or as "night:0.8, mosaic:0.5"'


def _file_bytes(value: Any) -> Any:
    """The bytes of a file sent as base64 or as a data URL; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_FILE_CHARS:
        raise ValueError("is over 24 MiB; register the adapter by upload, or send a url")
    text = value.partition(",")[2] if value[:5].lower() == "data:" else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("this is not base64; send the file as base64") from None


FileBytes = Annotated[
    bytes,
    BeforeValidator(_file_bytes),
    WithJsonSchema({"type": "string", "description": "A safetensors file as base64, at most 24 MiB."}),
]
Weight = Annotated[float, Field(ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT)]


class LoraBody(Strict):
    """One adapter of a request, by exactly one of id, url, base64, upload and hub."""

    id: str | None = Field(
        None,
        validation_alias=AliasChoices("id", "name"),
        min_length=1,
        max_length=200,
        description="Id or name of one that GET /api/loras lists.",
        examples=["night"],
    )
    url: str | None = Field(None, max_length=2048, description="https; of hosts that the operator allows.")
    base64: FileBytes | None = Field(None, repr=False)
    upload: str | None = Field(None, description="Name of the form part that holds the file.")
    hub: str | None = Field(
        None, max_length=300, description="owner/repo or owner/repo/file.safetensors of huggingface.co."
    )
    weight: Weight = Field(
        1.0,
        validation_alias=AliasChoices("weight", "scale"),
        description="0 leaves it without effect; below 0 it works against its style.",
        examples=[0.8],
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of {', '.join(SOURCES)}; there is {' and '.join(given) or 'none'}"
            )
        return self

    def to_spec(self, files: dict[str, bytes], param: str) -> LoraSpec:
        """files: of the form, by part. Raises BadRequest when there is no such part."""
        if self.upload is not None:
            if self.upload not in files:
                raise BadRequest(
                    f"there is no file {self.upload[:100]!r} in this form; send it along", param=param
                )
            return LoraSpec("file", self.weight, file=files[self.upload], param=param)
        if self.base64 is not None:
            return LoraSpec("file", self.weight, file=self.base64, param=param)
        for kind, named in (("id", self.id), ("url", self.url), ("hub", self.hub)):
            if named is not None:
                return LoraSpec(kind, self.weight, named, param=param)  # type: ignore[arg-type]
        raise AssertionError("a body of one source")


def _list_or_text(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Forms cannot nest, so theirs is a text: JSON, or name:weight with commas between."""
    if not isinstance(value, str):
        return handler(value)
    text = value.strip()
    if text[:1] in ("[", "{"):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"cannot be read as JSON; {AS_TEXT}") from None
        entries = entries if isinstance(entries, list) else [entries]
        _check_count(entries)
        return [LoraBody.model_validate(entry) for entry in entries]
    parts = [part.strip() for part in text.split(",") if part.strip()]
    _check_count(parts)
    return [_named(part) for part in parts]


def _check_count(entries: list[Any]) -> None:
    if len(entries) > MAX_LORAS:
        raise ValueError(f"there are {len(entries)} LoRAs; at most {MAX_LORAS}")


def _named(text: str) -> LoraBody:
    name, colon, weight = text.rpartition(":")
    if not colon:
        return LoraBody(id=text)
    try:
        number = float(weight)
    except ValueError:
        raise ValueError(f"{text[:100]!r} is no name:weight; {AS_TEXT}") from None
    return LoraBody(id=name.strip(), weight=number)


class VllmOmniLora(Strict):
    """One adapter as vLLM-Omni's clients write it."""

    name: str | None = Field(
        None, min_length=1, max_length=200, description="Id or name of a registered one."
    )
    path: str | None = Field(
        None, min_length=1, max_length=1000, description="As `lora_path`; where it is given, name is a label."
    )
    scale: Weight = Field(1.0, validation_alias=AliasChoices("scale", "weight"))
    int_id: int | None = Field(None, description="Taken and ignored.")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.name is None and self.path is None:
            raise ValueError("needs a name or a path")
        return self

    def to_spec(self) -> LoraSpec:
        if self.path is not None:
            return LoraSpec("id", self.scale, self.path, param="lora.path")
        assert self.name is not None, "validated"
        return LoraSpec("id", self.scale, self.name, param="lora.name")


def _object_or_text(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """A form brings the object as JSON text."""
    if not isinstance(value, str):
        return handler(value)
    try:
        entry = json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError('cannot be read as JSON; send {"name": "night", "scale": 0.8}') from None
    return VllmOmniLora.model_validate(entry)


class LoraFields(Strict):
    """The fields of every dialect that ask for LoRAs."""

    loras: Annotated[list[LoraBody], WrapValidator(_list_or_text)] = Field(
        [],
        max_length=MAX_LORAS,
        description="Adapters for this request alone, each with its weight. In a form: JSON text, or "
        "`name:weight` with commas between. The prompt may also say `<lora:name:weight>`.",
    )
    model_id: str | None = Field(None, max_length=200, description="One registered adapter, by id or name.")
    lora_path: str | None = Field(
        None,
        max_length=1000,
        description="One adapter that comes with the model, by its path; no other file.",
    )
    lora_url: str | None = Field(None, max_length=2048, description="One adapter by URL.")
    lora_base64: FileBytes | None = Field(None, repr=False)
    lora_weight: Weight | None = Field(None, description="Of the single one; 1 by default.")
    lora: Annotated[VllmOmniLora | None, WrapValidator(_object_or_text)] = Field(
        None, description="One adapter in vLLM-Omni's words; `loras` says the same and more."
    )
    lora_files: SkipJsonSchema[dict[str, bytes]] = Field({}, repr=False, max_length=0)  # set by the form

    def lora_specs(self) -> tuple[LoraSpec, ...]:
        """What they ask for. Raises BadRequest for a weight without an adapter, or a file without a use."""
        singles = self._singles()
        if not singles and "lora_file" not in self.lora_files and self.lora_weight is not None:
            raise BadRequest(
                "lora_weight needs an adapter; send model_id or lora_url too", param="lora_weight"
            )
        if self.lora is not None:
            singles.append(self.lora.to_spec())
        many = [
            body.to_spec(self.lora_files, _param(index, len(self.loras)))
            for index, body in enumerate(self.loras)
        ]
        used = {body.upload for body in self.loras}
        for name, file in self.lora_files.items():
            if name not in used and name != "lora_file":
                raise BadRequest(
                    f"{name[:100]} cannot be a file; {FILES}",
                    param=name[:100],
                )
            if name not in used:
                weight = 1.0 if self.lora_weight is None else self.lora_weight
                singles.append(LoraSpec("file", weight, file=file, param=name))
        return (*singles, *many)

    def _singles(self) -> list[LoraSpec]:
        weight = 1.0 if self.lora_weight is None else self.lora_weight
        specs = []
        if self.model_id is not None:
            specs.append(LoraSpec("id", weight, self.model_id, param="model_id"))
        if self.lora_path is not None:
            specs.append(LoraSpec("id", weight, self.lora_path, param="lora_path"))
        if self.lora_url is not None:
            specs.append(LoraSpec("url", weight, self.lora_url, param="lora_url"))
        if self.lora_base64 is not None:
            specs.append(LoraSpec("file", weight, file=self.lora_base64, param="lora_base64"))
        return specs


def _param(index: int, count: int) -> str:
    return "loras" if count == 1 else f"loras.{index}"


def _words(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    return value.split(",") if isinstance(value, str) else handler(value)


class RegisterLoraBody(Strict):
    """An adapter to keep: the form part `file`, or url, base64 or hub."""

    file: FileBytes | None = Field(None, repr=False)
    base64: FileBytes | None = Field(None, repr=False)
    url: str | None = Field(None, max_length=2048)
    hub: str | None = Field(None, max_length=300)
    name: str | None = Field(None, description="Without it what the file calls itself.", examples=["night"])
    trigger_words: Annotated[list[str] | None, WrapValidator(_words)] = Field(
        None, description="Without them what the file says. In a form: with commas between."
    )
    description: str = ""
    licence: str = ""
    public: bool = Field(False, description="For everybody; admins only.")
    preview: FileBytes | None = Field(None, repr=False, description="A picture to show.")

    def to_spec(self) -> LoraSpec:
        """Raises BadRequest unless there is exactly one source."""
        given = [
            LoraSpec("file", 1.0, file=file, param=name)
            for name, file in (("file", self.file), ("base64", self.base64))
            if file is not None
        ]
        if self.url is not None:
            given.append(LoraSpec("url", 1.0, self.url, param="url"))
        if self.hub is not None:
            given.append(LoraSpec("hub", 1.0, self.hub, param="hub"))
        if len(given) != 1:
            raise BadRequest("send exactly one of file (in a form), base64, url and hub", param="file")
        return given[0]

    def label(self, preview: bytes | None) -> LoraLabel:
        words = None if self.trigger_words is None else tuple(self.trigger_words)
        return LoraLabel(self.name, words, self.description, self.licence, self.public, preview)


class LoraOut(BaseModel):
    """One adapter that a request may name."""

    id: str = Field(examples=["night"])
    name: str
    family: str = Field(description="Of the models it fits; unknown: its header does not tell.")
    model: str | None = Field(description="The only model it is for, where it comes with one.")
    rank: int
    dtype: str
    size_bytes: int
    sha256: str
    trigger_words: list[str] = Field(description="Words that bring its style out; not added by themselves.")
    description: str
    licence: str
    source: str = Field(description="built-in, upload, url or hub.")
    public: bool = Field(description="Everybody may use it.")
    mine: bool = Field(description="The caller may delete it.")
    preview_url: str | None
    created_at: float | None = Field(description="Unix seconds; null for those that come with a model.")

    @classmethod
    def of(cls, adapter: LoraRecord, owner: str, prefix: str, *, admin: bool) -> Self:
        public = adapter.owner == PUBLIC
        return cls(
            id=adapter.id,
            name=adapter.name,
            family=adapter.family,
            model=adapter.model,
            rank=adapter.rank,
            dtype=adapter.dtype,
            size_bytes=adapter.size_bytes,
            sha256=adapter.digest,
            trigger_words=list(adapter.trigger_words),
            description=adapter.description,
            licence=adapter.licence,
            source=adapter.source,
            public=public,
            mine=adapter.source != "built-in" and (admin if public else adapter.owner == owner),
            preview_url=f"{prefix}/api/loras/{adapter.id}/preview" if adapter.preview else None,
            created_at=adapter.created_at or None,
        )


class LoraList(BaseModel):
    loras: list[LoraOut]


class LoraDeleted(BaseModel):
    id: str
    deleted: bool = True
