"""Errors with the names that fields have in OpenAI's dialect."""

from collections.abc import Iterator
from contextlib import contextmanager

from deployments.protocol.errors import WeftError
from serve_app.api.foreign import renamed_error

OPENAI_NAMES = {  # by the native name
    "reference_images": "image",
    "mask_image": "mask",
    "num_images": "n",
}


@contextmanager
def in_openai_names() -> Iterator[None]:
    """Errors that are raised in the block name the fields of this dialect."""
    try:
        yield
    except WeftError as error:
        raise renamed_error(error, OPENAI_NAMES) from None
