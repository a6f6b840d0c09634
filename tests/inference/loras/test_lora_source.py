"""Files of every key style become the same factors; what does not fit is refused by its first bad key."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.loras.source import Adapter, read_lora
from deployments.protocol.errors import BadRequest
from tests.inference import tiny
from tests.inference.lora_files import Tensors, file_of, random_lora

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def flux() -> Any:
    return tiny.flux()


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return tiny.sdxl()


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny.sd()


def attention_only(pipeline: Any, part: str, **options: Any) -> Tensors:
    return random_lora(pipeline, [part], only=lambda path, _: path.endswith(ATTENTION), **options)


def product(adapter: Adapter, part: str, path: str) -> Tensor:
    one = adapter.factors[part, path]
    return one.scale * one.b.float() @ one.a.float().flatten(1)


def same(one: Adapter, other: Adapter) -> bool:
    """Whether both change the same layers by the same."""
    return one.factors.keys() == other.factors.keys() and all(
        torch.allclose(product(one, *layer), product(other, *layer), rtol=1e-5, atol=1e-7)
        for layer in one.factors
    )


def renamed(tensors: Tensors, **parts: str) -> Tensors:
    """Keys with text replaced; __ stands for a dot."""
    answer = {}
    for key, tensor in tensors.items():
        for old, new in parts.items():
            key = key.replace(old.replace("__", "."), new.replace("__", "."))
        answer[key] = tensor
    return answer


def kohya(tensors: Tensors, alpha: float | None = None) -> Tensors:
    """In kohya's names, as its trainer writes them for diffusers' UNets."""
    answer: Tensors = {}
    for key, tensor in tensors.items():
        path, _, kind = key.removesuffix(".weight").rpartition(".")
        part, _, rest = path.partition(".")
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[part]
        if part.startswith("text_encoder"):
            rest = f"text_model.{rest}"
        name = f"{prefix}_{rest.replace('.', '_')}"
        answer[f"{name}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor
        if alpha is not None:
            answer[f"{name}.alpha"] = torch.tensor(alpha)
    return answer


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_peft_names_are_those_of_the_model_without_the_part(flux: Any, prefix: str) -> None:
    own = attention_only(flux, "transformer")
    wrapped = {prefix + key.removeprefix("transformer."): tensor for key, tensor in own.items()}

    assert same(read_lora(file_of(wrapped), flux), read_lora(file_of(own), flux))


def test_the_first_names_of_diffusers_are_converted(sd: Any) -> None:
    own = attention_only(sd, "unet")
    old = renamed(own, __lora_A__="__lora__down__", __lora_B__="__lora__up__")
    oldest = {
        key.replace(".to_out.0.", ".to_out.")
        .replace(".to_", ".processor.to_")
        .replace(".lora.", "_lora."): tensor
        for key, tensor in old.items()
    }

    expected = read_lora(file_of(own), sd)

    assert same(read_lora(file_of(old), sd), expected)
    assert same(read_lora(file_of(oldest), sd), expected)


def test_kohya_names_and_alphas_are_converted_in_unet_and_text_encoder(sd: Any) -> None:
    own = random_lora(
        sd,
        ["unet", "text_encoder"],
        only=lambda path, _: path.endswith((*ATTENTION, "_proj", "fc1", "ff.net.2")),
    )

    converted = read_lora(file_of(kohya(own, alpha=2.0)), sd)

    expected = read_lora(file_of(own), sd)
    assert converted.factors.keys() == expected.factors.keys()
    assert any(part == "text_encoder" for part, _ in converted.factors)
    for layer in expected.factors:
        assert torch.allclose(product(converted, *layer), 0.5 * product(expected, *layer), atol=1e-7), layer


def test_each_layer_has_its_own_alpha(sd: Any) -> None:
    tensors = kohya(attention_only(sd, "unet", rank=4), alpha=4.0)
    odd = next(key for key in tensors if key.endswith("attn2_to_k.alpha"))

    adapter = read_lora(file_of({**tensors, odd: torch.tensor(1.0)}), sd)

    scales = {path: one.scale for (_, path), one in adapter.factors.items()}
    assert sorted(scales.values()) == [0.25] + [1.0] * (len(scales) - 1)
    assert next(path for path, scale in scales.items() if scale == 0.25).endswith("attn2.to_k")


def test_sdxl_keys_in_the_names_of_its_first_unet_are_converted(sdxl: Any) -> None:
    """sgm names: input_blocks 4 and 5 are down_blocks.1's two layers, with one resnet per block here."""
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    own = {k: t for k, t in attention_only(sdxl, "unet").items() if k.startswith(key)}
    sgm = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
    other = {
        f"{sgm}.lora_down.weight": own[f"{key}.lora_A.weight"],
        f"{sgm}.lora_up.weight": own[f"{key}.lora_B.weight"],
    }

    assert same(read_lora(file_of(other), sdxl), read_lora(file_of(own), sdxl))


def flux_qkv(down: str, up: str) -> tuple[Tensors, Tensors]:
    """One fused qkv layer under the given names, and the same in diffusers' three layers."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(96, 4, generator=generator)
    path = "transformer.transformer_blocks.0.attn"
    split: Tensors = {}
    for name, part in zip(("to_q", "to_k", "to_v"), b.chunk(3), strict=True):
        split |= {f"{path}.{name}.lora_A.weight": a, f"{path}.{name}.lora_B.weight": part}
    return {down: a, up: b}, split


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
        ),
        (
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight",
        ),
        (
            "base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight",
            "base_model.model.double_blocks.0.img_attn.qkv.lora_B.weight",
        ),
    ],
    ids=["xlabs", "kohya", "comfy", "bfl"],
)
def test_flux_names_with_fused_layers_are_split(flux: Any, down: str, up: str) -> None:
    fused, split = flux_qkv(down, up)

    assert same(read_lora(file_of(fused), flux), read_lora(file_of(split), flux))


def test_rank_and_alpha_of_diffusers_metadata_are_used(flux: Any) -> None:
    own = attention_only(flux, "transformer", rank=4)
    note = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_k": 2}}

    adapter = read_lora(file_of(own, {"lora_adapter_metadata": json.dumps(note)}), flux)

    for (_, path), one in adapter.factors.items():
        assert one.scale == (0.5 if path.endswith("attn.to_k") else 2.0)


def test_settings_are_found_behind_all_that_a_trainer_notes(flux: Any) -> None:
    own = attention_only(flux, "transformer", rank=4)
    notes = {f"ss_{number:03}": "noted" for number in range(300)}
    note = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})

    adapter = read_lora(file_of(own, {**notes, "zz": "last", "lora_adapter_metadata": note}), flux)

    assert {one.scale for one in adapter.factors.values()} == {0.5}


def test_an_alpha_of_zero_leaves_its_layer_alone(flux: Any) -> None:
    own = attention_only(flux, "transformer")
    layer = next(iter(own)).removesuffix(".lora_A.weight")

    adapter = read_lora(file_of({**own, f"{layer}.alpha": torch.tensor(0.0)}), flux)

    assert len(adapter.factors) == len(own) / 2 - 1
    assert f"'{layer}.lora_A.weight'" in adapter.info.notes[0]


@pytest.mark.parametrize("ending", ["lokr_w1", "hada_w1_a", "diff_b", "lora_B.bias"])
def test_zeros_beside_the_factors_of_a_layer_take_nothing_from_them(flux: Any, ending: str) -> None:
    own = attention_only(flux, "transformer")
    layer = next(iter(own)).removesuffix(".lora_A.weight")

    adapter = read_lora(file_of({**own, f"{layer}.{ending}": torch.zeros(32)}), flux)

    assert same(adapter, read_lora(file_of(own), flux))


def test_factors_have_the_dtype_of_their_layer() -> None:
    pipeline = tiny.flux().to(torch.bfloat16)

    adapter = read_lora(file_of(attention_only(pipeline, "transformer")), pipeline)

    assert {one.a.dtype for one in adapter.factors.values()} == {torch.bfloat16}


def changed(tensors: Tensors, ending: str, change: Any) -> Tensors:
    key = next(key for key in tensors if key.endswith(ending))
    return {**tensors, key: change(tensors[key])}


def without(tensors: Tensors, ending: str) -> Tensors:
    gone = next(key for key in tensors if key.endswith(ending))
    return {key: tensor for key, tensor in tensors.items() if key != gone}


def factors(module: str) -> Tensors:
    return {f"{module}.lora_A.weight": torch.ones(4, 32), f"{module}.lora_B.weight": torch.ones(16, 4)}


def kohya_final_layer() -> Tensors:
    name = "lora_unet_final_layer_linear"
    return {f"{name}.lora_down.weight": torch.ones(4, 32), f"{name}.lora_up.weight": torch.ones(16, 4)}


def test_what_does_not_fit_is_refused_by_its_first_bad_key(flux: Any, sd: Any, sdxl: Any) -> None:
    own = attention_only(flux, "transformer")
    layer = next(iter(own)).removesuffix(".lora_A.weight")
    cases: list[tuple[Tensors, Any, str]] = [
        (own, sd, r"'transformer\..*' names no .* layer of this model"),
        (attention_only(sd, "unet"), flux, r"'unet\..*' names no .* layer of this model"),
        (kohya(attention_only(sd, "unet")), flux, r"'lora_unet_.*' names no .* layer"),
        (kohya(attention_only(sd, "unet")), sdxl, r"'lora_unet_.* of shape .* needs"),
        (renamed(own, __0__="__7__"), flux, r"\.7\..*names no .* layer.*looks like a LoRA for flux"),
        (changed(own, "lora_A.weight", lambda t: t[:, :-1]), flux, r"lora_A.weight' is of shape .* needs"),
        (changed(own, "lora_B.weight", lambda t: t[:-1]), flux, r"lora_B.weight' is of shape .* needs"),
        (
            changed(own, "lora_B.weight", lambda t: t[:, :-1]),
            flux,
            r"do not fit each other \(.*lora_B.weight'",
        ),
        (changed(own, "lora_A.weight", lambda t: t[0, 0]), flux, r"lora_A.weight' is of shape \(\), which"),
        (changed(own, "lora_A.weight", lambda t: t * float("nan")), flux, r"not finite"),
        (changed(own, "lora_B.weight", lambda t: t * float("inf")), flux, r"not finite"),
        (without(own, "lora_B.weight"), flux, r"has no counterpart"),
        ({**own, f"{layer}.lora_B.bias": torch.ones(32)}, flux, r"changes biases .*lora_B.bias"),
        (
            {**own, "transformer.norm_out.linear.weight": torch.zeros(4, 4)},
            flux,
            r"'transformer.norm_out.linear.w",
        ),
        ({**own, **factors("text_encoder_3.x")}, flux, r"'text_encoder_3.x.lora_A.weight' names no"),
        ({**own, **factors("vae.x")}, flux, r"'vae.x.lora_A.weight' names no"),
        ({**own, **factors("transformer.proj_out"), **kohya_final_layer()}, flux, r"change the same layer"),
        ({**own, f"{layer}.lora_A.second.weight": torch.ones(4, 32)}, flux, r"are for the same layer"),
        ({**own, f"{layer}.alpha": torch.ones(3)}, flux, r"alpha' is of shape \(3\); an alpha is one number"),
        ({**own, f"{layer}.alpha": torch.tensor(1e9)}, flux, r"alpha' gives a change of .* at most 1000"),
        (
            {**own, "transformer.x_embedder.alpha": torch.tensor(2.0)},
            flux,
            r"x_embedder.alpha' has no counterpart",
        ),
    ]

    for number, (tensors, pipeline, reason) in enumerate(cases):
        with pytest.raises(BadRequest, match=reason) as refusal:
            print(number, read_lora(file_of(tensors), pipeline).factors.keys())
        assert refusal.value.param == "loras", number


@pytest.mark.parametrize(
    ("ending", "change", "reason"),
    [
        ("lora_A.weight", lambda t: torch.full_like(t, 3e38), "values up to 3e"),
        ("lora_B.weight", lambda t: t * 1e5, "gives a change of"),
    ],
)
def test_a_lora_of_absurd_size_is_refused_by_its_key(
    flux: Any, ending: str, change: Any, reason: str
) -> None:
    own = attention_only(flux, "transformer")

    with pytest.raises(BadRequest, match=rf"{ending}' .*{reason}.*earlier checkpoint"):
        read_lora(file_of(changed(own, ending, change)), flux)


def test_a_dora_without_its_magnitudes_is_refused(flux: Any) -> None:
    note = json.dumps({"transformer.use_dora": True})

    with pytest.raises(BadRequest, match=r"says that it is a DoRA .* has no magnitudes"):
        read_lora(file_of(attention_only(flux, "transformer"), {"lora_adapter_metadata": note}), flux)
