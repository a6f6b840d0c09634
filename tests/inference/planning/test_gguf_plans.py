"""Plans of models whose weights come from GGUF files: bytes of the file's own tensors, and what is refused.

Files of FLUX.1-dev at its real size have a header and a hole in place of their weights.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxTransformer2DModel

from deployments.gguf_format.header import read_header
from deployments.gguf_format.sizes import layer_workspace
from deployments.models.gguf_weights import find_gguf
from deployments.planning.gpus import GPUS
from deployments.planning.local_files import fetched_path, gguf_file_here
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.planning.report import report
from deployments.planning.summary import summary
from deployments.protocol.card import ModelCard, Weights, load_card
from deployments.protocol.gguf_file import GgufFile
from serve_app.cli.plan import table

CARDS = Path(__file__).parents[3] / "configs/models"
FLUX, Q4, Q8 = (
    load_card(CARDS / f"{name}.yaml") for name in ("flux.1-dev", "flux.1-dev-q4", "flux.1-dev-q8")
)
GIB = 2**30
WIDTH, DOUBLE, SINGLE = 3072, 19, 38
F32, Q4_K = 0, 12
BLOCK_BYTES = {F32: 4, Q4_K: 144 / 256}

Shapes = Mapping[str, tuple[int, ...]]


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def flux_shapes() -> Shapes:
    """By the names of the model's authors, which are those in files of ComfyUI."""
    shapes: dict[str, tuple[int, ...]] = {
        **linear("img_in", 64, WIDTH),
        **linear("txt_in", 4096, WIDTH),
        **linear("final_layer.linear", WIDTH, 64),
        **linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH),
    }
    for name, inputs in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        shapes |= linear(f"{name}.in_layer", inputs, WIDTH) | linear(f"{name}.out_layer", WIDTH, WIDTH)
    for block in range(DOUBLE):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            shapes |= linear(f"{name}_mod.lin", WIDTH, 6 * WIDTH)
            shapes |= linear(f"{name}_attn.qkv", WIDTH, 3 * WIDTH) | linear(f"{name}_attn.proj", WIDTH, WIDTH)
            shapes |= linear(f"{name}_mlp.0", WIDTH, 4 * WIDTH) | linear(f"{name}_mlp.2", 4 * WIDTH, WIDTH)
            shapes |= {f"{name}_attn.norm.{norm}_norm.scale": (128,) for norm in ("query", "key")}
    for block in range(SINGLE):
        name = f"single_blocks.{block}"
        shapes |= linear(f"{name}.linear1", WIDTH, 7 * WIDTH) | linear(f"{name}.linear2", 5 * WIDTH, WIDTH)
        shapes |= linear(f"{name}.modulation.lin", WIDTH, 3 * WIDTH)
        shapes |= {f"{name}.norm.{norm}_norm.scale": (128,) for norm in ("query", "key")}
    return shapes


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def hollow_file(path: Path, shapes: Shapes) -> Path:
    """A file in which matrices with rows of whole blocks are Q4_K, and others are floats."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 1)
    header += text("general.architecture") + struct.pack("<I", 8) + text("flux")
    offset = 0
    for name, shape in shapes.items():
        kind = Q4_K if len(shape) == 2 and shape[1] % 256 == 0 else F32
        values = shape[0] * (shape[1] if len(shape) == 2 else 1)
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", kind, offset)
        offset += -(-int(values * BLOCK_BYTES[kind]) // 32) * 32
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + -len(header) % 32 + offset)
    return path


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hollow_file(tmp_path_factory.mktemp("flux") / "flux1-dev-Q4_K_S.gguf", flux_shapes())


@pytest.fixture(autouse=True)
def _no_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine has in its caches changes nothing here."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("WEFT_MODEL_CACHE", str(tmp_path / "cache"))


def card_with(card: ModelCard, gguf: Mapping[str, Any], **serving: Any) -> ModelCard:
    weights = Weights(repo=card.weights.repo, gguf=dict(gguf))
    own = card.serving.model_copy(update=serving)
    return card.model_copy(update={"weights": weights, "serving": own})


def on(card: ModelCard, gpu: str) -> Plan:
    return plan_of(card, GPUS[gpu].machine())


# --- bytes ------------------------------------------------------------------------------------------------


def test_a_file_in_the_names_of_flux_authors_fits_the_model_at_its_real_size(
    flux_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"guidance_embeds": True}))

    found = find_gguf(FluxTransformer2DModel, tmp_path, read_header(flux_file))

    shapes = flux_shapes().values()
    assert sum(values for values, _ in found.sizes.values()) == sum(
        shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes
    )
    in_blocks = [name for name, (_, stored) in found.sizes.items() if stored is not None]
    assert len(in_blocks) > 19 * 14 + 38 * 6
    assert "x_embedder.weight" not in in_blocks


def test_the_plan_counts_the_tensors_of_the_file(flux_file: Path) -> None:
    card = card_with(FLUX, {"transformer": str(flux_file)})
    header = read_header(flux_file)

    part = on(card, "h100").part("transformer")

    blocks = sum(t.nbytes for t in header.tensors.values() if not t.type.is_plain)
    floats = sum(2 * t.values for t in header.tensors.values() if t.type.is_plain)
    assert part.weight_bytes == blocks + floats
    assert part.form == "gguf Q4_K"
    assert part.workspace_bytes == layer_workspace(header.tensors["single_blocks.0.linear1.weight"], 2)


def test_bringing_weights_into_floats_is_part_of_the_peak(flux_file: Path) -> None:
    planned = on(card_with(FLUX, {"transformer": str(flux_file)}), "h100").planned

    assert planned is not None
    assert planned.dequantisation == int(7 * WIDTH * WIDTH * 5.19)
    assert planned.working == planned.steps + planned.auxiliary + planned.dequantisation
    plain = on(FLUX, "h100").planned
    assert plain is not None
    assert plain.dequantisation == 0


def test_loaded_and_planned_bytes_are_the_same(flux_file: Path, tmp_path: Path) -> None:
    import torch

    (tmp_path / "config.json").write_text(json.dumps({"guidance_embeds": True}))
    found = find_gguf(FluxTransformer2DModel, tmp_path, read_header(flux_file))

    part = on(card_with(FLUX, {"transformer": str(flux_file)}), "h100").part("transformer")

    assert found.bytes_as(torch.bfloat16) == part.weight_bytes


@pytest.mark.parametrize("gpu", ["rtx-3060", "t4", "a10g", "l4", "rtx-4090"])
def test_the_cards_for_small_gpus_fit_them(gpu: str) -> None:
    plan = on(Q4, gpu)

    assert plan.refusal is None
    assert plan.part("transformer").quantisation is None
    assert plan.part("transformer").gguf is not None
    if gpu != "rtx-3060":
        assert plan.part("transformer").placement == "device"
        assert on(Q8, gpu if gpu != "t4" else "a10g").part("transformer").placement == "device"


def test_a_file_that_is_not_here_counts_as_the_card_states_and_the_plan_says_so() -> None:
    plan = on(Q8, "h100")

    part = plan.part("transformer")
    assert part.weight_bytes == int(11.84 * GIB)
    assert part.workspace_bytes == int(56.6e6 * 7.5)
    assert any("flux1-dev-Q8_0.gguf, which is not on this machine: its bytes" in note for note in plan.notes)


def test_a_file_of_unknown_size_is_not_reckoned_and_the_plan_says_so() -> None:
    plan = on(card_with(FLUX, {"transformer": "city96/FLUX.1-dev-gguf/flux1-dev-Q8_0.gguf"}), "h100")

    assert plan.planned is None
    assert plan.notes[0].endswith(
        "flux1-dev-Q8_0.gguf is not known; write gib beside it in the card, or fetch it"
    )


def test_the_plan_is_shown_with_the_form_of_the_file(flux_file: Path) -> None:
    plan = on(card_with(FLUX, {"transformer": str(flux_file)}), "rtx-4090")

    assert summary(plan).startswith("gguf Q4_K transformer")
    assert report(plan, "NVIDIA GeForce RTX 4090", loaded=True)["quantised"] == {"transformer": "gguf Q4_K"}
    lines = table(plan, GPUS["rtx-4090"].machine())
    assert any(line.startswith("transformer ") and " gguf Q4_K " in line for line in lines)
    assert any("weights of a layer in floats" in line for line in lines)
    assert any("pictures differ from those of bfloat16" in line and "slower" in line for line in lines)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantisation", ["int8", {"transformer": "nf4"}])
def test_another_form_of_the_same_part_is_refused(flux_file: Path, quantisation: Any) -> None:
    card = card_with(FLUX, {"transformer": str(flux_file)}, quantisation=quantisation)

    refusal = on(card, "h100").refusal

    assert refusal is not None
    form = quantisation if isinstance(quantisation, str) else "nf4"
    assert f"asks for {form} in transformer, whose weights come from {flux_file}" in refusal.message
    assert "take transformer out of quantisation, or out of weights.gguf" in refusal.message


def test_other_parts_may_be_quantised(flux_file: Path) -> None:
    wanted = {"transformer": "none", "text_encoder_2": "int8"}
    plan = on(card_with(FLUX, {"transformer": str(flux_file)}, quantisation=wanted), "h100")

    assert plan.refusal is None
    assert {part.name: part.form for part in plan.parts if part.form} == {
        "transformer": "gguf Q4_K",
        "text_encoder_2": "int8",
    }


def test_compile_is_refused(flux_file: Path) -> None:
    refusal = on(card_with(FLUX, {"transformer": str(flux_file)}, compile=True), "h100").refusal

    assert refusal is not None
    assert "compile: true, and gguf Q4_K weights of the transformer; take compile out" in refusal.message


def test_a_damaged_or_missing_file_is_refused_on_every_device(flux_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with flux_file.open("rb") as file:
        cut.write_bytes(file.read(200_000))

    for machine in (GPUS["h100"].machine(), Machine("CPU", "cpu")):
        refusal = plan_of(card_with(FLUX, {"transformer": str(cut)}), machine).refusal
        assert refusal is not None
        assert "it is cut" in refusal.message
        refusal = plan_of(card_with(FLUX, {"transformer": str(tmp_path / "no.gguf")}), machine).refusal
        assert refusal is not None
        assert "No such file or directory" in refusal.message


# --- where files are --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("owner/name/file.gguf", ("owner/name", "file.gguf", None)),
        ("owner/name/folder/file.gguf", ("owner/name", "folder/file.gguf", None)),
        ("./models/file.gguf", (None, None, "./models/file.gguf")),
        ("/models/file.gguf", (None, None, "/models/file.gguf")),
        ("~/file.gguf", (None, None, "~/file.gguf")),
        ("s3://bucket/a/file.gguf", (None, None, "s3://bucket/a/file.gguf")),
    ],
)
def test_a_text_names_a_file(written: str, place: tuple[str | None, str | None, str | None]) -> None:
    file = GgufFile.model_validate(written)

    assert (file.repo, file.file, file.path) == place
    assert file.name == written
    assert file.is_remote == (place[2] is None or "s3" in written)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("models/file.gguf", r"names no GGUF file; write .* \./models/file.gguf for one on this node"),
        ("./file.safetensors", "does not end in .gguf"),
        ("owner/name/../../file.gguf", "is no file of a repository"),
        ({"repo": "owner/name"}, "needs repo and file, or path"),
        ({"path": "/a.gguf", "repo": "owner/name", "file": "a.gguf"}, "needs repo and file, or path"),
        ({"path": "/a.gguf", "size": 3}, "Extra inputs"),
        ({"repo": "../name", "file": "a.gguf"}, "pattern|no file of a repository"),
    ],
)
def test_a_text_that_names_none_is_refused(written: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        GgufFile.model_validate(written)


def test_files_of_the_hub_and_of_buckets_are_found_where_they_are_fetched_to(tmp_path: Path) -> None:
    on_hub, in_bucket = (GgufFile.model_validate(name) for name in ("a/b/c/f.gguf", "s3://bucket/f.gguf"))
    assert gguf_file_here(on_hub) is gguf_file_here(in_bucket) is None
    folder = tmp_path / "hub/hub/models--a--b"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for file, content in ((folder / "refs/main", commit), (folder / f"snapshots/{commit}/c/f.gguf", "")):
        file.parent.mkdir(parents=True)
        file.write_text(content)
    fetched_path("s3://bucket/f.gguf").parent.mkdir(parents=True)
    fetched_path("s3://bucket/f.gguf").touch()

    assert gguf_file_here(on_hub) == folder / f"snapshots/{commit}/c/f.gguf"
    assert gguf_file_here(in_bucket) == fetched_path("s3://bucket/f.gguf")


def test_weights_with_files_can_be_keys() -> None:
    one, other = Q4.weights, Q4.weights.model_copy(update={"gguf": {}})

    assert len({one, other, Q4.weights}) == 2
    assert one.needs_fetch
    assert not Weights(path="models/a").needs_fetch
    assert Weights(path="models/a", gguf={"unet": GgufFile(path="s3://a/b.gguf")}).needs_fetch
