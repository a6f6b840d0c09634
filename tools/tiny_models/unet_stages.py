"""The stages that make the tiny Stable Diffusion models: text encoder, 1.5, SDXL, its refiner, ControlNets.

They need the tokenizer, the autoencoder and the pool of latents of the stages in `flux_stages.py`.
"""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from tools.tiny_models.controlnet import ControlKind, build_controlnet, train_controlnet
from tools.tiny_models.flow import TrainingRun
from tools.tiny_models.network import CONTEXT, Autoencoder
from tools.tiny_models.plan import Plan, Stage
from tools.tiny_models.unet import (
    BASE_TIME_IDS,
    REFINER_TIME_IDS,
    UNet,
    build_text_encoder,
    build_unet,
    copy_weights,
    without_projection,
)
from tools.tiny_models.unet_training import (
    NOISE,
    load_trained,
    refiner_condition,
    sd_condition,
    sdxl_condition,
    text_condition,
    train_text,
    train_unet,
    unet_batches,
)

TEXT_STEPS = 600  # of 128 captions
SD15_STEPS = 1_500  # of 64 drawings; so are the next
SDXL_STEPS = 130
REFINER_STEPS = 220
CANNY_STEPS = 300
DEPTH_STEPS = 250  # from the one for edges
POSE_STEPS = 500
REFINER_LATEST = 400  # the refiner takes over a fifth of the steps or redraws a third of them
SHORT_RATE = 0.5  # of the learner's rates, for networks that start from a trained one


def text_unet(plan: Plan) -> None:
    """Train the text encoder of all Stable Diffusion models to parse."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(plan)
    train_text(
        build_text_encoder(tokenizer),
        tokenizer,
        TrainingRun(plan.work, plan.cut(TEXT_STEPS), batch=plan.cut(128, 4), seed=1),
    )


def sd15(plan: Plan) -> None:
    """Train the UNet of 1.5 and write tiny-sd15."""
    torch.manual_seed(0)
    encoder, tokenizer, unet = _encoder(plan), _tokenizer(plan), build_unet()
    pool, run = _pool(plan), TrainingRun(plan.work, plan.cut(SD15_STEPS), plan.cut(64), seed=2)
    train_unet(
        unet,
        sd_condition(encoder, tokenizer),
        lambda start: unet_batches(pool, run, start),
        run,
        name="sd15",
    )
    write_sd15(plan)


def write_sd15(plan: Plan) -> None:
    """tiny-sd15 from the checkpoint of its stage."""
    tokenizer = _tokenizer(plan)
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder(plan),
        text_encoder=without_projection(_encoder(plan), tokenizer),
        tokenizer=tokenizer,
        unet=_trained(plan, "sd15", build_unet()),
        scheduler=_without_clipping(
            PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _write(pipeline, plan.out / "tiny-sd15")


def sdxl(plan: Plan) -> None:
    """Train a copy of 1.5's UNet on SDXL's conditioning and write tiny-sdxl-base."""
    torch.manual_seed(0)
    encoder, tokenizer, vae, unet = _encoder(plan), _tokenizer(plan), _autoencoder(plan), _sdxl_unet()
    copy_weights(unet, _trained(plan, "sd15", build_unet()))
    pool, run = (
        _pool(plan),
        TrainingRun(plan.work, plan.cut(SDXL_STEPS), plan.cut(64), seed=3, compiled=False),
    )
    train_unet(
        unet,
        sdxl_condition(encoder, tokenizer),
        lambda start: unet_batches(pool, run, start, vae=vae),
        run,
        name="sdxl",
        full_rate=SHORT_RATE,
    )
    write_sdxl(plan)


def write_sdxl(plan: Plan) -> None:
    """tiny-sdxl-base from the checkpoint of its stage."""
    encoder, tokenizer = _encoder(plan), _tokenizer(plan)
    pipeline = StableDiffusionXLPipeline(
        vae=_autoencoder(plan),
        text_encoder=without_projection(encoder, tokenizer),
        text_encoder_2=encoder,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_trained(plan, "sdxl", _sdxl_unet()),
        scheduler=_euler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    _write(pipeline, plan.out / "tiny-sdxl-base")


def refiner(plan: Plan) -> None:
    """Train a copy of SDXL's UNet for the last steps and the aesthetic score, and write tiny-sdxl-refiner."""
    torch.manual_seed(0)
    encoder, tokenizer, vae, unet = _encoder(plan), _tokenizer(plan), _autoencoder(plan), _refiner_unet()
    copy_weights(unet, _trained(plan, "sdxl", _sdxl_unet()))
    pool, run = (
        _pool(plan),
        TrainingRun(plan.work, plan.cut(REFINER_STEPS), plan.cut(64), seed=4, compiled=False),
    )
    train_unet(
        unet,
        refiner_condition(encoder, tokenizer),
        lambda start: unet_batches(pool, run, start, latest=REFINER_LATEST, vae=vae),
        run,
        name="refiner",
        full_rate=SHORT_RATE,
    )
    write_refiner(plan)


def write_refiner(plan: Plan) -> None:
    """tiny-sdxl-refiner from the checkpoint of its stage."""
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=_autoencoder(plan),
        text_encoder=None,
        text_encoder_2=_encoder(plan),
        tokenizer=None,
        tokenizer_2=_tokenizer(plan),
        unet=_trained(plan, "refiner", _refiner_unet()),
        scheduler=_euler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    _write(pipeline, plan.out / "tiny-sdxl-refiner")


def canny(plan: Plan) -> None:
    """Train the ControlNet of 1.5 that follows edges, and write tiny-sd15-canny."""
    torch.manual_seed(0)
    unet = _trained(plan, "sd15", build_unet())
    condition = sd_condition(_encoder(plan), _tokenizer(plan))
    run = TrainingRun(plan.work, plan.cut(CANNY_STEPS), plan.cut(64), seed=5, compiled=False)
    train_controlnet("canny", build_controlnet(unet), unet, condition, _autoencoder(plan), run)
    write_controlnet("canny", plan)


def depth(plan: Plan) -> None:
    """Train a copy of the ControlNet of edges on depth, and write tiny-sd15-depth."""
    _another_controlnet("depth", plan, DEPTH_STEPS, seed=6)


def pose(plan: Plan) -> None:
    """Train a copy of the ControlNet of edges on poses, and write tiny-sd15-pose."""
    _another_controlnet("pose", plan, POSE_STEPS, seed=7)


def _another_controlnet(kind: ControlKind, plan: Plan, steps: int, seed: int) -> None:
    """Needs only the models in `out`: tiny-sd15 and its ControlNet of edges."""
    torch.manual_seed(0)
    base = StableDiffusionPipeline.from_pretrained(plan.out / "tiny-sd15", torch_dtype=torch.float32)
    controlnet = ControlNetModel.from_pretrained(plan.out / "tiny-sd15-canny", torch_dtype=torch.float32)
    run = TrainingRun(plan.work, plan.cut(steps), plan.cut(64), seed=seed, compiled=False)
    condition = text_condition(base.text_encoder.requires_grad_(False), base.tokenizer)
    train_controlnet(kind, controlnet, base.unet, condition, base.vae, run)
    write_controlnet(kind, plan)


def write_controlnet(kind: ControlKind, plan: Plan) -> None:
    """A ControlNet of tiny-sd15 from the checkpoint of its stage."""
    controlnet = build_controlnet(build_unet())
    load_trained(plan.work / f"{kind}.safetensors", "controlnet", controlnet)
    controlnet.eval().to(torch.bfloat16).save_pretrained(plan.out / f"tiny-sd15-{kind}")


# --- parts ------------------------------------------------------------------------------------------------


def _tokenizer(plan: Plan) -> Any:
    return CLIPTokenizer.from_pretrained(plan.work / "tokenizer")


def _autoencoder(plan: Plan) -> Autoencoder:
    return AutoencoderKL.from_pretrained(plan.work / "vae", torch_dtype=torch.float32)


def _pool(plan: Plan) -> npt.NDArray[np.float16]:
    latents: npt.NDArray[np.float16] = np.load(plan.work / "pool.npy", mmap_mode="r")
    return latents


def _encoder(plan: Plan) -> CLIPTextModelWithProjection:
    encoder = build_text_encoder(_tokenizer(plan))
    load_trained(plan.work / "text-unet.safetensors", "clip", encoder)
    return encoder.requires_grad_(False).eval()


def _trained(plan: Plan, name: str, unet: UNet) -> UNet:
    load_trained(plan.work / f"{name}.safetensors", "unet", unet)
    return unet


def _sdxl_unet() -> UNet:
    return build_unet(context_width=2 * CONTEXT, time_ids=BASE_TIME_IDS)


def _refiner_unet() -> UNet:
    return build_unet(time_ids=REFINER_TIME_IDS, light=True)


def _euler() -> Any:
    return _without_clipping(EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1))


def _without_clipping(noise_scheduler: Any) -> Any:
    """The same, with a setting for others, as the real models have it: a DDIM made from it must not clip."""
    noise_scheduler.register_to_config(clip_sample=False)
    return noise_scheduler


def _write(pipeline: Any, folder: Path) -> None:
    """Save in bf16; parts that an earlier model holds byte by byte are linked to it, not stored twice."""
    shutil.rmtree(folder, ignore_errors=True)  # an older model's links would be written through
    pipeline.vae.register_to_config(_name_or_path="tiny-flux-vae")  # else the path it was loaded from
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    for part, source in (
        ("vae", "tiny-flux-schnell/vae"),
        ("tokenizer", "tiny-flux-schnell/tokenizer"),
        ("tokenizer_2", "tiny-flux-schnell/tokenizer"),
        ("text_encoder", "tiny-sd15/text_encoder"),
        ("text_encoder_2", "tiny-sdxl-base/text_encoder_2"),
    ):
        original = folder.parent / source
        if folder.name != original.parent.name and _equal(folder / part, original):
            shutil.rmtree(folder / part)
            (folder / part).symlink_to(Path("..") / source)


def _equal(folder: Path, other: Path) -> bool:
    if not folder.is_dir() or not other.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return not any(filecmp.cmpfiles(folder, other, names, shallow=False)[1:])


STAGES: dict[str, Stage] = {
    "text-unet": text_unet,
    "sd15": sd15,
    "sdxl": sdxl,
    "refiner": refiner,
    "canny": canny,
    "depth": depth,
    "pose": pose,
}
