"""Error answers: Weft's own, and OpenAI's under /v1/."""

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
