"""The fields of every generating body that ask for LoRAs."""

import json
from typing import Annotated, Any, Self

from pydantic import AliasChoices, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from pydantic.json_schema import SkipJsonSchema

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import MAX_LORA_WEIGHT, MAX_LORAS
from serve_app.api.schemas.body import RequestBody, without_nulls
from serve_app.api.schemas.files import FileBytes
from serve_app.api.schemas.numbers import Int
from serve_app.api.schemas.submit_body import SubmitDefaults
from serve_app.loras.spec import LoraSpec

SOURCES = ("id", "url", "base64", "upload", "hub")
FORM_FILES = (
    "files are image, mask_image, control_image, reference_images, lora_file, and those that loras names as "
    "uploads"
)
AS_TEXT = 'send loras as JSON text, [{"id": "night", "weight": 0.8}], or as "night:0.8, mosaic:0.5"'
Weight = Annotated[float, Field(ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT)]


class LoraBody(RequestBody):
    """One LoRA of a request, by exactly one of id, url, base64, upload and hub."""

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
    def _check_one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of {', '.join(SOURCES)}; there is {' and '.join(given) or 'none'}"
            )
        return self

    def to_spec(self, files: dict[str, bytes], param: str) -> LoraSpec:
        """files: of the form, by part. Raises BadRequest when `upload` names a part that is not there."""
        if self.upload is not None:
            if self.upload not in files:
                raise BadRequest(
                    f"there is no file {self.upload[:100]!r} in this form; send it along", param=param
                )
            return LoraSpec("file", self.weight, file=files[self.upload], param=param)
        if self.base64 is not None:
            return LoraSpec("file", self.weight, file=self.base64, param=param)
        if self.id is not None:
            return LoraSpec("id", self.weight, self.id, param=param)
        if self.url is not None:
            return LoraSpec("url", self.weight, self.url, param=param)
        assert self.hub is not None, "one source is given"
        return LoraSpec("hub", self.weight, self.hub, param=param)


class VllmOmniLora(RequestBody):
    """One LoRA as vLLM-Omni's clients write it."""

    name: str | None = Field(
        None, min_length=1, max_length=200, description="Id or name of a registered one."
    )
    path: str | None = Field(
        None, min_length=1, max_length=1000, description="As `lora_path`; when it is given, name is a label."
    )
    scale: Weight = Field(1.0, validation_alias=AliasChoices("scale", "weight"))
    int_id: Int | None = Field(None, description="Accepted and ignored.")

    @model_validator(mode="after")
    def _check_name_or_path(self) -> Self:
        if self.name is None and self.path is None:
            raise ValueError("needs a name or a path")
        return self

    def to_spec(self) -> LoraSpec:
        if self.path is not None:
            return LoraSpec("id", self.scale, self.path, param="lora.path")
        assert self.name is not None, "a name or a path is given"
        return LoraSpec("id", self.scale, self.name, param="lora.name")


def _list_or_text(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Forms cannot nest, so a form sends text: JSON, or name:weight separated by commas."""
    if not isinstance(value, str):
        return handler(value)
    text = value.strip()
    if text[:1] in ("[", "{"):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"cannot be read as JSON; {AS_TEXT}") from None
        entries = without_nulls(entries if isinstance(entries, list) else [entries])
        _check_count(entries)
        return [LoraBody.model_validate(entry) for entry in entries]
    parts = [part.strip() for part in text.split(",") if part.strip()]
    _check_count(parts)
    return [_parse_name_and_weight(part) for part in parts]


def _check_count(entries: list[Any]) -> None:
    if len(entries) > MAX_LORAS:
        raise ValueError(f"there are {len(entries)} LoRAs; at most {MAX_LORAS}")


def _parse_name_and_weight(text: str) -> LoraBody:
    name, colon, weight = text.rpartition(":")
    if not colon:
        return LoraBody(id=text)
    try:
        number = float(weight)
    except ValueError:
        raise ValueError(f"{text[:100]!r} is no name:weight; {AS_TEXT}") from None
    return LoraBody(id=name.strip(), weight=number)


def _object_or_text(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """A form sends the object as JSON text."""
    if not isinstance(value, str):
        return handler(value)
    try:
        entry = json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError('cannot be read as JSON; send {"name": "night", "scale": 0.8}') from None
    return VllmOmniLora.model_validate(without_nulls(entry))


class LoraFields(SubmitDefaults):
    """The ways to ask for LoRAs: a list, single fields, form files, and vLLM-Omni's object."""

    loras: Annotated[list[LoraBody], WrapValidator(_list_or_text)] = Field(
        [],
        max_length=MAX_LORAS,
        description="LoRAs for this request alone, each with its weight. In a form: JSON text, or "
        "`name:weight` separated by commas. The prompt may also contain `<lora:name:weight>`.",
    )
    model_id: str | None = Field(None, max_length=200, description="One registered LoRA, by id or name.")
    lora_path: str | None = Field(
        None,
        max_length=1000,
        description="One LoRA that comes with the model, by its path; no other file.",
    )
    lora_url: str | None = Field(None, max_length=2048, description="One LoRA by URL.")
    lora_base64: FileBytes | None = Field(None, repr=False)
    lora_weight: Weight | None = Field(None, description="Of the single one; 1 by default.")
    lora: Annotated[VllmOmniLora | None, WrapValidator(_object_or_text)] = Field(
        None, description="One LoRA in vLLM-Omni's fields; `loras` can say the same and more."
    )
    lora_files: SkipJsonSchema[dict[str, bytes]] = Field({}, repr=False, max_length=0)  # set by the form

    def lora_specs(self) -> tuple[LoraSpec, ...]:
        """Raises BadRequest for a weight without a LoRA, or a file that nothing uses."""
        singles = self._single_specs()
        if not singles and "lora_file" not in self.lora_files and self.lora_weight is not None:
            raise BadRequest(
                "lora_weight needs an adapter; send model_id or lora_url too", param="lora_weight"
            )
        if self.lora is not None:
            singles.append(self.lora.to_spec())
        count = len(self.loras)
        listed = [
            body.to_spec(self.lora_files, "loras" if count == 1 else f"loras.{index}")
            for index, body in enumerate(self.loras)
        ]
        return (*singles, *self._file_specs(), *listed)

    def _single_specs(self) -> list[LoraSpec]:
        weight = self._single_weight
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

    def _file_specs(self) -> list[LoraSpec]:
        """The form's `lora_file`. Raises BadRequest for any other file that no entry of `loras` names."""
        uploads = {body.upload for body in self.loras}
        specs = []
        for name, file in self.lora_files.items():
            if name in uploads:
                continue
            if name != "lora_file":
                raise BadRequest(f"{name[:100]} cannot be a file; {FORM_FILES}", param=name[:100])
            specs.append(LoraSpec("file", self._single_weight, file=file, param=name))
        return specs

    @property
    def _single_weight(self) -> float:
        return 1.0 if self.lora_weight is None else self.lora_weight
