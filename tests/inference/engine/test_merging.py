"""Requests with classifier-free guidance share forwards by default, in every family."""

from __future__ import annotations

import pytest

from tests.inference.engine.merging import merge_share
from tests.inference.families import FAMILIES


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "SDXL", "Wan", "LTX-Video"])
def test_requests_with_guidance_fill_forwards_in_the_default_mode(name: str) -> None:
    assert merge_share(FAMILIES[name]) >= 0.8
