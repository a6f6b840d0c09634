"""At which steps previews come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.validation.preview_steps import preview_steps


@pytest.mark.parametrize(
    ("steps", "previews", "at"),
    [
        (4, 1, [2]),
        (4, 2, [1, 3]),
        (4, 3, [1, 2, 3]),
        (20, 3, [5, 10, 15]),
        (30, 1, [15]),
        (2, 3, [1]),
        (1, 3, []),
        (0, 3, []),
        (25, 0, []),
    ],
)
def test_examples(steps: int, previews: int, at: list[int]) -> None:
    assert preview_steps(steps, previews) == at


@given(st.integers(0, 1000), st.integers(0, 8))
def test_there_are_as_many_as_fit_before_the_last_step_at_even_distances(steps: int, previews: int) -> None:
    at = preview_steps(steps, previews)

    assert len(at) == max(0, min(previews, steps - 1))
    assert all(0 < step < steps for step in at)
    gaps = {b - a for a, b in zip([0, *at], [*at, steps], strict=True)} if at else {0}
    assert max(gaps) - min(gaps) <= 1
