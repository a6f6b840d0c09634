"""Tiny ControlNets with random weights that are loud enough to matter, for the tiny pipelines."""

from __future__ import annotations

import torch
from diffusers import ControlNetModel, FluxControlNetModel, UNet2DConditionModel
from torch import nn

from deployments.protocol.card import ControlNet, Licence, Weights
from deployments.protocol.request import ControlType
from tests.inference import tiny

LICENCE = Licence(name="MIT", url="https://example.org")
CONTROLS: dict[ControlType, ControlNet] = {
    "canny": ControlNet(weights=Weights(path="canny"), licence=LICENCE),
    "depth": ControlNet(weights=Weights(path="depth"), licence=LICENCE),
}


def flux_controlnet(seed: int, *, num_mode: int | None = None) -> FluxControlNetModel:
    """num_mode: number of types of control picture of a union net."""
    torch.manual_seed(seed)
    config = {k: v for k, v in tiny.flux().transformer.config.items() if k != "out_channels"}
    net = FluxControlNetModel.from_config(config, num_layers=1, num_single_layers=1, num_mode=num_mode)
    for parameter in (*net.controlnet_blocks.parameters(), *net.controlnet_single_blocks.parameters()):
        nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(net.controlnet_x_embedder.weight, std=0.1)
    return net.double()


def unet_controlnet(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """Its own: the tiny VAE halves a picture's sides once, so the control picture's are halved once."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    loud = (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out)
    for parameter in (p for part in loud for p in part.parameters()):
        nn.init.normal_(parameter, std=0.1)  # they are zero to begin with
    return net.double()


def unet_controlnets(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    return {"canny": unet_controlnet(unet, 3), "depth": unet_controlnet(unet, 4)}


def flux_controlnets() -> dict[str, nn.Module]:
    return {"canny": flux_controlnet(1), "depth": flux_controlnet(2)}
