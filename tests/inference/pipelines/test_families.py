"""Any unmodified pipeline joins a batch: tiny ones of many families, each mixed batch against lonely runs."""

from __future__ import annotations

import math

import pytest
import torch

from tests.inference.families import FAMILIES
from tests.inference.families_table import PAGE, Outcome, measure, page

OUTCOMES: dict[str, Outcome] = {}


def outcome_of(name: str) -> Outcome:
    if name not in OUTCOMES:
        with torch.inference_mode():
            OUTCOMES[name] = measure(FAMILIES[name])
    return OUTCOMES[name]


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixed_batch_equals_its_requests_alone_and_shares_forwards(name: str) -> None:
    outcome = outcome_of(name)

    assert math.isfinite(outcome.error)
    assert outcome.error <= FAMILIES[name].tolerance
    assert outcome.cancelled == 1
    assert outcome.shared["denoiser"]
    assert outcome.denoiser_calls >= 1.3 * outcome.denoiser_forwards


@pytest.mark.filterwarnings("default")
def test_the_page_of_families_is_up_to_date() -> None:
    outcomes = {name: outcome_of(name) for name in FAMILIES}

    assert PAGE.read_text() == page(outcomes), "run: python -m tests.inference.families_table"
