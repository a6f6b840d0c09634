"""A duration in seconds that may come as text, as OpenAI's clients send it."""

from typing import Annotated, Any

from pydantic import BeforeValidator


def _parse_seconds(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("must be a number of seconds, such as 4") from None
    return value


Seconds = Annotated[float, BeforeValidator(_parse_seconds)]
