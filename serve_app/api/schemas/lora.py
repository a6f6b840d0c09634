"""Registering LoRAs, and those that are registered."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, InstanceOf, ValidatorFunctionWrapHandler, WrapValidator
from pydantic.json_schema import SkipJsonSchema

from deployments.protocol.errors import BadRequest
from serve_app.api.schemas.body import RequestBody
from serve_app.api.schemas.files import FileBytes
from serve_app.loras.record import PUBLIC, LoraLabel, LoraRecord
from serve_app.loras.spec import LoraSpec
from serve_app.storage.spooled_file import SpooledFile


def _split_words(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    return value.split(",") if isinstance(value, str) else handler(value)


class RegisterLoraBody(RequestBody):
    """A LoRA to store: the form part `file`, or url, base64 or hub."""

    file: FileBytes | SkipJsonSchema[InstanceOf[SpooledFile]] | None = Field(
        None, repr=False
    )  # set by a form
    base64: FileBytes | None = Field(None, repr=False)
    url: str | None = Field(None, max_length=2048)
    hub: str | None = Field(None, max_length=300)
    name: str | None = Field(
        None, description="By default the name in the file's metadata.", examples=["night"]
    )
    trigger_words: Annotated[list[str] | None, WrapValidator(_split_words)] = Field(
        None, description="By default those in the file's metadata. In a form: separated by commas."
    )
    description: str = ""
    licence: str = ""
    public: bool = Field(False, description="For all users; admins only.")
    preview: FileBytes | None = Field(None, repr=False, description="An image to show.")

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

    def to_label(self, preview: bytes | None) -> LoraLabel:
        words = None if self.trigger_words is None else tuple(self.trigger_words)
        return LoraLabel(self.name, words, self.description, self.licence, self.public, preview)


class LoraOut(BaseModel):
    """One LoRA that a request may name."""

    id: str = Field(examples=["night"])
    name: str
    family: str = Field(description="Of the models it fits; unknown: its header does not say.")
    model: str | None = Field(description="The only model it is for, when it comes with one.")
    rank: int
    dtype: str
    size_bytes: int
    sha256: str
    trigger_words: list[str] = Field(description="Words that bring its style out; not added by themselves.")
    description: str
    licence: str
    source: str = Field(description="built-in, upload, url or hub.")
    public: bool = Field(description="All users may use it.")
    mine: bool = Field(description="The caller may delete it.")
    notes: list[str] = Field(description="What is in the file without effect, or is missing in it.")
    preview_url: str | None
    created_at: float | None = Field(description="Unix seconds; null for those that come with a model.")

    @classmethod
    def of(cls, record: LoraRecord, owner: str, prefix: str, *, admin: bool) -> Self:
        """owner, admin: the caller. prefix: what precedes /api in links."""
        public = record.owner == PUBLIC
        return cls(
            id=record.id,
            name=record.name,
            family=record.family,
            model=record.model,
            rank=record.rank,
            dtype=record.dtype,
            size_bytes=record.size_bytes,
            sha256=record.digest,
            trigger_words=list(record.trigger_words),
            description=record.description,
            licence=record.licence,
            source=record.source,
            public=public,
            mine=record.source != "built-in" and (admin if public else record.owner == owner),
            notes=list(record.notes),
            preview_url=f"{prefix}/api/loras/{record.id}/preview" if record.preview else None,
            created_at=record.created_at or None,
        )


class LoraList(BaseModel):
    loras: list[LoraOut]


class LoraDeleted(BaseModel):
    id: str
    deleted: bool = True
