"""Tiny ControlNets with random weights that are loud enough to matter, for the tiny pipelines."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, FluxControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessorPil,
)

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


def save_depth_estimator(folder: Path) -> None:
    """A model with random weights and its processor, as the hub has them."""
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        out_indices=[1, 2],
        reshape_hidden_states=False,
    )
    sizes = {"reassemble_hidden_size": 16, "reassemble_factors": [2, 1], "neck_hidden_sizes": [8, 8]}
    depth = DepthAnythingConfig(
        backbone_config=backbone, **sizes, fusion_hidden_size=8, head_hidden_size=8, patch_size=14
    )
    DepthAnythingForDepthEstimation(depth).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
