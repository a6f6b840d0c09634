"""Prompt embeddings remembered by what was encoded, bounded by bytes."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor


class PromptCache:
    """The answers of `encode_prompt`, least recently used out first. One per model, one thread.

    An answer is shared by all requests that ask the same, so 64 requests with one prompt hold its
    embeddings once. No pipeline of diffusers changes them in place.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._answers: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def attach(self, pipeline: Any, variant: Hashable = None) -> None:
        """Let this pipeline object (not its class) ask the cache first; without encode_prompt: nothing.

        variant: what else the answers depend on, such as the LoRAs on the text encoders.
        """
        encode = getattr(pipeline, "encode_prompt", None)
        if encode is None or not self._max_bytes:
            return
        function = getattr(encode, "__func__", encode)

        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = _key(function, args, kwargs)
            if key is None:  # a picture or ready-made embeddings go in: not ours to remember
                return encode(*args, **kwargs)
            return self._answer((key, variant), lambda: encode(*args, **kwargs))

        vars(pipeline)["encode_prompt"] = remembered

    def _answer(self, key: Hashable, encode: Any) -> Any:
        known = self._answers.get(key)
        if known is not None:
            self._answers.move_to_end(key)
            self.hits += 1
            return known[0]
        self.misses += 1
        answer = encode()  # other fibers run meanwhile; one of them may ask the same
        size = _bytes_of(answer)
        if key not in self._answers and size <= self._max_bytes:
            self._answers[key] = (answer, size)
            self.bytes += size
            while self.bytes > self._max_bytes:
                _, (_, freed) = self._answers.popitem(last=False)
                self.bytes -= freed
        return answer

    def clear(self) -> None:
        """Forget everything, as after a change of the text encoders' weights."""
        self._answers.clear()
        self.bytes = 0


@cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _key(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
    """The function and all its arguments; None if one of them is more than text and numbers."""
    bound = _signature(function).bind_partial(None, *args, **kwargs).arguments
    parts: list[Hashable] = [function]
    for name, value in bound.items():
        plain = _plain(value)
        if plain is _UNKNOWN:
            return None
        parts.append((name, plain))
    return tuple(parts)


_UNKNOWN: Any = object()


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        items = tuple(_plain(item) for item in value)
        return _UNKNOWN if _UNKNOWN in items else items
    known = isinstance(value, str | bool | int | float | torch.device | torch.dtype)
    return value if value is None or known else _UNKNOWN


def _bytes_of(answer: Any) -> int:
    if isinstance(answer, Tensor):
        return answer.numel() * answer.element_size()
    if isinstance(answer, Mapping):
        return sum(_bytes_of(item) for item in answer.values())
    if isinstance(answer, list | tuple):
        return sum(_bytes_of(item) for item in answer)
    return 0
