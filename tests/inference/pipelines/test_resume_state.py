"""The state of a stopped request: what the next replica has to know."""

from __future__ import annotations

import pytest
import torch

from deployments.pipelines.resume import Progress, restore, save
from tests.serving.fakes import resolved


@pytest.mark.parametrize("unproven", [set(), {"UNet.forward"}, {"A.forward", "B.forward"}])
def test_what_was_shared_without_a_proof_is_known_to_the_next_replica(unproven: set[str]) -> None:
    latents = torch.randn(1, 4, 16)
    saved = save([Progress(2, latents, resumable=True, unproven=frozenset(unproven))])
    assert saved is not None

    (restored,) = restore(saved, resolved()) or []

    assert (restored.step, restored.unproven) == (2, unproven)
    assert restored.latents is not None
    assert torch.equal(restored.latents, latents)


def test_a_picture_without_a_step_or_after_its_last_starts_anew_beside_one_that_continues() -> None:
    latents = torch.randn(1, 4, 16)
    request = resolved().model_copy(update={"num_images": 3})
    pictures = [Progress(step, latents if step else None, resumable=True) for step in (0, 2, 4)]

    restored = restore(save(pictures) or b"", request)

    assert restored is not None
    assert [picture.step for picture in restored] == [0, 2, 0]
    assert [picture.latents is None for picture in restored] == [True, False, True]


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"no safetensors",
        save([Progress(2, torch.ones(1, 4, 16), resumable=True)]),
        save([Progress(4, torch.ones(1, 4, 16), resumable=True)] * 2),
    ],
    ids=["empty", "other bytes", "of one picture", "of finished pictures"],
)
def test_a_state_that_does_not_fit_lets_the_request_start_anew(state: bytes) -> None:
    assert restore(state, resolved().model_copy(update={"num_images": 2})) is None
