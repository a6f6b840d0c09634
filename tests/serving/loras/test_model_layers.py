"""The layers of a model are known before any replica runs, by the headers of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.lora_format.layer_names import LayerNames
from deployments.protocol.card import Weights, load_card
from serve_app.loras.model_layers import stored_layer_shapes

ROOT = Path(__file__).parents[3]


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    found = stored_layer_shapes(load_card(ROOT / f"configs/models/{model}.yaml").weights)
    assert found is not None
    return dict(found)


@pytest.mark.parametrize(
    ("model", "module", "layer"),
    [
        ("tiny-flux-schnell", "lora_unet_img_in", ("transformer", "x_embedder")),
        (
            "tiny-flux-schnell",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q"),
        ),
        ("tiny-sdxl-base", "lora_te2_text_projection", ("text_encoder_2", "text_projection")),
        ("tiny-sdxl-base", "lora_unet_input_blocks_0_0", ("unet", "conv_in")),
        ("tiny-sd15", "lora_unet_conv_out", ("unet", "conv_out")),
        ("tiny-wan", "blocks.0.self_attn.q", ("transformer", "blocks.0.attn1.to_q")),
    ],
)
def test_the_layers_of_a_shipped_model_are_found_by_trainers_names(
    model: str, module: str, layer: tuple[str, str]
) -> None:
    targets = LayerNames(shapes(model)).find(module)

    assert targets is not None
    assert [target.layer for target in targets] == [layer]


def test_embeddings_norms_and_three_dimensional_convolutions_are_no_layers() -> None:
    found = shapes("tiny-wan")

    assert not [
        name for name in found if "embed_tokens" in name or "norm" in name or "patch_embedding" in name
    ]
    assert found["transformer.proj_out"] == (64, 160)


def test_weights_elsewhere_or_in_another_format_are_left_to_the_replica(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"not safetensors")

    for weights in (
        Weights(repo="a/b"),
        Weights(path="s3://b/f"),
        Weights(path="models/none"),
        Weights(path=str(tmp_path)),
    ):
        assert stored_layer_shapes(weights) is None


def part(folder: Path, name: str, files: dict[str, int], **config: object) -> None:
    """A part of a pipeline, with a layer of this width in each file."""
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(config))
    for file, width in files.items():
        entry = {"dtype": "F16", "shape": [2, width], "data_offsets": [0, 4 * width]}
        header = json.dumps({"a.weight": entry})
        (folder / name / file).write_bytes(len(header).to_bytes(8, "little") + header.encode())


def test_nothing_is_known_where_the_files_do_not_say_all(tmp_path: Path) -> None:
    """Else LoRAs would be refused that fit."""
    part(tmp_path, "unet", {"model.safetensors": 4})
    assert stored_layer_shapes(Weights(path=str(tmp_path))) == {"unet.a": (2, 4)}

    part(tmp_path, "text_encoder", {"pytorch_model.bin": 4})
    assert stored_layer_shapes(Weights(path=str(tmp_path))) is None

    part(tmp_path / "text_encoder", "transformer", {"model.safetensors": 4}, quantization_config={"bits": 4})
    assert stored_layer_shapes(Weights(path=str(tmp_path / "text_encoder"))) is None


def test_only_the_files_of_a_variant_are_read(tmp_path: Path) -> None:
    files = {"model.fp16.safetensors": 4, "model.safetensors": 8, "model.bf16-00001-of-00001.safetensors": 16}
    part(tmp_path, "unet", files)
    assert stored_layer_shapes(Weights(path=str(tmp_path), variant="fp16")) == {"unet.a": (2, 4)}
    assert stored_layer_shapes(Weights(path=str(tmp_path))) == {"unet.a": (2, 8)}
    assert stored_layer_shapes(Weights(path=str(tmp_path), variant="bf16")) == {"unet.a": (2, 16)}
