"""Settings MODEL_... and ENABLE_XFORMERS: what they change of the cards, and that models run so."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from deployments.protocol.card import ModelCard, load_card
from deployments.protocol.errors import BadRequest, ModelUnavailable
from deployments.replica import ModelReplica
from serve_app.app import _models, build, build_model
from serve_app.card_settings import card_notices, known_cards
from serve_app.cli.main import main
from serve_app.cli.serve_config import read_config, served_cards
from serve_app.cli.start_checks import check_start
from serve_app.ray_serve.args import AppArgs, ModelArgs, ServingOverride, UncardedModel, select_cards
from serve_app.settings import ROOT, Settings

SHIPPED = ROOT / "configs/models"
NAMES = (
    *("MODEL_CHECKPOINT_DIR", "MODEL_REFINER_CHECKPOINT_DIR", "MODEL_DEVICE", "MODEL_PRECISION"),
    *("MODEL_MAX_BATCH_SIZE", "ENABLE_XFORMERS", "DATABASE_URL", "REDIS_URL"),
)


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path / "data"))


def select(settings: Settings, *models: str | ServingOverride | UncardedModel) -> dict[str, ModelCard]:
    return select_cards(models, known_cards(settings), settings, one_application=True)


def pipeline_in(folder: Path, kind: str = "FluxPipeline") -> Path:
    """A folder that looks like a diffusers model."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


# --- what a model is served with ---------------------------------------------------------------------------


def test_a_replica_runs_its_model_as_the_settings_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "models/tiny-flux-schnell", tmp_path / "base/tiny-flux-schnell")
    monkeypatch.setenv("MODEL_CHECKPOINT_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("MODEL_PRECISION", "bf16")
    monkeypatch.setenv("MODEL_MAX_BATCH_SIZE", "3")
    monkeypatch.setenv("MODEL_DEVICE", "cpu")
    settings = Settings.load()

    bound = _models(select(settings, "tiny-flux-schnell"), {}, installation=settings.installation)
    deployment = bound["tiny-flux-schnell"]._bound_deployment
    (cards, *_), installation = deployment.init_args, deployment.init_kwargs["installation"]
    (card,) = cards
    quick = card.model_copy(update={"serving": card.serving.model_copy(update={"warm_up": False})})
    replica = ModelReplica([quick], installation=installation)
    (model,) = replica._runtime.models.models

    assert card.weights.path == str(tmp_path / "base/tiny-flux-schnell")
    assert {p.dtype for part in model.pipelines.modules for p in part.parameters()} == {torch.bfloat16}
    assert replica._runtime.worker._scheduler.max_batch_size == 3
    assert replica._runtime._loader.device == torch.device("cpu")


def test_a_replica_keeps_weights_in_the_form_that_the_precision_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {}
    for precision in ("float32", "int8"):
        monkeypatch.setenv("MODEL_PRECISION", precision)
        (card,) = select(Settings.load(), "tiny-flux-dev").values()
        quick = card.model_copy(update={"serving": card.serving.model_copy(update={"warm_up": False})})
        (sizes[precision],) = ModelReplica([quick])._runtime.models.loaded.values()

    assert sizes["int8"] < 0.8 * sizes["float32"]


@pytest.mark.parametrize(
    ("given", "dtype", "quantisation"),
    [
        ("float32", "float32", "auto"),
        ("fp32", "float32", "auto"),
        ("torch.float16", "float16", "auto"),
        ("FP16", "float16", "auto"),
        ("half", "float16", "auto"),
        ("bfloat16", "bfloat16", "auto"),
        ("int8", "bfloat16", "int8"),
        ("fp8", "bfloat16", "fp8"),
        ("nf4", "bfloat16", "nf4"),
    ],
)
def test_a_precision_is_a_dtype_or_a_form_of_the_weights(
    given: str, dtype: str, quantisation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_PRECISION", given)

    cards = select(Settings.load(), "flux.1-dev", "sdxl-base-1.0")

    for card in cards.values():
        assert card.weights.dtype == dtype
        assert {net.weights.dtype for net in card.controls.values()} == {dtype}
        assert card.serving.quantisation == quantisation


def test_a_card_of_the_serve_config_and_one_without_a_file_follow_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MODEL_MAX_BATCH_SIZE", "4")
    uncarded = UncardedModel.model_validate({"id": "my-flux", "weights": {"repo": "me/flux"}})

    cards = select(
        Settings.load(), uncarded, ServingOverride(id="sdxl-base-1.0", serving={"max_rows": 16, "slots": 5})
    )

    assert {card.serving.max_rows for card in cards.values()} == {4}
    assert cards["sdxl-base-1.0"].serving.slots == 5


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_device_that_ray_does_not_count_asks_for_no_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_DEVICE", device)
    pinned = ServingOverride(id="flux.1-dev", serving={"accelerator_type": "A100"})

    (card,) = select(Settings.load(), pinned).values()

    assert (card.serving.num_gpus, card.serving.accelerator_type) == (0, None)


def test_a_device_that_is_not_there_is_refused_with_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("here it is there")
    monkeypatch.setenv("MODEL_DEVICE", "cuda:1")
    card = load_card(SHIPPED / "tiny-flux-schnell.yaml")
    on_gpu = card.model_copy(update={"serving": card.serving.model_copy(update={"num_gpus": 1})})

    status = main(["serve", "--port", "0"])
    with pytest.raises(ModelUnavailable) as raised:
        ModelReplica([on_gpu], installation=Settings.load().installation)

    assert status == 1
    assert "MODEL_DEVICE is cuda:1, and this machine has cpu" in capfd.readouterr().err
    assert raised.value.message.startswith("MODEL_DEVICE is cuda:1, and there is cpu; Ray gives each replica")


# --- where weights are ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux.1-dev", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev", "flux-dev"])
def test_a_folder_of_models_is_looked_at_first_under_each_of_their_names(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = pipeline_in(tmp_path / "base" / name)
    monkeypatch.setenv("MODEL_CHECKPOINT_DIR", str(tmp_path / "base"))
    settings = Settings.load()

    cards = select(settings, "flux.1-dev", "sdxl-base-1.0")

    assert cards["flux.1-dev"].weights.path == str(there)
    assert cards["sdxl-base-1.0"].weights.repo is not None
    assert [*card_notices(cards, settings)] == [
        f"the weights of flux.1-dev are those in {there} (MODEL_CHECKPOINT_DIR)"
    ]


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("unet/diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("text_encoder/model.fp16-00001-of-00002.safetensors", "fp16"),
        ("unet/diffusion_pytorch_model.safetensors", None),
    ],
)
def test_files_of_the_cards_variant_are_read_where_the_folder_has_them(
    file: str, variant: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = pipeline_in(tmp_path / "base/sdxl-base-1.0") / file
    weights.parent.mkdir()
    weights.touch()
    monkeypatch.setenv("MODEL_CHECKPOINT_DIR", str(tmp_path / "base"))

    card = select(Settings.load(), "sdxl-base-1.0")["sdxl-base-1.0"]

    assert load_card(SHIPPED / "sdxl-base-1.0.yaml").weights.variant == "fp16"
    assert card.weights.variant == variant


def test_a_folder_that_is_a_model_is_the_one_of_its_name_or_the_first_of_its_family(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = pipeline_in(tmp_path / "FLUX.1-dev")
    other = pipeline_in(tmp_path / "mine", "StableDiffusionXLPipeline")
    places = {}
    for folder in (named, other):
        monkeypatch.setenv("MODEL_CHECKPOINT_DIR", str(folder))
        cards = select(
            Settings.load(), "stable-diffusion-v1.5", "flux.1-schnell", "flux.1-dev", "sdxl-base-1.0"
        )
        places |= {card.weights.path: card.id for card in cards.values() if card.weights.path}

    assert places == {str(named): "flux.1-dev", str(other): "sdxl-base-1.0"}


@pytest.mark.parametrize(
    ("folder", "kind", "words"),
    [
        ("FLUX.1-dev", "FluxPipeline", "is the model flux.1-dev, which is not served; add it"),
        ("mine", "WanPipeline", "is a WanPipeline, which sdxl-base-1.0 cannot run"),
        ("mine", "StableDiffusionPipeline", "is a StableDiffusionPipeline, which sdxl-base-1.0 cannot run"),
    ],
)
def test_a_folder_that_is_a_model_which_is_not_served_is_refused(
    folder: str, kind: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODEL_CHECKPOINT_DIR", str(pipeline_in(tmp_path / folder, kind)))

    with pytest.raises(BadRequest) as raised:
        select(Settings.load(), "sdxl-base-1.0")

    assert words in raised.value.message


def test_a_folder_that_is_a_model_is_refused_where_several_applications_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODEL_CHECKPOINT_DIR", str(pipeline_in(tmp_path / "FLUX.1-dev")))

    with pytest.raises(BadRequest, match="several applications serve models; name a folder that holds"):
        build_model(ModelArgs(models=["flux.1-dev"]))


def test_a_folder_that_only_other_nodes_have_is_looked_at_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_CHECKPOINT_DIR", "/nowhere/models")

    (card,) = select(Settings.load(), "flux.1-dev").values()

    assert card.weights.path == "/nowhere/models/flux.1-dev"


def test_the_refiner_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refiner = pipeline_in(tmp_path / "refiner", "StableDiffusionXLImg2ImgPipeline")
    pipeline_in(tmp_path / "base" / "sdxl-refiner-1.0")
    monkeypatch.setenv("MODEL_REFINER_CHECKPOINT_DIR", str(refiner))
    monkeypatch.setenv("MODEL_CHECKPOINT_DIR", str(tmp_path / "base"))
    settings = Settings.load()
    known = known_cards(settings)

    bound = _models(select(settings, "sdxl-base-1.0"), known)["sdxl-base-1.0"]._bound_deployment

    assert bound.init_args[1]["sdxl-base-1.0"].weights.path == str(refiner)
    assert known["sdxl-base-1.0"].weights.repo is not None


# --- what a start says ------------------------------------------------------------------------------------


def said(config: Path = ROOT / "serve_config.yaml") -> list[str]:
    """What a start reports before it starts anything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines: list[str] = []
    check_start(Settings.load(), read_config(config, None, port), config, lines.append)
    return lines


def test_only_the_test_certificate_is_named_where_nothing_is_set() -> None:
    (line,) = said()

    assert "signed with a test certificate" in line


def test_a_start_says_what_settings_do_and_which_do_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "MODEL_CHEKPOINT_DIR": "/x",
        "MODEL_TEMPERATURE": "1",
        "DATABASE_URL": "postgresql://user:sesame@host/db",
        "ENABLE_XFORMERS": "true",
        "MODEL_CHECKPOINT_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)

    lines = "\n".join(said())

    assert "MODEL_CHEKPOINT_DIR is no setting and has no effect; did you mean MODEL_CHECKPOINT_DIR?" in lines
    assert "MODEL_TEMPERATURE is no setting and has no effect; those are MODEL_CHECKPOINT_DIR, " in lines
    assert "DATABASE_URL is set and not used: jobs and their history are kept in Valkey" in lines
    assert "sesame" not in lines
    assert "xformers itself is not used" in lines
    assert "is used for no model here" in lines
    assert f"MODEL_CHECKPOINT_DIR has no effect: {tmp_path} holds none of tiny-flux-schnell" in lines


def test_a_cluster_logs_it_with_the_folder_of_the_refiner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refiner = pipeline_in(tmp_path / "refiner", "StableDiffusionXLImg2ImgPipeline")
    monkeypatch.setenv("MODEL_REFINER_CHECKPOINT_DIR", str(refiner))
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:sesame@host/db")

    build(AppArgs(models=["sdxl-base-1.0"]))

    assert "DATABASE_URL is set and not used" in caplog.text
    assert f"the weights of sdxl-refiner-1.0 are those in {refiner}" in caplog.text
    assert "has no effect" not in caplog.text
    assert "sesame" not in caplog.text


def test_xformers_stands_for_an_attention_of_torch_that_a_card_may_override(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENABLE_XFORMERS", "1")
    settings = Settings.load()
    flash = ServingOverride(id="hunyuan-video", serving={"attention": "flash"})
    on_cpu = ServingOverride(id="flux.1-dev", serving={"num_gpus": 0})

    cards = select(settings, "flux.1-schnell", flash, on_cpu, "sdxl-base-1.0")

    assert {name: card.serving.attention for name, card in cards.items()} == {
        "flux.1-schnell": "_native_efficient",
        "hunyuan-video": "flash",
        "flux.1-dev": None,
        "sdxl-base-1.0": None,
    }
    assert "is used for flux.1-schnell. Cards that name another keep it" in "".join(
        card_notices(cards, settings)
    )


def test_a_gpu_asked_for_where_a_card_wants_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_DEVICE", "cuda")
    settings = Settings.load()

    notices = [*card_notices(select(settings, "tiny-sd15", "flux.1-dev"), settings)]

    assert notices == [
        "warning: MODEL_DEVICE has no effect on tiny-sd15: serving.num_gpus is 0, so they run on the CPU"
    ]


@pytest.mark.parametrize("file", ["serve_config.yaml", "configs/serve/one_gpu.yaml"])
def test_the_files_that_ship_are_served_as_the_settings_say(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_MAX_BATCH_SIZE", "2")

    cards = served_cards(read_config(ROOT / file, None, None), ROOT / file)

    assert {card.serving.max_rows for card in cards.values()} == {2}


def test_one_gpu_by_its_number_is_the_only_one_that_ray_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app.cli import serve, visible_gpus

    monkeypatch.setattr(visible_gpus, "AMD_DRIVER", Path("/nowhere"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("WEFT_MODEL_DEVICE", "cuda:1")  # restored afterwards, as all that a start sets
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "")

    serve._prepare_environment(Settings.load(), "127.0.0.1")

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert Settings.load().model_device == "cuda"
