"""UNets in GGUF files have their authors' names, with the prefix of a whole checkpoint or without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.quantizers.gguf.utils import GGUFLinear

from deployments.models.gguf_names import PREFIX, expected_names, named_as_in
from deployments.models.gguf_weights import find_gguf
from deployments.planning.gguf_needs import header_of
from tests.inference.gguf_files import write_gguf
from tests.inference.original_names import ROOT, unet, weights_of


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("model", ["tiny-sd15", "tiny-sdxl-base"])
@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["alone", "whole checkpoint"])
def test_every_weight_has_the_name_of_the_module(model: str, prefix: str) -> None:
    folder = ROOT / f"models/{model}/unet"
    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    original = weights_of(folder)

    found = named_as_in(module, {f"{prefix}{name}": one for name, one in unet(folder).items()})

    assert expected_names(module) == original.keys() == found.keys()
    assert all(torch.equal(found[name], original[name]) for name in original)


@pytest.mark.parametrize(("model", "architecture"), [("tiny-sd15", "sd1"), ("tiny-sdxl-base", "sdxl")])
def test_a_file_of_the_authors_names_is_read(model: str, architecture: str, tmp_path: Path) -> None:
    folder = ROOT / f"models/{model}/unet"
    file = write_gguf(tmp_path / "unet.gguf", unet(folder), "BF16", architecture=architecture)

    weights = find_gguf(UNet2DConditionModel, folder, header_of(file))
    found = weights.read(torch.float32, (), torch.device("cpu")).state_dict()

    for name, tensor in weights_of(folder).items():
        assert torch.equal(found[name].float(), tensor.float()), name


def test_a_quantised_file_keeps_its_blocks(tmp_path: Path) -> None:
    folder = ROOT / "models/tiny-sd15/unet"
    file = write_gguf(tmp_path / "unet.gguf", unet(folder), "Q8_0", architecture="sd1")

    module = find_gguf(UNet2DConditionModel, folder, header_of(file)).read(
        torch.float32, (), torch.device("cpu")
    )

    assert sum(isinstance(layer, GGUFLinear) for layer in module.modules()) > 10
