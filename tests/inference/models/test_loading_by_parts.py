"""The parts of a model are read one at a time, in their own dtype, after their bytes are admitted."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors import safe_open
from torch import nn
from transformers import T5EncoderModel

from deployments.models import unmapped
from deployments.models.load import load_pipeline
from deployments.models.model_memory import LoadBytes, weights_bytes
from deployments.models.parts import find_parts
from deployments.models.weight_files import find_weights
from deployments.planning.plan import PartPlan, Plan, everything_on_device
from deployments.protocol.card import Weights
from deployments.protocol.errors import ModelFailed, OutOfMemory

MODELS = Path(__file__).parents[3] / "models"
FLUX = MODELS / "tiny-flux-dev"
CPU = torch.device("cpu")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FLUX, tmp_path / "model"))


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def split(folder: Path, kind: Any, shard_bytes: int = 300_000) -> None:
    """Save the module in this folder again, in shards."""
    module = kind.from_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    module.save_pretrained(folder, max_shard_size=shard_bytes)
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_what_is_refused_has_read_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LoadBytes] = []

    def refuse(size: LoadBytes) -> None:
        asked.append(size)
        raise OutOfMemory("no")

    def read(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("weights are read")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", read)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", read)
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", read)

    with pytest.raises(OutOfMemory):
        load_pipeline(Weights(path=str(FLUX)), CPU, admit=refuse)

    monkeypatch.undo()
    pipeline = load_pipeline(Weights(path=str(FLUX)), CPU, admit=asked.append)
    held = weights_bytes(modules_of(pipeline).values())
    assert asked[0] == asked[1], "the same model asks for the same"
    assert asked[2] == LoadBytes(held)
    assert abs(asked[1].held - held) < held / 100, "without buffers that are in no file"


def test_each_part_has_the_dtype_of_its_plan() -> None:
    """Files of float32 and of bfloat16."""
    plan = Plan("bfloat16", parts=(PartPlan("vae", "float32"), PartPlan("text_encoder", "float16")))

    parts = modules_of(load_pipeline(Weights(path=str(FLUX)), CPU, plan=plan))

    dtypes = {name: {tensor.dtype for tensor in part.parameters()} for name, part in parts.items()}
    assert dtypes == {
        "text_encoder": {torch.float16},
        "text_encoder_2": {torch.bfloat16},
        "transformer": {torch.bfloat16},
        "vae": {torch.float32},
    }


def test_weights_in_shards_are_those_of_one_file(copied: Path) -> None:
    whole = modules_of(load_pipeline(Weights(path=str(copied)), CPU))
    split(copied / "text_encoder_2", T5EncoderModel)
    split(copied / "vae", AutoencoderKL)

    in_shards = modules_of(load_pipeline(Weights(path=str(copied)), CPU))

    for name, part in whole.items():
        state = in_shards[name].state_dict()
        assert all(torch.equal(state[path], tensor) for path, tensor in part.state_dict().items())


def test_shards_of_a_text_encoder_are_not_all_mapped_while_they_are_copied(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in their own dtype they are, and are the weights."""
    split(copied / "text_encoder_2", T5EncoderModel)
    shards = {path.name for path in (copied / "text_encoder_2").glob("*.safetensors")}
    opened: Counter[str] = Counter()

    def record(path: Any, *arguments: Any, **options: Any) -> Any:
        opened[Path(path).name] += 1
        return safe_open(path, *arguments, **options)

    monkeypatch.setattr(unmapped, "safe_open", record)
    cast = load_pipeline(Weights(path=str(copied), dtype="float32"), CPU)
    to_cast = dict(opened)
    opened.clear()
    load_pipeline(Weights(path=str(copied), dtype="bfloat16"), CPU)

    tensors = len(cast.text_encoder_2.state_dict())
    assert sum(to_cast[shard] for shard in shards) >= tensors, "one mapping for each"
    assert [opened[shard] for shard in shards] == [1] * len(shards)


def test_a_shard_that_is_missing_is_named_before_anything_is_read(copied: Path) -> None:
    split(copied / "vae", AutoencoderKL)
    gone = sorted((copied / "vae").glob("*.safetensors"))[1]
    gone.unlink()
    asked: list[LoadBytes] = []

    with pytest.raises(ModelFailed, match=f"{gone.name}, which is missing"):
        load_pipeline(Weights(path=str(copied)), CPU, admit=asked.append)

    assert asked == []


def test_a_shard_that_is_cut_is_named_before_anything_is_read(copied: Path) -> None:
    split(copied / "vae", AutoencoderKL)
    cut = sorted((copied / "vae").glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-100])
    asked: list[LoadBytes] = []

    with pytest.raises(ModelFailed, match=f"{cut.name} is damaged or cut"):
        load_pipeline(Weights(path=str(copied)), CPU, admit=asked.append)

    assert asked == []


def test_a_variant_is_taken_where_a_part_has_it(copied: Path) -> None:
    AutoencoderKL.from_pretrained(copied / "vae").half().save_pretrained(copied / "vae", variant="fp16")
    with torch.no_grad():
        other = AutoencoderKL.from_pretrained(copied / "vae")
        other.decoder.conv_in.bias.fill_(7)
        other.save_pretrained(copied / "vae")

    parts = find_parts(copied, everything_on_device("bfloat16"), "fp16")
    pipeline = load_pipeline(Weights(path=str(copied), variant="fp16"), CPU)

    assert {name for name, part in parts.items() if part.files.variant == "fp16"} == {"vae"}
    assert not (pipeline.vae.decoder.conv_in.bias == 7).any()
    with pytest.raises(ModelFailed, match="variant 'bf16'"):
        load_pipeline(Weights(path=str(copied), variant="bf16"), CPU)


def test_shards_of_a_variant_are_those_of_its_index(tmp_path: Path) -> None:
    names = ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "b.fp16.safetensors"]
    for name in [*names, "diffusion_pytorch_model.safetensors"]:
        (tmp_path / name).touch()
    index = {"weight_map": {"one": names[0], "two": names[1]}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))

    assert {path.name for path in find_weights(tmp_path, "fp16").paths} == set(names)
    assert [path.name for path in find_weights(tmp_path).paths] == ["diffusion_pytorch_model.safetensors"]
