"""Calls of denoisers of which the table of families has no pipeline share a forward and equal calls alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from tests.inference.engine.module_cases import CASES, ModuleCase, glm_caches
from tests.inference.engine.together import Together


@pytest.mark.filterwarnings("default")  # of the libraries, about 64-bit weights
@pytest.mark.parametrize("name", CASES)
def test_calls_of_a_module_share_one_forward_and_equal_the_calls_alone(name: str) -> None:
    case = CASES[name]
    module = case.build()
    calls = [case.arguments(rows, _noise(case, seed)) for seed, rows in enumerate(case.rows)]

    with torch.inference_mode():
        alone = [_tensors(module(**_copied(arguments))) for arguments in calls]
        engine, together = _together(module, calls)

    assert engine.forwards == 1
    assert max(_difference(a, b) for a, b in zip(alone, together, strict=True)) < _tolerance(case)
    assert _difference(alone[0], alone[2]) > 1e-3  # what is compared does depend on the arguments


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("FLUX.3 with reference pictures", {"image_cond_ids": torch.ones(2, 4).double()}),
        ("FIBO 2 with pictures", {"encoder_attention_mask": torch.tensor([[True] * 2 + [False] * 4])}),
        ("MiniMax H3", {"timestep": torch.tensor([0.0, 0.7]).double()}),
        ("Qwen-Image 2.1", {"img_mask": torch.tensor([[True, False, False, False, True]])}),
        ("OmniGen", {"position_ids": torch.arange(1, 9).reshape(1, 8)}),
        ("GLM-Image", {"kv_caches": glm_caches("write")}),
        ("Wan VACE", {"control_hidden_states_scale": torch.ones(2).double()}),
    ],
)
def test_calls_that_differ_in_what_all_rows_have_in_common_do_not_share(
    name: str, other: dict[str, Any]
) -> None:
    case = CASES[name]
    module = case.build()
    calls = [case.arguments(1, _noise(case, 0)), {**case.arguments(1, _noise(case, 1)), **other}]

    with torch.inference_mode():
        engine, _outputs = _together(module, calls)

    assert engine.forwards == 2


def _together(module: Any, calls: list[dict[str, Any]]) -> tuple[Engine, list[list[Tensor]]]:
    engine = Engine(Together(8))
    restore = intercept([module])
    try:
        fibers = [Fiber(functools.partial(module, **_copied(arguments))) for arguments in calls]
        for fiber in fibers:
            engine.start(fiber)
        while not engine.idle:
            engine.step()
    finally:
        restore()
    for fiber in fibers:
        if fiber.failure is not None:
            raise fiber.failure
    return engine, [_tensors(fiber.result) for fiber in fibers]


def _noise(case: ModuleCase, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """For modules that write to what they are given."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(outputs: list[Tensor], others: list[Tensor]) -> float:
    pairs = zip(outputs, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) if a.shape == b.shape else 1.0 for a, b in pairs)


def _tolerance(case: ModuleCase) -> float:
    return 1e-11 if case.dtype is torch.float64 else 1e-5
