"""Models with weights from GGUF files: their values, exactness in batches, places, LoRAs and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf.quants
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.gguf.utils import GGUFLinear
from gguf import GGMLQuantizationType, get_tensor_name_map
from torch import Tensor, nn
from transformers import T5EncoderModel

from deployments.loras.source import layer_shapes
from deployments.models import offload as offloading
from deployments.models.load import load_pipeline
from deployments.models.model_memory import LoadBytes, weights_bytes
from deployments.models.quantise import saved_bytes
from deployments.models.row_independence import check_rows
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.planning.gguf_needs import GgufNeeds
from deployments.planning.machine import Machine
from deployments.planning.plan import PartPlan, Placement, Plan, plan_of
from deployments.protocol.card import ModelCard, Weights, load_card
from deployments.protocol.errors import ModelFailed
from deployments.protocol.request import ResolvedEdit, ResolvedRequest, Task
from tests.inference import tiny
from tests.inference.engine.exactness import Bench
from tests.inference.gguf_files import TYPES, write_gguf
from tests.inference.lora_files import file_of, random_lora
from tests.inference.loras.test_batched_lora import LoraEngine, call_of
from tests.inference.models.test_offload import OffloadedBench

CPU = torch.device("cpu")
CARD = load_card(Path(__file__).parents[3] / "configs/models/tiny-flux-dev.yaml")
every_kind = pytest.mark.parametrize("kind", TYPES)
FAR = {"Q8_0": 0.02, "Q4_0": 0.3, "Q4_K": 0.3, "Q6_K": 0.08, "F16": 0.01, "BF16": 0.0}
SHAPES = {"hidden_states": (2, 16, 16), "encoder_hidden_states": (2, 8, 32), "pooled_projections": (2, 32)}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX whose transformer is 256 wide, as blocks of 256 values need it."""
    made = tmp_path_factory.mktemp("wide")
    pipeline = tiny.flux()
    torch.manual_seed(1)
    pipeline.transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 8, 16),
    )
    pipeline.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def files(folder: Path) -> Mapping[str, Path]:
    """By type, files of its transformer."""
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    return {kind: write_gguf(folder / f"{kind}.gguf", transformer, kind) for kind in TYPES}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A FLUX whose transformer is 32 wide, and a file of it."""
    folder = tmp_path_factory.mktemp("narrow")
    pipeline = tiny.flux()
    pipeline.save_pretrained(folder)
    return folder, write_gguf(folder / "transformer.gguf", pipeline.transformer, "Q8_0")


def weights_of(folder: Path, dtype: Any = "float32", **gguf_files: Path) -> Weights:
    return Weights(path=str(folder), dtype=dtype, gguf={name: str(file) for name, file in gguf_files.items()})


def card_of(weights: Weights, **serving: Any) -> ModelCard:
    own = CARD.serving.model_copy(update=serving)
    return CARD.model_copy(update={"weights": weights, "serving": own, "adapters": []})


def bench(pipeline: Any, kind: type[Bench] = Bench) -> Bench:
    requests = [
        ResolvedRequest(
            model="tiny",
            prompt=("a cat", "two dogs")[seed % 2],
            width=64,
            height=64,
            num_inference_steps=1 + seed % 2,
            guidance_scale=3.0,
            seed=seed,
            max_sequence_length=32,
            edit=ResolvedEdit(image=b"", strength=1.0) if seed == 2 else None,
        )
        for seed in range(3)
    ]
    return kind(requests, exact="strict", model=DiffusersModel(pipeline, (Task.t2i, Task.i2i)))


def gguf_layers(module: nn.Module) -> dict[str, GGUFLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, GGUFLinear)}


# --- values and bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "bfloat16") for kind in TYPES), ("Q4_K", "float32")])
def test_a_batch_has_the_bits_of_each_request_alone(
    folder: Path, files: Mapping[str, Path], kind: str, dtype: Any
) -> None:
    own = bench(load_pipeline(weights_of(folder, dtype, transformer=files[kind]), CPU))

    fibers = own.together(own.requests)

    for request, fiber in zip(own.requests, fibers, strict=True):
        assert fiber.failure is None, fiber.failure
        assert not fiber.unproven
        assert fiber.result.same_bits(own.expected(request))


def forward(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(shape, generator=generator).to(transformer.dtype) for name, shape in SHAPES.items()
    }
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    times = torch.full((2,), 0.5), torch.full((2,), 3.5)
    result: Tensor = transformer(**noise, **ids, timestep=times[0], guidance=times[1], return_dict=False)[0]
    return result.float()


@every_kind
def test_results_move_little(folder: Path, files: Mapping[str, Path], kind: str) -> None:
    plain, own = (
        forward(load_pipeline(weights, CPU).transformer)
        for weights in (
            weights_of(folder, "bfloat16"),
            weights_of(folder, "bfloat16", transformer=files[kind]),
        )
    )

    error = float((own - plain).norm() / plain.norm())
    assert error <= FAR[kind]
    assert (error == 0) is (kind == "BF16"), "only this file has the values of the folder, in bfloat16"


@every_kind
def test_layers_compute_with_the_values_that_the_library_reads(
    folder: Path, files: Mapping[str, Path], kind: str
) -> None:
    transformer = load_pipeline(weights_of(folder, transformer=files[kind]), CPU).transformer
    reader = gguf.GGUFReader(files[kind])

    for tensor in reader.tensors:
        if tensor.name.endswith(".weight") and tensor.data.ndim == 2:
            expected = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            layer = transformer.get_submodule(tensor.name.removesuffix(".weight"))
            computed = layer(torch.eye(layer.in_features)) - layer.bias
            assert torch.allclose(computed.T, expected, atol=2e-3), tensor.name


def test_only_quantised_matrices_are_computed_in_blocks(folder: Path, files: Mapping[str, Path]) -> None:
    with_blocks = load_pipeline(weights_of(folder, transformer=files["Q4_K"]), CPU).transformer
    plain = load_pipeline(weights_of(folder, "bfloat16", transformer=files["BF16"]), CPU).transformer

    blocks = gguf_layers(with_blocks)
    assert "transformer_blocks.0.attn.to_q" in blocks
    assert "x_embedder" not in blocks
    assert with_blocks.dtype is torch.float32
    assert gguf_layers(plain) == {}
    assert {weight.dtype for weight in plain.parameters()} == {torch.bfloat16}


def test_bytes_are_known_before_anything_is_read(folder: Path, files: Mapping[str, Path]) -> None:
    asked: list[LoadBytes] = []
    weights = weights_of(folder, "bfloat16", transformer=files["Q4_K"])

    pipeline = load_pipeline(
        weights, CPU, plan=plan_of(card_of(weights), Machine("CPU", "cpu")), admit=asked.append
    )

    transformer = pipeline.transformer
    layers = gguf_layers(transformer).values()
    blocks = sum(layer.weight.nbytes for layer in layers)
    values = sum(layer.in_features * layer.out_features for layer in layers)
    assert blocks == values * 144 // 256
    others = sum(p.nbytes for p in transformer.parameters() if p.is_floating_point())
    assert weights_bytes([transformer]) == blocks + others
    assert asked[0].held == pytest.approx(asked[1].held, rel=0.01)
    part = PartPlan("transformer", "bfloat16", gguf=GgufNeeds("a", "Q4_K"))
    assert saved_bytes(transformer, part) == 2 * values - blocks


def test_no_weight_is_in_float32_on_its_way(
    folder: Path, files: Mapping[str, Path], monkeypatch: Any
) -> None:
    """Blocks are views of the mapped file on a CPU; nothing of their size is allocated."""
    transformer = load_pipeline(weights_of(folder, "bfloat16", transformer=files["Q8_0"]), CPU).transformer
    layers = gguf_layers(transformer)

    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers.values()}

    assert len(layers) > 10
    assert len(storages) == 1, "all of them lie in the mapping of the one file"
    (storage,) = {layer.weight.untyped_storage().nbytes() for layer in layers.values()}
    assert storage == files["Q8_0"].stat().st_size


# --- places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["on_demand", "streamed", "sequential"])
def test_blocks_may_live_on_the_host(
    narrow: tuple[Path, Path], placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading, "SMALL_BYTES", 0)
    weights = weights_of(narrow[0], transformer=narrow[1])
    plain = bench(load_pipeline(weights, CPU))
    plan = Plan("float32", (PartPlan("transformer", "float32", placement, gguf=GgufNeeds("a", "Q8_0")),))
    pipeline = load_pipeline(weights, CPU, plan=plan)
    moving = bench(pipeline, OffloadedBench)

    fibers = moving.together(moving.requests)

    assert offloading.offloaded_part(pipeline.transformer) is not None
    for request, fiber in zip(moving.requests, fibers, strict=True):
        assert fiber.failure is None, fiber.failure
        assert fiber.result.same_bits(plain.expected(request))


# --- LoRAs ------------------------------------------------------------------------------------------------


def test_requests_with_different_loras_have_the_bits_that_they_have_alone(narrow: tuple[Path, Path]) -> None:
    pipeline = load_pipeline(weights_of(narrow[0], transformer=narrow[1]), CPU)
    plain = load_pipeline(weights_of(narrow[0]), CPU)
    engine = LoraEngine(pipeline, deterministic=True)
    loras: list[list[tuple[bytes, float]]] = [
        [],
        [(file_of(random_lora(plain, ["transformer"], rank=4)), 0.8)],
        [(file_of(random_lora(plain, ["transformer"], rank=8)), 1.0)],
    ]
    works = [
        (call_of(pipeline, seed, num_inference_steps=1, width=64, height=64), engine.lora_set(own))
        for seed, own in enumerate(loras)
    ]

    alone = [engine.together([work], rows=4)[0] for work in works]
    together = engine.together(works, rows=4)

    assert engine.rows > engine.forwards
    assert layer_shapes(pipeline) == layer_shapes(plain)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    without = call_of(pipeline, 1, num_inference_steps=1, width=64, height=64)()
    assert not torch.equal(together[1], without)


def test_a_lora_changes_a_layer_of_blocks_as_it_changes_a_layer_of_floats(narrow: tuple[Path, Path]) -> None:
    """By the same amount, but for what quantised weights change themselves."""
    changes: list[Tensor] = []
    file = file_of(random_lora(load_pipeline(weights_of(narrow[0]), CPU), ["transformer"], rank=4, seed=3))
    for weights in (weights_of(narrow[0], transformer=narrow[1]), weights_of(narrow[0])):
        pipeline = load_pipeline(weights, CPU)
        engine = LoraEngine(pipeline)
        work = call_of(pipeline, 1, num_inference_steps=1, width=64, height=64)
        changes.append(engine.together([(work, engine.lora_set([(file, 1.0)]))])[0] - work())

    blocks, floats = changes
    assert float((blocks - floats).norm() / floats.norm()) < 0.1


@every_kind
def test_rows_do_not_depend_on_their_neighbours(folder: Path, files: Mapping[str, Path], kind: str) -> None:
    transformer = load_pipeline(weights_of(folder, "bfloat16", transformer=files[kind]), CPU).transformer

    check_rows([transformer], "strict")


# --- text encoders ----------------------------------------------------------------------------------------


def llama_cpp_name(name: str) -> str:
    path, _, kind = name.rpartition(".")
    return f"{get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2).get_name(path)}.{kind}"


@pytest.fixture(scope="module")
def t5(folder: Path) -> Path:
    """In llama.cpp's names, with a tensor of a decoder as files of a whole T5 have it."""
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_2")
    state = {
        llama_cpp_name(n): t for n, t in encoder.state_dict().items() if n != "encoder.embed_tokens.weight"
    }
    state["dec.output_norm.weight"] = torch.ones(32)
    return write_gguf(folder / "t5.gguf", state, "Q8_0", architecture="t5encoder")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_t5_comes_from_a_file_and_stays_in_blocks(folder: Path, t5: Path, dtype: Any) -> None:
    weights = weights_of(folder, dtype, text_encoder_2=t5)
    encoder = load_pipeline(weights, CPU).text_encoder_2
    plain = load_pipeline(weights_of(folder, dtype), CPU).text_encoder_2
    tokens = torch.arange(16)[None]

    one, other = (model(tokens).last_hidden_state.float() for model in (encoder, plain))

    assert len(gguf_layers(encoder)) == 2 * (4 + 3)
    assert encoder.dtype is plain.dtype
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
    assert 0 < float((one - other).norm() / other.norm()) < 0.03


def test_prompts_are_encoded_in_batches_as_alone(folder: Path, files: Mapping[str, Path], t5: Path) -> None:
    own = bench(load_pipeline(weights_of(folder, transformer=files["Q4_0"], text_encoder_2=t5), CPU))

    fibers = own.together(own.requests)

    for request, fiber in zip(own.requests, fibers, strict=True):
        assert fiber.failure is None, fiber.failure
        assert fiber.result.same_bits(own.expected(request))


# --- what is refused --------------------------------------------------------------------------------------


def refuse(weights: Weights, cause: str) -> None:
    with pytest.raises(ModelFailed, match=cause):
        load_pipeline(weights, CPU, admit=lambda _bytes: pytest.fail("it is read"))


def test_a_file_of_another_architecture_is_refused(folder: Path, tmp_path: Path, t5: Path) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    file = write_gguf(tmp_path / "wan.gguf", transformer, "Q8_0", architecture="wan")

    refuse(
        weights_of(folder, transformer=file),
        "architecture 'wan', not a FluxTransformer2DModel; use a file of",
    )
    refuse(weights_of(folder, transformer=t5), "architecture 't5encoder', not a FluxTransformer2DModel")
    refuse(weights_of(folder, text_encoder=t5), "named for a CLIPTextModel, .* denoisers and for T5")


def test_a_file_without_an_architecture_is_known_by_its_tensors(folder: Path, tmp_path: Path) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    file = write_gguf(tmp_path / "nameless.gguf", transformer, "Q8_0", architecture=None)

    assert gguf_layers(load_pipeline(weights_of(folder, transformer=file), CPU).transformer)


def test_a_file_of_a_model_of_another_size_is_refused_by_the_tensor(folder: Path, tmp_path: Path) -> None:
    state = FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
    other = {name: tensor[:, :32] if name == "proj_out.weight" else tensor for name, tensor in state.items()}
    file = write_gguf(tmp_path / "other.gguf", other, "Q8_0")
    refuse(
        weights_of(folder, transformer=file), r"proj_out.weight has the shape \(16, 32\), and .* \(16, 256\)"
    )

    more = state | {"transformer_blocks.7.norm1.linear.weight": torch.ones(4, 4)}
    file = write_gguf(tmp_path / "more.gguf", more, "Q8_0")
    refuse(weights_of(folder, transformer=file), "has transformer_blocks.7.norm1.linear.weight, for which")

    fewer = {name: tensor for name, tensor in state.items() if not name.startswith("transformer_blocks")}
    file = write_gguf(tmp_path / "fewer.gguf", fewer, "Q8_0")
    refuse(
        weights_of(folder, transformer=file), "do not have the names and shapes of a FluxTransformer2DModel"
    )

    file = write_gguf(tmp_path / "none.gguf", {"a": torch.ones(32)}, "Q8_0", architecture="flux")
    refuse(
        weights_of(folder, transformer=file), "of the architecture 'flux' do not have the names and shapes"
    )


def test_a_part_that_the_model_does_not_have_is_named(folder: Path, files: Mapping[str, Path]) -> None:
    refuse(weights_of(folder, unet=files["Q8_0"]), "weights.gguf names unet, .* it has text_encoder,")


def test_a_file_that_is_not_there_or_cut_is_named(
    folder: Path, files: Mapping[str, Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(files["Q8_0"].read_bytes()[:-100])

    refuse(weights_of(folder, transformer=tmp_path / "no.gguf"), "no.gguf cannot be read .*correct weights.g")
    refuse(weights_of(folder, transformer=cut), "cut.gguf cannot be used: it is cut: .* fetch it again")


def test_weights_of_the_folder_are_not_needed_where_a_file_has_them(
    folder: Path, files: Mapping[str, Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.gguf")))
    for file in (copied / "transformer").glob("*.safetensors"):
        file.unlink()
    assert json.loads((copied / "transformer/config.json").read_bytes())

    pipeline = load_pipeline(weights_of(copied, transformer=files["Q8_0"]), CPU)

    assert gguf_layers(pipeline.transformer)


def test_an_original_shape_is_restored(folder: Path, tmp_path: Path) -> None:
    """ComfyUI-GGUF writes convolutions as matrices whose rows have whole blocks."""
    from tests.inference.gguf_files import blocks

    unet = tiny.sd().unet
    model = tmp_path / "sd"
    tiny.sd().save_pretrained(model)
    writer = gguf.GGUFWriter(tmp_path / "sd.gguf", "sd1")
    for name, tensor in unet.state_dict().items():
        values = tensor.numpy()
        if values.ndim == 4 and values.size % 32 == 0:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            stored = blocks(values.reshape(-1, 32).astype(np.float32), "Q8_0")
            writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    loaded = load_pipeline(weights_of(model, unet=tmp_path / "sd.gguf"), CPU).unet

    own, expected = loaded.state_dict(), load_pipeline(weights_of(model), CPU).unet.state_dict()
    assert gguf_layers(loaded) == {}
    for name, tensor in expected.items():
        assert own[name].shape == tensor.shape
        assert torch.allclose(own[name], tensor, atol=0.02 * float(tensor.abs().max())), name
