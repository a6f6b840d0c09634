"""Errors with the names that fields have in OpenAI's dialect."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.protocol.errors import WeftError

OPENAI_NAMES = {  # by the native name
    "reference_images": "image",
    "mask_image": "mask",
    "num_images": "n",
}
NATIVE_NAME = re.compile(rf"\b({'|'.join(OPENAI_NAMES)})\b")


@contextmanager
def in_openai_names() -> Iterator[None]:
    """Errors that are raised in the block name the fields of this dialect."""
    try:
        yield
    except WeftError as error:
        param = None if error.param is None else _renamed(error.param)
        raise type(error)(_renamed(error.message), param=param, retry_after_s=error.retry_after_s) from None


def _renamed(text: str) -> str:
    return NATIVE_NAME.sub(lambda match: OPENAI_NAMES[match[0]], text)
