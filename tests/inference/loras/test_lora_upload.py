"""An adapter reaches the device in as many copies as it has dtypes, and unchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deployments.loras.source import Adapter, read_lora
from deployments.loras.upload import upload
from tests.inference import tiny
from tests.inference.lora_files import file_of, random_lora


class CopiesToMeta(TorchDispatchMode):
    """Counts the copies to another device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    """Of a model whose transformer computes in bfloat16 and whose text encoder in float32."""
    pipeline = tiny.flux()
    pipeline.transformer.to(torch.bfloat16)
    return read_lora(file_of(random_lora(pipeline, ["transformer", "text_encoder"], rank=5)), pipeline)


def test_an_adapter_is_one_copy_for_each_dtype(adapter: Adapter) -> None:
    one_dtype = {
        layer: replace(one, a=one.a.bfloat16(), b=one.b.bfloat16()) for layer, one in adapter.factors.items()
    }

    with CopiesToMeta() as two:
        upload(adapter, torch.device("meta"))
    with CopiesToMeta() as single:
        upload(replace(adapter, factors=one_dtype), torch.device("meta"))

    assert len(adapter.factors) > 20
    assert (two.count, single.count) == (2, 1)


def test_uploaded_factors_are_the_adapters_own(adapter: Adapter) -> None:
    uploaded = upload(adapter, torch.device("cpu"))

    assert uploaded.info == adapter.info
    assert uploaded.size_bytes == adapter.size_bytes
    assert len({one.b.untyped_storage().data_ptr() for one in uploaded.factors.values()}) == 2
    for layer, one in adapter.factors.items():
        copy = uploaded.factors[layer]
        assert (copy.scale, copy.a.dtype, copy.b.stride()) == (one.scale, one.a.dtype, one.b.stride())
        assert torch.equal(copy.a, one.a)
        assert torch.equal(copy.b, one.b)
