"""Whatever the bytes, a LoRA's header is accepted or refused with a reason, quickly and without torch."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from deployments.lora_format.file_info import inspect_lora
from deployments.lora_format.header import MAX_HEADER_BYTES, MAX_TENSORS
from deployments.protocol.errors import BadRequest
from tests.inference.lora_files import forged

ROOT = Path(__file__).parents[3]
NIGHT = (ROOT / "models/tiny-flux-schnell/loras/lora_night/pytorch_lora_weights.safetensors").read_bytes()
DOWN, UP = "unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet.down_blocks.0.attn1.to_q.lora_B.weight"


def entry(shape: list[int], start: int, dtype: str = "F16", width: int = 2) -> dict[str, Any]:
    size = width
    for side in shape:
        size *= side
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def ones(count: int) -> bytes:
    """Values of float16 that are 1."""
    return b"\x00\x3c" * count


def pair(**changes: Any) -> dict[str, Any]:
    """A header of one layer of rank 4."""
    return {DOWN: entry([4, 8], 0), UP: entry([8, 4], 64)} | changes


def test_the_info_of_a_shipped_lora() -> None:
    info = inspect_lora(NIGHT)

    assert (info.rank, info.tensors, info.dtype, info.notes) == (8, 68, "BF16", ())
    assert (info.style, info.family, info.size_bytes) == ("diffusers", "flux", len(NIGHT))


def test_name_and_trigger_words_come_from_the_trainers_metadata() -> None:
    tags = {"10_cats": {"ohwx cat": 10, "sitting": 4}, "5_more": {"ohwx cat": 5, "a": 1, "b": 1}}
    kohya = {
        "ss_output_name": "cats",
        "ss_tag_frequency": json.dumps(tags),
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    spec = {"modelspec.title": "Cats", "modelspec.trigger_phrase": "ohwx, cat"}

    info = inspect_lora(forged(pair(__metadata__=kohya), bytes(128)))
    specified = inspect_lora(forged(pair(__metadata__=spec), bytes(128)))

    assert (info.name, info.trigger_words[0], info.family) == ("cats", "ohwx cat", "sdxl")
    assert (specified.name, specified.trigger_words) == ("Cats", ("ohwx", "cat"))


@pytest.mark.parametrize(
    ("key", "family", "style"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "flux", "diffusers"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "flux", "kohya"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "flux", "xlabs"),
        ("base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight", "flux", "bfl"),
        ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", "unknown", "peft"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight", "sdxl", "kohya"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "sd", "kohya"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "wan", "bfl"),
        ("transformer.transformer_blocks.0.img_attn_qkv.lora_A.weight", "hunyuan_video", "diffusers"),
        ("transformer.transformer_blocks.5.attn1.to_q.lora_A.weight", "ltx", "diffusers"),
        ("diffusion_model.transformer_blocks.0.attn2.to_q.lora_A.weight", "ltx", "bfl"),
        ("transformer.transformer_blocks.5.attn.to_q.lora_A.weight", "unknown", "diffusers"),
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight", "sdxl", "diffusers"),
        (
            "base_model.model.up_blocks.1.attentions.0.transformer_blocks.0.attn1.q.lora_A.weight",
            "sd",
            "peft",
        ),
    ],
)
def test_family_and_key_style_are_guessed_from_the_keys(key: str, family: str, style: str) -> None:
    up = key.replace("lora_A", "lora_B").replace("down.weight", "up.weight")
    info = inspect_lora(forged({key: entry([4, 8], 0), up: entry([8, 4], 64)}, ones(64)))

    assert (info.family, info.style) == (family, style)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "ends before its header"),
        (pickle.dumps({"a": 1}), "pickle"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + bytes(100), "header is over"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated"),
        (forged(b"\xff\xfe"), "not readable"),
        (forged(b"[" * 100_000), "not readable"),
        (forged(b'{"a": 1, "a": 2}'), "not readable"),
        (forged([]), "no table"),
        (forged({}), "no tensors"),
        (forged({"__metadata__": {"a": 1}}), "metadata"),
        (forged(b'{"__metadata__": {"a": "1", "a": "2"}}'), "not readable"),
        (forged({"__metadata__": {str(i): "" for i in range(5000)}}), "metadata has over 4096 entries"),
        (forged({"__metadata__": {"lora_adapter_metadata": "x" * 2**23}}), "lora_adapter_metadata is over"),
        (forged({DOWN: 1}), "not dtype, shape"),
        (forged(pair() | {"x": entry([1], 128, "C64", 8)}, bytes(136)), "save it as one of F16, BF16, F32"),
        (forged(pair() | {UP: entry([8, 4], 64, "I16")}, ones(64)), "of type I16; save it as one of F16"),
        (forged(pair() | {DOWN: entry([4, 8], 0) | {"shape": [-4, -8]}}, bytes(128)), "valid shape"),
        (forged(pair() | {DOWN: entry([4, 8], 0) | {"shape": [True, 8]}}, bytes(128)), "valid shape"),
        (forged(pair() | {DOWN: entry([4, 9], 0) | {"data_offsets": [0, 64]}}, bytes(128)), "another size"),
        (forged(pair() | {UP: entry([8, 4], 32)}, bytes(128)), "overlaps"),
        (forged(pair() | {UP: entry([8, 4], 72)}, bytes(136)), "leaves a gap"),
        (forged(pair(), bytes(100)), "truncated"),
        (forged(pair(), bytes(200)), "after its last tensor"),
        (forged({"model.weight": entry([4, 8], 0)}, ones(32)), "'model.weight' is neither a factor"),
        (forged(pair() | {DOWN: entry([257, 2], 0), UP: entry([2, 257], 1028)}, bytes(2056)), "rank is 257"),
        (forged({UP: entry([8, 4], 0)}, bytes(64)), "has no counterpart"),
        (forged({"unet.blocks.99999.lora_A.weight": entry([4, 8], 0)}, bytes(64)), "no name of a layer"),
        (forged({f"unet.{i}.lora_A.weight": entry([0], 0) for i in range(MAX_TENSORS + 1)}), "has over 8192"),
        (forged(pair() | {DOWN: entry([4, 8], 0) | {"shape": [1] * 2000}}, bytes(128)), "not readable"),
        (forged(pair() | {"x" * 600: entry([4, 8], 128)}, bytes(192)), "table of tensors has too long names"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_the_reason(file: bytes, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason) as refusal:
        inspect_lora(file)

    assert refusal.value.param == "loras"


LAYER = "unet.down_blocks.0.attn1.to_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_proj_in"
UNSERVED = {  # keys as peft, LyCORIS and kohya write them -> what the refusal says
    f"{KOHYA}.a1.weight": "it is a GLoRA",
    f"{LAYER}.oft_R.weight": "it is an OFT or BOFT",
    f"{KOHYA}.oft_blocks": "it is an OFT or BOFT",
    f"{LAYER}.boft_R": "it is an OFT or BOFT",
    f"{LAYER}.ia3_l": "it is an IA3",
    f"{KOHYA}.on_input": "it is an IA3",
    f"{LAYER}.vera_lambda_b": "it is a VeRA",
    f"{LAYER}.hra_u": "it is an HRA",
    f"{LAYER}.fourierft_spectrum": "it is a FourierFT",
    f"{KOHYA}.diff": "whole differences of layers",
    f"{KOHYA}.w_norm": "it changes norms",
    f"{KOHYA}.b_norm": "it changes norms",
    f"{KOHYA}.diff_b": "it changes biases",
    f"{LAYER}.lora_B.bias": "it changes biases",
    f"{KOHYA}.lora_up.bias": "it changes biases",
    "bundle_emb.style.string_to_param.*": "text embeddings",
    "double_blocks.0.img_attn.norm.query_norm.scale": "it is a Control LoRA",
    "lora_controlnet": "it is a Control LoRA",
}


@pytest.mark.parametrize("key", UNSERVED)
def test_other_kinds_than_plain_loras_are_refused_by_their_name(key: str) -> None:
    alone = forged({key: entry([4, 8], 0)}, ones(32))
    beside_a_plain_layer = forged(pair(**{key: entry([4, 8], 128)}), ones(96))

    for file in (alone, beside_a_plain_layer):
        with pytest.raises(BadRequest, match=UNSERVED[key]) as refusal:
            inspect_lora(file)
        assert repr(key) in refusal.value.message
        assert "as a plain LoRA, without these tensors" in refusal.value.message


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # peft's own of a bias
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.LoraConfig(r=2, lora_bias=True, target_modules=["q"]), "it changes biases"),
        (peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q"]), "it is an OFT or BOFT"),
        (peft.IA3Config(target_modules=["q"], feedforward_modules=[]), "it is an IA3"),
        (peft.VeraConfig(r=2, target_modules=["q"]), "it is a VeRA"),
        (peft.HRAConfig(r=2, target_modules=["q"]), "it is an HRA"),
        (peft.FourierFTConfig(n_frequency=4, target_modules=["q"]), "it is a FourierFT"),
    ],
)
def test_what_peft_saves_of_other_kinds_is_refused_by_their_name(config: Any, reason: str) -> None:
    model = peft.get_peft_model(nn.Sequential(OrderedDict(q=nn.Linear(8, 8))), config)
    file = save({key: value + 1 for key, value in peft.get_peft_model_state_dict(model).items()})

    with pytest.raises(BadRequest, match=reason):
        inspect_lora(file)


ZERO_IS_NOTHING = [
    f"{KOHYA}.diff",
    f"{KOHYA}.diff_b",
    "diffusion_model.blocks.0.diff_m",
    "diffusion_model.blocks.0.norm3.diff",
    f"{LAYER}.lora_B.bias",
    f"{KOHYA}.w_norm",
    f"{KOHYA}.lokr_w1",
    f"{KOHYA}.hada_w2_b",
    "unet.nowhere.something_new",
]
ZERO_IS_A_VALUE = [
    f"{KOHYA}.dora_scale",
    f"{LAYER}.lora_magnitude_vector",
    f"{KOHYA}.set_weight",
    f"{LAYER}.weight",
    f"{LAYER}.ia3_l",
    f"{LAYER}.oft_R.weight",
]


@pytest.mark.parametrize("key", ZERO_IS_NOTHING)
def test_extras_that_are_zero_are_accepted_and_noted(key: str) -> None:
    info = inspect_lora(forged(pair(**{key: entry([4, 8], 128)}), ones(64) + bytes(64)))

    assert info.notes == (f"1 of its layers are zero and change nothing; the first is {key!r}.",)


@pytest.mark.parametrize("key", ZERO_IS_A_VALUE)
def test_extras_whose_zero_changes_the_model_are_refused(key: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(repr(key))):
        inspect_lora(forged(pair(**{key: entry([4, 8], 128)}), ones(64) + bytes(64)))


def test_a_lora_of_zeros_says_that_it_changes_nothing() -> None:
    assert inspect_lora(forged(pair(), bytes(128))).notes == ("All layers are zero: it changes nothing.",)


def test_megabytes_of_the_trainers_tags_are_accepted() -> None:
    """kohya writes the tags of all captions into the metadata."""
    tags = {"10_cats": {f'tag number {i}, with "quotes"': i for i in range(100_000)}}
    note = {"ss_tag_frequency": json.dumps(tags), "workflow": "x" * 2**22, "ss_output_name": "cats"}
    file = forged(pair(__metadata__=note), ones(64))
    assert 2**22 < len(file) < MAX_HEADER_BYTES

    info = inspect_lora(file)

    assert (info.name, info.tensors) == ("cats", 2)
    assert max(map(len, info.metadata.values())) == 2_000


def test_of_a_hundred_thousand_empty_tensors_only_the_first_are_read() -> None:
    """What follows the limit is not even JSON."""
    table = json.dumps({f"unet.{i}.lora_A.weight": entry([0], 0) for i in range(MAX_TENSORS + 1)})
    file = forged(table[:-1].encode() + b"," + b"?" * 10_000_000)

    with pytest.raises(BadRequest, match="table of tensors has over 8192 entries"):
        inspect_lora(file)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        inspect_lora(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.binary(max_size=40))
def test_any_json_for_a_header_is_refused(header: Any, data: bytes) -> None:
    with pytest.raises(BadRequest):
        inspect_lora(forged(header, data))


ODD = st.integers(-2, 300) | st.sampled_from([2**31, 2**40, 2**63, -(2**70)]) | st.booleans() | st.floats()


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([DOWN, UP, "lora_unet_a.lora_down.weight", "", "\0"]) | st.text(max_size=30),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F16", "BF16", "F32", "I8", "", "F64"]),
                "shape": st.lists(ODD, max_size=6),
                "data_offsets": st.lists(ODD, min_size=1, max_size=3),
            }
        ),
        max_size=5,
    ),
    st.binary(max_size=200),
)
def test_any_table_of_tensors_is_accepted_or_refused(header: Any, data: bytes) -> None:
    with suppress(BadRequest):
        assert 1 <= inspect_lora(forged(header, data)).rank <= 128


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(NIGHT) - 1), st.integers(0, 255))
def test_a_flipped_byte_is_accepted_or_refused(at: int, value: int) -> None:
    header = 8 + int.from_bytes(NIGHT[:8], "little")
    at = at % (header + 16)

    with suppress(BadRequest):
        assert inspect_lora(NIGHT[:at] + bytes([value]) + NIGHT[at + 1 :]).tensors == 68


def test_reading_a_header_loads_no_torch() -> None:
    code = (
        "import sys; from deployments.lora_format.file_info import inspect_lora; "
        "sys.exit('torch is loaded' if {'torch', 'safetensors', 'diffusers'} & set(sys.modules) else 0)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
