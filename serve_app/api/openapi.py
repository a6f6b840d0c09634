"""The OpenAPI description: error answers of every route, in the words of its dialect."""

from typing import Any

from fastapi import FastAPI

from serve_app.api.schemas.error import ErrorResponse, OpenAIErrorBody

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
    """Describes the errors under /v1/ as OpenAI's, which is how errors.py renders them."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            schema["components"]["schemas"][OpenAIErrorBody.__name__] = OpenAIErrorBody.model_json_schema()
            for path, operations in schema["paths"].items():
                for operation in operations.values() if path.startswith("/v1/") else ():
                    for code in ERROR_RESPONSES:
                        content = {"application/json": {"schema": OPENAI_ERROR}}
                        operation["responses"][code]["content"] = content
        return super().openapi()
