"""The ControlNets of one request, with the interface of diffusers' wrappers for several ControlNets.

Weights and spans of steps are applied here and not inside the nets: every forward of a net has scale 1, so
that requests with different weights share it, and a net does not run outside of its span. The results equal
those of diffusers, which multiplies a net's outputs by the scale as its last operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxMultiControlNetModel, MultiControlNetModel
from torch import Tensor, nn

Samples = list[Tensor] | None


def controlnets(nets: Sequence[nn.Module], modes: Sequence[int | None]) -> Any:
    """One nn.Module over the shared `nets`, in the order of the request's control pictures.

    modes: per net, the mode of a union ControlNet (FLUX); None for other nets.
    """
    if isinstance(nets[0], FluxControlNetModel):
        return _FluxControlNets(nets, modes)
    return _ControlNets(nets)


class _ControlNets(MultiControlNetModel):
    """For pipelines of Stable Diffusion, which call it once per step."""

    nets: Any  # nn.ModuleList

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__(nets)  # type: ignore[no-untyped-call]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: list[Tensor],
        conditioning_scale: list[float],
        added_cond_kwargs: dict[str, Tensor] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> tuple[Samples, Tensor | None]:
        """Residuals for the down blocks and the middle block of the UNet; None when no net runs."""
        assert not return_dict, "the pipelines expect a tuple"
        down: Samples = None
        middle: Tensor | None = None
        for net, picture, scale in zip(self.nets, controlnet_cond, conditioning_scale, strict=True):
            if scale == 0 and not guess_mode:
                continue
            samples, last = net(
                sample=sample,
                timestep=timestep,
                encoder_hidden_states=encoder_hidden_states,
                controlnet_cond=picture,
                conditioning_scale=1.0,
                added_cond_kwargs=added_cond_kwargs,
                guess_mode=guess_mode,
                return_dict=False,
            )
            down = _add(down, samples, scale)
            middle = last * scale if middle is None else middle + last * scale
        return down, middle


class _FluxControlNets(FluxMultiControlNetModel):
    """For pipelines of FLUX, which call it once per step."""

    nets: Any  # nn.ModuleList

    def __init__(self, nets: Sequence[nn.Module], modes: Sequence[int | None]) -> None:
        super().__init__(nets)  # type: ignore[no-untyped-call]
        self._modes = modes

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_cond: list[Tensor],
        controlnet_mode: object,  # noqa: ARG002  diffusers passes it
        conditioning_scale: list[float],
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[Samples, Samples]:
        """Residuals for the double and the single blocks; None when no net runs."""
        assert not return_dict, "the pipelines expect a tuple"
        blocks: Samples = None
        single_blocks: Samples = None
        for net, picture, mode, scale in zip(
            self.nets, controlnet_cond, self._modes, conditioning_scale, strict=True
        ):
            if scale == 0:
                continue
            samples, single_samples = net(
                hidden_states=hidden_states,
                controlnet_cond=picture,
                controlnet_mode=_mode_of_rows(mode, hidden_states) if net.union else None,
                conditioning_scale=1.0,
                timestep=timestep,
                guidance=guidance if net.config.guidance_embeds else None,
                pooled_projections=pooled_projections,
                encoder_hidden_states=encoder_hidden_states,
                txt_ids=txt_ids,
                img_ids=img_ids,
                joint_attention_kwargs=joint_attention_kwargs,
                return_dict=False,
            )
            blocks = _add(blocks, samples, scale)
            single_blocks = _add(single_blocks, single_samples, scale)
        return blocks, single_blocks


def _add(total: Samples, samples: Sequence[Tensor] | None, scale: float) -> Samples:
    if samples is None:
        return total
    scaled = [sample * scale for sample in samples]
    return scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]


def _mode_of_rows(mode: int | None, hidden_states: Tensor) -> Tensor:
    """The mode as a union ControlNet expects it, (rows, 1)."""
    return torch.full((hidden_states.shape[0], 1), mode or 0, device=hidden_states.device)
