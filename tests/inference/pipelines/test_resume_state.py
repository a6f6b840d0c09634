"""The state of a stopped request: what the next replica has to know."""

from __future__ import annotations

import pytest
import torch

from deployments.pipelines.resume import Progress, restore
from tests.serving.fakes import resolved


@pytest.mark.parametrize("unproven", [set(), {"UNet.forward"}, {"A.forward", "B.forward"}])
def test_what_was_shared_without_a_proof_is_known_to_the_next_replica(unproven: set[str]) -> None:
    latents = torch.randn(1, 4, 16)
    saved = Progress(2, latents, resumable=True, unproven=frozenset(unproven)).save()
    assert saved is not None

    restored = restore(saved, resolved())

    assert restored is not None
    assert (restored.step, restored.unproven) == (2, unproven)
    assert restored.latents is not None
    assert torch.equal(restored.latents, latents)
