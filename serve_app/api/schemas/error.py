"""Error answers: Weft's own, and those of the other dialects."""

from pydantic import BaseModel, Field


class ErrorBody(BaseModel):
    """What was wrong, and what would be accepted."""

    kind: str = Field(examples=["bad_request"], description="Stable: for programs.")
    message: str = Field(description="For people; may change.")
    param: str | None = Field(None, description="The field at fault.")
    retryable: bool = Field(description="The same request may succeed later.")


class ErrorResponse(BaseModel):
    error: ErrorBody


class OpenAIErrorBody(BaseModel):
    """The same in OpenAI's fields."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None
    code: str = Field(examples=["bad_request"], description="Weft's `kind`, or model_not_found.")


class ReplicateError(BaseModel):
    """Problem details (RFC 9457), as Replicate's clients read them."""

    title: str = Field(description="Weft's `kind`.")
    status: int
    detail: str
    invalid_field: str | None


class A1111Error(BaseModel):
    """The same as A1111's clients read it."""

    error: str = Field(description="Weft's `kind`.")
    detail: str
    body: str = Field(description="The field at fault, or empty.")
    errors: str
