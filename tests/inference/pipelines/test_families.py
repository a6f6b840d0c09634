"""Any unmodified pipeline joins a batch: tiny ones of many families, each mixed batch against lonely runs."""

from __future__ import annotations

import datetime
import math
import os

import pytest
import torch

from tests.inference.families import FAMILIES
from tests.inference.families_table import EVERY, PAGE, Outcome, measure, page, row
from tests.inference.more_families import MORE

PARTS = 4  # of the further families; another one every day, all of them with FAMILIES=all
TODAY = datetime.datetime.now(datetime.UTC).date().toordinal() % PARTS
ALL = os.environ.get("FAMILIES") == "all"
NAMES = [*FAMILIES, *(name for number, name in enumerate(MORE) if ALL or number % PARTS == TODAY)]
OUTCOMES: dict[str, Outcome] = {}


def outcome_of(name: str) -> Outcome:
    if name not in OUTCOMES:
        with torch.inference_mode():
            OUTCOMES[name] = measure(EVERY[name])
    return OUTCOMES[name]


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_batch_equals_its_requests_alone_and_shares_forwards(name: str) -> None:
    outcome = outcome_of(name)

    assert math.isfinite(outcome.error)
    assert outcome.error <= EVERY[name].tolerance
    assert outcome.cancelled == 1
    assert outcome.shared["denoiser"]
    assert outcome.denoiser_calls >= 1.3 * outcome.denoiser_forwards


@pytest.mark.filterwarnings("default")
def test_the_page_of_families_is_up_to_date() -> None:
    text, lines = PAGE.read_text(), PAGE.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]

    outdated = [name for name in NAMES if row(name, outcome_of(name)) not in lines]

    assert text.startswith(page({}).rstrip()), "run: python -m tests.inference.families_table"
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == list(EVERY)
    assert outdated == [], "run: python -m tests.inference.families_table"
