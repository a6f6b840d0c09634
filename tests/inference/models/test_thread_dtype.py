"""Models are built in their own dtype on one thread, while other threads keep torch's default."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from deployments.models.load import load_pipeline
from deployments.models.thread_dtype import thread_default_dtype
from deployments.protocol.card import Weights
from tests.patience import patience

MODELS = Path(__file__).parents[3] / "models"


def tensors_of(pipeline: Any) -> dict[tuple[str, str], Tensor]:
    """All parameters and buffers by component and name."""
    found = {}
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            named = [*component.named_parameters(), *component.named_buffers()]
            found |= {(name, path): tensor for path, tensor in named}
    return found


@pytest.mark.parametrize("model", ["tiny-flux-dev", "tiny-sdxl-base", "tiny-wan"])
def test_a_pipeline_has_the_bits_and_dtypes_that_diffusers_gives_it(model: str) -> None:
    expected = tensors_of(
        DiffusionPipeline.from_pretrained(MODELS / model, dtype=torch.bfloat16, use_safetensors=True)
    )

    loaded = tensors_of(load_pipeline(Weights(path=str(MODELS / model)), torch.device("cpu")))

    assert loaded.keys() == expected.keys()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_other_threads_keep_the_default_dtype_while_a_model_is_loaded() -> None:
    seen: set[torch.dtype] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.update((torch.get_default_dtype(), torch.zeros(1).dtype, torch.nn.Linear(1, 1).weight.dtype))

    thread = threading.Thread(target=watch)
    thread.start()
    load_pipeline(Weights(path=str(MODELS / "tiny-flux-dev")), torch.device("cpu"))
    ended.set()
    thread.join(patience())

    assert seen == {torch.float32}


def test_the_dtype_is_that_of_the_thread_and_ends_with_the_block() -> None:
    with thread_default_dtype():
        torch.set_default_dtype(torch.bfloat16)
        made = [torch.zeros(2), torch.tensor(1.5), torch.arange(0.0, 1.0, 0.5), torch.full((2,), 0.5)]
        whole = [torch.arange(3), torch.tensor(3), torch.full((2,), 3), torch.zeros(2, dtype=torch.float64)]
        during = torch.get_default_dtype()

    assert [tensor.dtype for tensor in made] == [torch.bfloat16] * 4
    assert [tensor.dtype for tensor in whole] == [torch.int64, torch.int64, torch.int64, torch.float64]
    assert (during, torch.get_default_dtype(), torch.zeros(1).dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


def test_an_error_leaves_torch_as_it_was() -> None:
    functions = torch.set_default_dtype, torch.get_default_dtype

    def fail() -> None:
        with thread_default_dtype():
            torch.set_default_dtype(torch.float16)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()

    assert (torch.set_default_dtype, torch.get_default_dtype) == functions
    assert torch.get_default_dtype() is torch.float32


def test_loads_of_two_threads_do_not_disturb_each_other() -> None:
    dtypes: dict[torch.dtype, torch.dtype] = {}
    meet = threading.Barrier(2)

    def load(dtype: torch.dtype) -> None:
        with thread_default_dtype():
            torch.set_default_dtype(dtype)
            meet.wait(patience())
            dtypes[dtype] = torch.empty(1).dtype
            meet.wait(patience())
        assert torch.empty(1).dtype is torch.float32

    threads = [threading.Thread(target=load, args=[dtype]) for dtype in (torch.bfloat16, torch.float16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience())

    assert dtypes == {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16}
