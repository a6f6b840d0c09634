"""Trials that decide whether products may be computed together: one rule for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from deployments.loras import joint_linear, low_rank_products
from deployments.loras.joint_linear import LoraLayer, is_joint_exact
from deployments.loras.low_rank_products import Products, is_batch_invariant
from deployments.loras.product_trials import MAX_TRIALS, Pairs, have_same_bits

# what CUDA and its libraries raise; torch.OutOfMemoryError is one of several
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
]


def layers(width: int, dtype: torch.dtype) -> list[LoraLayer]:
    torch.manual_seed(0)
    linears = [nn.Linear(width, width, dtype=dtype) for _ in range(2)]
    return [LoraLayer(("transformer", f"to_{i}"), one, one.forward, False) for i, one in enumerate(linears)]


def products(width: int, dtype: torch.dtype) -> Products:
    a = torch.zeros(2, 4, 1, width, dtype=dtype)
    return Products(a, [torch.zeros(1, 2, 4, width, dtype=dtype)], (4, 4), 1)


def tries(width: int, tokens: int, dtype: torch.dtype) -> list[Callable[[], bool]]:
    """Both users of the trials."""
    x = torch.zeros(2, tokens, width, dtype=dtype)
    return [
        lambda: is_joint_exact(layers(width, dtype), x),
        lambda: is_batch_invariant(x, products(width, dtype)),
    ]


def fail_by(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> Sequence[Tensor]:
        raise error

    monkeypatch.setattr(joint_linear, "joint_outputs", fail)
    monkeypatch.setattr(low_rank_products, "add_linear", fail)


@torch.inference_mode()
def test_a_trial_that_compares_enough_values_is_a_proof() -> None:
    assert [is_proven() for is_proven in tries(64, 512, torch.bfloat16)] == [True, True]


@torch.inference_mode()
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_a_trial_without_memory_in_any_words_proves_nothing_and_fails_no_request(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_by(monkeypatch, error)

    assert [is_proven() for is_proven in tries(16, 8, torch.float32)] == [False, False]


@torch.inference_mode()
def test_a_broken_device_is_not_taken_for_a_failed_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_by(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))

    for is_proven in tries(16, 8, torch.float32):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            is_proven()


@torch.inference_mode()
def test_sizes_too_small_to_compare_enough_values_of_16_bits_are_not_proven() -> None:
    assert [is_proven() for is_proven in tries(4, 1, torch.bfloat16)] == [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_that_shows_in_a_later_trial_is_found(dtype: torch.dtype) -> None:
    made = 0

    def trial() -> Pairs:
        nonlocal made
        made += 1
        values = torch.ones(2**15, dtype=dtype)
        other = values.clone()
        if made == 5:
            other[7] = 2
        return [(values, other)]

    assert not have_same_bits("a product", trial)
    assert made == 5 < MAX_TRIALS
