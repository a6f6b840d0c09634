"""The shape check of a LoRA: nothing where it fits, else the first factor that does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.lora_format.header import HEAD_BYTES, tensor_shapes
from deployments.lora_format.shape_check import find_mismatch
from deployments.loras.source import layer_shapes, read_lora
from deployments.protocol.errors import BadRequest
from tests.inference import tiny
from tests.inference.lora_files import Tensors, file_of, random_lora

ROOT = Path(__file__).parents[3]


def attention(path: str, _layer: Any) -> bool:
    return path.endswith(("to_q", "to_k", "to_v", "to_out.0", "q_proj", "out_proj"))


def flux_lora() -> tuple[Any, Tensors]:
    pipeline = tiny.flux()
    return pipeline, random_lora(pipeline, ["transformer", "text_encoder"], only=attention)


def sd_lora() -> tuple[Any, Tensors]:
    pipeline = tiny.sd()
    return pipeline, random_lora(pipeline, ["unet"])


def peft_names() -> tuple[Any, Tensors]:
    pipeline = tiny.flux()
    own = random_lora(pipeline, ["transformer"], only=attention)
    return pipeline, {key.replace("transformer.", "base_model.model.", 1): own[key] for key in own}


def kohya_names() -> tuple[Any, Tensors]:
    pipeline = tiny.sd()
    named = {}
    for key, tensor in random_lora(pipeline, ["unet", "text_encoder"], only=attention).items():
        part, _, rest = key.removesuffix(".weight").partition(".")
        layer, _, side = rest.rpartition(".")
        layer = layer if part == "unet" else f"text_model.{layer}"
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part]
        side = {"lora_A": "lora_down", "lora_B": "lora_up"}[side]
        named[f"{prefix}{layer.replace('.', '_')}.{side}.weight"] = tensor
    return pipeline, named


def old_diffusers_names() -> tuple[Any, Tensors]:
    pipeline = tiny.sd()
    named = {}
    for key, tensor in random_lora(pipeline, ["unet"], only=attention).items():
        layer, _, side = key.removesuffix(".weight").rpartition(".")
        block, _, projection = layer.removesuffix(".0").rpartition(".")
        side = {"lora_A": "down", "lora_B": "up"}[side]
        named[f"{block}.processor.{projection}_lora.{side}.weight"] = tensor
    return pipeline, named


STYLES = [flux_lora, sd_lora, peft_names, kohya_names, old_diffusers_names]


@pytest.mark.parametrize("make", STYLES)
def test_factors_that_fit_pass_and_others_are_named(make: Any) -> None:
    pipeline, tensors = make()
    layers = layer_shapes(pipeline)
    assert read_lora(file_of(tensors), pipeline).factors
    assert find_mismatch({key: tuple(tensor.shape) for key, tensor in tensors.items()}, layers) is None

    for key in (next(iter(tensors)), list(tensors)[-1]):
        down = "lora_A" in key or "down" in key
        wider = torch.zeros(tensors[key].shape[0] + (not down), tensors[key].shape[1] + down, 1, 1)
        wrong = {**tensors, key: wider if tensors[key].ndim == 4 else wider[..., 0, 0]}

        reason = find_mismatch({name: tuple(tensor.shape) for name, tensor in wrong.items()}, layers)

        assert reason is not None
        assert repr(key) in reason
        assert str(tuple(wrong[key].shape)) in reason
        with pytest.raises(BadRequest):  # the conversion refuses it too
            read_lora(file_of(wrong), pipeline)


def test_fused_layers_of_other_styles_are_left_to_the_converters() -> None:
    layers = layer_shapes(tiny.flux())
    fused = {
        "double_blocks.0.processor.qkv_lora1.down.weight": (4, 999),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 999),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 999),
        "transformer.nowhere.lora_A.weight": (4, 999),
        "transformer.proj_out.alpha": (),
    }

    assert find_mismatch(fused, layers) is None


def test_shapes_come_from_the_head_of_a_file() -> None:
    _, tensors = flux_lora()
    file = file_of(tensors, {"made": "here"})

    assert tensor_shapes(file[:HEAD_BYTES]) == {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def test_comparing_shapes_loads_no_torch() -> None:
    code = "import sys, deployments.lora_format.shape_check; sys.exit('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
