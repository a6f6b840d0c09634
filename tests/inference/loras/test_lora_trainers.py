"""Files of every trainer change exactly the layers that they were made for, or are refused by their key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor

from deployments.lora_format.file_info import inspect_lora
from deployments.loras.source import Adapter, layer_shapes, read_lora
from deployments.models.load import load_pipeline
from deployments.protocol.card import load_card
from deployments.protocol.errors import BadRequest
from tests.inference.lora_files import Tensors, file_of
from tests.inference.lora_trainers import (
    BEGIN,
    END,
    FORMATS,
    PAGE,
    PIPELINES,
    File,
    Format,
    make_files,
    table,
)

ROOT = Path(__file__).parents[3]
CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {family: make().to(torch.float32) for family, make in PIPELINES.items()}


@pytest.fixture(scope="module")
def files(pipelines: dict[str, Any]) -> dict[str, File]:
    return make_files({family: layer_shapes(pipeline) for family, pipeline in pipelines.items()})


def delta(adapter: Adapter, layer: tuple[str, str]) -> Tensor:
    one = adapter.factors[layer]
    return one.scale * one.b.double() @ one.a.double().flatten(1)


def check(adapter: Adapter, deltas: Mapping[tuple[str, str], Tensor]) -> None:
    """The adapter changes these layers by this, and no other."""
    assert adapter.factors.keys() == deltas.keys()
    for layer, expected in deltas.items():
        torch.testing.assert_close(delta(adapter, layer), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.id)
def test_every_tensor_of_a_trainers_file_is_used_exactly(
    one: Format, pipelines: dict[str, Any], files: dict[str, File]
) -> None:
    file = files[one.id]

    adapter = read_lora(file_of(file.tensors, file.metadata), pipelines[one.family])

    check(adapter, file.deltas)
    assert not [note for note in adapter.info.notes if "zero" in note]


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.id)
def test_a_single_layer_of_a_trainers_file_is_enough(
    one: Format, pipelines: dict[str, Any], files: dict[str, File]
) -> None:
    """Trainers leave out blocks, and the layers that did not learn anything."""
    file = files[one.id]
    modules = list(dict.fromkeys(key.removesuffix(one.suffixes.down) for key in file.tensors))
    last = [module for module in modules if module + one.suffixes.down in file.tensors][-1]

    own = {key: tensor for key, tensor in file.tensors.items() if key.startswith(last)}
    adapter = read_lora(file_of(own, file.metadata), pipelines[one.family])

    assert 1 <= len(adapter.factors) <= 4
    check(adapter, {layer: file.deltas[layer] for layer in adapter.factors})


def _in_block_77(key: str) -> str:
    """The same layer of a block that no tiny model has."""
    return re.sub(r"((?:blocks|layers|refiner)[._])\d+", r"\g<1>77", key, count=1)


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.id)
def test_a_tensor_without_a_place_is_refused_by_its_name_unless_it_is_zero(
    one: Format, pipelines: dict[str, Any], files: dict[str, File]
) -> None:
    file, ends, pipeline = files[one.id], one.suffixes, pipelines[one.family]
    down = next(key for key in file.tensors if key.endswith(ends.down) and _in_block_77(key) != key)
    module = _in_block_77(down.removesuffix(ends.down))
    nowhere = {f"{module}{ends.down}": torch.ones(4, 32), f"{module}{ends.up}": torch.ones(32, 4)}
    zero = {**nowhere, f"{module}{ends.up}": torch.zeros(32, 4)}

    with pytest.raises(BadRequest, match=re.escape(module) + ".*names no .*layer of this model; use a file"):
        read_lora(file_of({**file.tensors, **nowhere}, file.metadata), pipeline)

    adapter = read_lora(file_of({**file.tensors, **zero}, file.metadata), pipeline)
    check(adapter, file.deltas)
    assert module in adapter.info.notes[0]


def test_a_file_of_peft_says_that_its_alphas_are_elsewhere(files: dict[str, File]) -> None:
    """Its adapter_config.json is not part of the file."""
    with_alphas = {"base_model.model.x_embedder.alpha": torch.tensor(2.0)}
    peft = files["flux: peft"].tensors

    assert "adapter_config.json" in inspect_lora(file_of(peft)).notes[0]
    assert not inspect_lora(file_of({**peft, **with_alphas})).notes
    assert not inspect_lora(file_of(files["flux: diffusers"].tensors)).notes


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.id)
def test_a_factor_without_its_counterpart_is_refused_by_its_name(
    one: Format, pipelines: dict[str, Any], files: dict[str, File]
) -> None:
    file, ends = files[one.id], one.suffixes
    down = next(key for key in file.tensors if key.endswith(ends.down))
    left = {key: tensor for key, tensor in file.tensors.items() if key != down.replace(ends.down, ends.up)}

    with pytest.raises(BadRequest, match=re.escape(repr(down)) + ".*has no counterpart"):
        read_lora(file_of(left, file.metadata), pipelines[one.family])


def test_two_trainers_prefixes_in_one_file_both_count(
    pipelines: dict[str, Any], files: dict[str, File]
) -> None:
    """Files are merged of several; diffusers reads those of one prefix and drops the others."""
    kohya, diffusers = files["flux: kohya sd-scripts"], files["flux: diffusers"]
    double = {key: tensor for key, tensor in kohya.tensors.items() if "double" in key}
    single = {
        key: tensor for key, tensor in diffusers.tensors.items() if ".single_" in key or "text_enc" in key
    }

    adapter = read_lora(file_of(double | single), pipelines["flux"])

    first = {layer: one for layer, one in kohya.deltas.items() if layer[1].startswith("transformer_blocks")}
    second = {
        layer: one
        for layer, one in diffusers.deltas.items()
        if layer[1].startswith("single") or layer[0] == "text_encoder"
    }
    check(adapter, first | second)


ALIKE = (
    "flux: XLabs",
    "flux2: ai-toolkit, ComfyUI",
    "wan: ai-toolkit, diffusion-pipe",
    "z_image: musubi-tuner",
)


@pytest.mark.parametrize("name", ALIKE)
def test_diffusers_own_converter_agrees_where_it_takes_a_whole_file(
    name: str, pipelines: dict[str, Any], files: dict[str, File]
) -> None:
    """But for the last modulation of FLUX.2, whose halves diffusers exchanges in weights and not in LoRAs."""
    pipeline, file = pipelines[name.partition(":")[0]], files[name]

    converted = type(pipeline).lora_state_dict(dict(file.tensors))

    layers = {key.partition(".lora_")[0] for key in converted}
    assert layers == {".".join(layer) for layer in file.deltas}
    for (part, path), expected in file.deltas.items():
        if path != "norm_out.linear":
            a, b = (converted[f"{part}.{path}.lora_{side}.weight"].double() for side in "AB")
            torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-5)


def test_the_page_lists_what_is_tested(files: dict[str, File]) -> None:
    section = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()

    assert section == table(files), "run: python -m tests.inference.lora_trainers"


# ---- files that were refused, or read wrongly, in the running service ----


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    names = ("tiny-flux-schnell", "tiny-sdxl-base", "tiny-wan")
    cards = {name: load_card(ROOT / f"configs/models/{name}.yaml") for name in names}
    return {name: load_pipeline(card.weights, torch.device("cpu")) for name, card in cards.items()}


FLUX, SDXL, WAN = "tiny-flux-schnell", "tiny-sdxl-base", "tiny-wan"
T5_Q = ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q")
TO_OUT = ("transformer", "transformer_blocks.0.attn.to_out.0")
EXPECTED = {  # module in the file -> layer of the model
    "comfy_lora_A_alpha": (FLUX, {"diffusion_model.double_blocks.0.img_attn.proj": TO_OUT}),
    "default_in_key": (
        FLUX,
        {"transformer.transformer_blocks.0.attn.to_q": ("transformer", "transformer_blocks.0.attn.to_q")},
    ),
    "int64_alpha": (
        FLUX,
        {"transformer.transformer_blocks.0.attn.to_q": ("transformer", "transformer_blocks.0.attn.to_q")},
    ),
    "kohya_and_t5": (
        FLUX,
        {
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": T5_Q,
            "lora_unet_double_blocks_0_img_attn_proj": TO_OUT,
        },
    ),
    "kohya_and_t5_all_zero": (FLUX, {"lora_unet_double_blocks_0_img_attn_proj": TO_OUT}),
    "kohya_img_in": (FLUX, {"lora_unet_img_in": ("transformer", "x_embedder")}),
    "onetrainer_mlp": (
        FLUX,
        {"lora_transformer_transformer_blocks_0_ff_net_2": ("transformer", "transformer_blocks.0.ff.net.2")},
    ),
    "sdxl_te2_text_projection": (SDXL, {"lora_te2_text_projection": ("text_encoder_2", "text_projection")}),
    "wan_musubi_attention_only": (
        WAN,
        {
            f"lora_unet_blocks_0_{kind}_attn_{one}": ("transformer", f"blocks.0.attn{number}.{path}")
            for number, kind in ((1, "self"), (2, "cross"))
            for one, path in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
        },
    ),
}


def module_delta(tensors: Tensors, module: str) -> Tensor:
    down, up, alpha = (
        next(
            (tensor for key, tensor in tensors.items() if re.match(f"{re.escape(module)}\\.{end}", key)), None
        )
        for end in ("lora_(down|A)", "lora_(up|B)", "alpha")
    )
    assert down is not None
    assert up is not None
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return scale * up.double() @ down.double()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_that_was_refused_or_read_wrongly_is_used_exactly(name: str, shipped: dict[str, Any]) -> None:
    model, layers = EXPECTED[name]
    path = CASES / f"{name}.safetensors"
    tensors = load_file(path)
    pipeline = shipped[model]
    weights = {layer: getattr(pipeline, layer[0]).get_submodule(layer[1]).weight for layer in layers.values()}

    adapter = read_lora(path.read_bytes(), pipeline)

    assert adapter.factors.keys() == set(layers.values())
    for module, layer in layers.items():
        rounding = 0.0 if weights[layer].dtype is torch.float32 else 2.0**-6
        expected = module_delta(tensors, module)
        torch.testing.assert_close(
            delta(adapter, layer), expected, rtol=1e-12, atol=rounding * expected.abs().max()
        )
    assert len(adapter.info.notes) == ("all_zero" in name)


def test_a_modulation_difference_is_refused_by_its_key_unless_it_is_zero(shipped: dict[str, Any]) -> None:
    file = (CASES / "wan_diff_m.safetensors").read_bytes()
    tensors = load(file)

    with pytest.raises(BadRequest, match=r"diffusion_model\.blocks\.0\.diff_m.*plain LoRA"):
        inspect_lora(file)

    key = "diffusion_model.blocks.0.diff_m"
    adapter = read_lora(file_of({**tensors, key: torch.zeros_like(tensors[key])}), shipped[WAN])
    assert adapter.factors.keys() == {("transformer", "blocks.0.attn1.to_q")}
