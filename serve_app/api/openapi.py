"""The OpenAPI description: error answers of every route, in the words of its dialect."""

from typing import Any

from fastapi import FastAPI

from serve_app.api.errors import A1111_PATHS, REPLICATE_PATHS
from serve_app.api.schemas.error import A1111Error, ErrorResponse, OpenAIErrorBody, ReplicateError

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "Refused: `message` says why and what would be accepted."},
    "5XX": {"model": ErrorResponse, "description": "Not possible now: see Retry-After."},
}
OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"$ref": f"#/components/schemas/{OpenAIErrorBody.__name__}"}},
}


class WeftApi(FastAPI):
    """Describes the errors of each dialect as errors.py renders them."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            for model in (OpenAIErrorBody, ReplicateError, A1111Error):
                schema["components"]["schemas"][model.__name__] = model.model_json_schema()
            for path, operations in schema["paths"].items():
                shape = _error_shape(path)
                for operation in operations.values() if shape is not None else ():
                    for code in ERROR_RESPONSES:
                        operation["responses"][code]["content"] = {"application/json": {"schema": shape}}
        return super().openapi()


def _error_shape(path: str) -> dict[str, Any] | None:
    """The schema of a dialect's errors; None: the native one."""
    if REPLICATE_PATHS.match(path):
        return {"$ref": f"#/components/schemas/{ReplicateError.__name__}"}
    if path.startswith(A1111_PATHS):
        return {"$ref": f"#/components/schemas/{A1111Error.__name__}"}
    return OPENAI_ERROR if path.startswith("/v1/") else None
