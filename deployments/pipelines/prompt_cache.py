"""Cache of prompt embeddings, keyed by the encoder and its arguments, bounded by bytes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import Any

import torch
from cachetools import LRUCache
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deployments.engine.branches import SharedResults
from deployments.pipelines.truncation import TokenizedText


class PromptCache:
    """Results of `encode_prompt`, the least recently used evicted first. One per model, used by one thread.

    Requests with equal prompts share one result, so 64 of them hold its embeddings once. No pipeline of
    diffusers changes them in place.
    """

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: 0 turns the cache off."""
        self._results: LRUCache[Hashable, Any] = LRUCache(max_bytes, getsizeof=_size_bytes)
        self.hits = 0
        self.misses = 0

    @property
    def bytes(self) -> int:
        """Size of all cached embeddings."""
        return int(self._results.currsize)

    def attach(
        self,
        pipeline: Any,
        variant: Hashable = None,
        unproven: Callable[[], frozenset[str]] = frozenset,
        tokenized: list[TokenizedText] | None = None,
    ) -> None:
        """Let this pipeline object (not its class) look into the cache first, if it has encode_prompt.

        variant: what else the result depends on, such as the LoRAs on the text encoders.
        unproven: modules whose forwards this request has shared in batch sizes not proven to be exact. A
        result that such a forward took part in is not kept: it would be another request's, which may be
        strict.
        tokenized: of this request; its tokenizers add to it, and a cached result adds what they would.
        """
        tokenized = [] if tokenized is None else tokenized
        encode = getattr(pipeline, "encode_prompt", None)
        if encode is None or not self._results.maxsize:
            return
        encoder = _encoder_of(pipeline)

        def cached_encode(*args: Any, **kwargs: Any) -> Any:
            key = _key(encoder, args, kwargs)
            if key is None:  # finished embeddings among the arguments
                return encode(*args, **kwargs)
            return self._result((key, variant), lambda: encode(*args, **kwargs), unproven, tokenized)

        vars(pipeline)["encode_prompt"] = cached_encode

    def clear(self) -> None:
        """Remove all results, as after a change of the text encoders' weights."""
        self._results.clear()

    def _result(
        self,
        key: Hashable,
        encode: Callable[[], Any],
        unproven: Callable[[], frozenset[str]],
        tokenized: list[TokenizedText],
    ) -> Any:
        known = self._results.get(key)
        if known is not None:
            self.hits += 1
            result, read = known
            tokenized += read
            return result
        self.misses += 1
        unproven_before, read_before = unproven(), len(tokenized)
        result = encode()  # other fibers run meanwhile; one of them may encode the same prompt
        if unproven() != unproven_before:
            return result
        if key not in self._results and _size_bytes(result) <= self._results.maxsize:
            self._results[key] = result, tuple(tokenized[read_before:])
        return result


def share_prompts(pipeline: Any, shared: SharedResults) -> None:
    """Let branches of one request encode a prompt once, as their pipeline objects do with this one."""
    encode = getattr(pipeline, "encode_prompt", None)
    if encode is None:
        return
    encoder = _encoder_of(pipeline)

    def shared_encode(*args: Any, **kwargs: Any) -> Any:
        key = _key(encoder, args, kwargs)
        if key is None:
            return encode(*args, **kwargs)
        return shared.get(key, lambda: encode(*args, **kwargs))

    vars(pipeline)["encode_prompt"] = shared_encode


Encoder = tuple[Any, tuple[int, ...]]  # encode_prompt of a class, and the text encoders that it calls


def _encoder_of(pipeline: Any) -> Encoder:
    """A refiner has the class of the base model's image-to-image pipeline and other text encoders."""
    parts = [part for name, part in sorted(vars(pipeline).items()) if name.startswith("text_encoder")]
    return type(pipeline).encode_prompt, tuple(map(id, parts))


@cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _key(encoder: Encoder, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
    """The encoder and all arguments, pictures by content; None if one of them is more than text, numbers and
    pictures."""
    bound = _signature(encoder[0]).bind_partial(None, *args, **kwargs).arguments
    components: list[Hashable] = [encoder]
    for name, value in bound.items():
        hashable = _hashable(value)
        if hashable is _UNHASHABLE:
            return None
        components.append((name, hashable))
    return tuple(components)


_UNHASHABLE: Any = object()


def _hashable(value: Any) -> Any:
    """The value with lists as tuples and pictures as digests; _UNHASHABLE for other types than text, numbers,
    device and dtype."""
    if isinstance(value, Image.Image):  # encoders of editing models read the reference pictures, too
        return value.mode, value.size, hashlib.blake2b(value.tobytes(), digest_size=16).digest()
    if isinstance(value, list | tuple):
        items = tuple(_hashable(item) for item in value)
        return _UNHASHABLE if _UNHASHABLE in items else items
    known = isinstance(value, str | bool | int | float | torch.device | torch.dtype)
    return value if value is None or known else _UNHASHABLE


def _size_bytes(result: Any) -> int:
    """Size of all tensors in the result."""
    return sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
