"""The noise that holds the layout of a drawing: normal like any other."""

import pytest
import torch

from tools.tiny_models.flow import LAYOUT_CHANNELS, layout_noise
from tools.tiny_models.scenes import Variation


def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def channel_means(noise: torch.Tensor) -> torch.Tensor:
    """(B, 5): the layout in the noise, as standard normal numbers; noise: (B, 64, 64), packed."""
    channels = noise.unflatten(-1, (16, 4))
    return torch.stack([channels[:, :, index].sum((1, 2)) / 16 for index in LAYOUT_CHANNELS.values()], 1)


def test_every_varied_number_has_a_channel_of_its_own() -> None:
    assert tuple(LAYOUT_CHANNELS) == Variation._fields
    assert len(set(LAYOUT_CHANNELS.values())) == len(Variation._fields)


def test_it_is_normal_noise() -> None:
    noise = layout_noise(2 * torch.rand(3000, 5, generator=random()) - 1, torch.ones(3000), random())
    means = channel_means(noise)

    assert abs(noise.mean()) < 0.002
    assert abs(noise.std() - 1) < 0.002
    assert (means.std(0) - 1).abs().max() < 0.05
    assert (torch.corrcoef(means.T) - torch.eye(5)).abs().max() < 0.06


def test_it_holds_the_variation() -> None:
    variation = 2 * torch.rand(50, 5, generator=random()) - 1

    means = channel_means(layout_noise(variation, torch.ones(50), random()))

    assert torch.allclose(torch.erf(means / 2**0.5), variation, atol=1e-4)


@pytest.mark.parametrize(("time", "plain"), [(1.0, 0.0), (0.81, 0.0), (0.75, 0.3), (0.1, 0.3)])
def test_some_of_it_is_plain_where_a_picture_can_be_seen(time: float, plain: float) -> None:
    variation = 2 * torch.rand(2000, 5, generator=random()) - 1

    means = torch.erf(channel_means(layout_noise(variation, torch.full((2000,), time), random())) / 2**0.5)

    silent = (means - variation).abs().amax(1) > 1e-3
    assert abs(silent.float().mean().item() - plain) < 0.04


def test_numbers_at_the_very_end_are_finite() -> None:
    noise = layout_noise(torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0]]), torch.ones(1), random())

    assert noise.isfinite().all()
