"""Prompt embeddings that one request computed and another one reads: only exact ones, where it matters."""

from __future__ import annotations

from typing import Any

import torch

from deployments.pipelines.prompt_cache import PromptCache


class Pipeline:
    """Counts how often it encodes; encoding adds to `unproven` what it shares."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.unproven: frozenset[str] = frozenset()
        self.shares_unproven: frozenset[str] = frozenset()

    def encode_prompt(self, prompt: str) -> Any:
        self.encoded.append(prompt)
        self.unproven |= self.shares_unproven
        return torch.ones(4)


def attached(cache: PromptCache, variant: Any = None) -> Pipeline:
    pipeline = Pipeline()
    cache.attach(pipeline, variant, lambda: pipeline.unproven)
    return pipeline


def test_embeddings_of_an_unproven_forward_are_not_kept_for_others() -> None:
    cache = PromptCache(2**20)
    merged, alone = attached(cache), attached(cache)
    merged.shares_unproven = frozenset({"T5.forward"})

    for pipeline in (merged, alone, attached(cache)):
        pipeline.encode_prompt("a fox")

    assert merged.encoded == alone.encoded == ["a fox"]
    assert (cache.hits, cache.misses) == (1, 2)


def test_what_was_shared_before_the_prompt_does_not_matter() -> None:
    cache = PromptCache(2**20)
    first, second = attached(cache), attached(cache)
    first.unproven = first.shares_unproven = frozenset({"UNet.forward"})

    first.encode_prompt("a fox")
    second.encode_prompt("a fox")

    assert second.encoded == []


def test_a_refiner_of_the_same_class_reads_nothing_of_the_base_models_encoders() -> None:
    cache = PromptCache(2**20)
    base, refiner, again = Pipeline(), Pipeline(), Pipeline()
    base.text_encoder_2, refiner.text_encoder_2 = object(), object()  # type: ignore[attr-defined]
    again.text_encoder_2 = base.text_encoder_2  # type: ignore[attr-defined]

    for pipeline in (base, refiner, again):
        cache.attach(pipeline)
        pipeline.encode_prompt("a fox")

    assert [pipeline.encoded for pipeline in (base, refiner, again)] == [["a fox"], ["a fox"], []]


def test_requests_of_another_variant_read_nothing_of_it() -> None:
    cache = PromptCache(2**20)

    attached(cache, ("night", True)).encode_prompt("a fox")
    other = attached(cache, ("night", False))
    other.encode_prompt("a fox")

    assert other.encoded == ["a fox"]
