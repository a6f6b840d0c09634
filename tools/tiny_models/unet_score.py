"""Scores the tiny Stable Diffusion models on held-out prompts: `python -m tools.tiny_models.unet_score`."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL import Image

from tools.tiny_models.controlnet import MAPS, ControlKind, free_scene, vague_caption
from tools.tiny_models.scenes import Scene, SceneKind, Thing, silhouette
from tools.tiny_models.score import accuracy, find_objects, held_out

STEPS = 25
GUIDANCE = 4.0
BATCH = 25
REFINE_STRENGTH = 0.3
CONTROL_SEED = 9_000_000
CONTROL_KINDS: dict[str, ControlKind] = {f"sd15-{kind}": kind for kind in MAPS}
NAMES = ("sd15", "sdxl-base", "sdxl-refiner", *CONTROL_KINDS)
KINDS: dict[str, tuple[SceneKind, ...]] = {
    "one kind": ("one", "many"),
    "two objects": ("two",),
    "patterned": ("patterned",),
}


def load(folder: Path, **parts: Any) -> Any:
    """The pipeline of a folder, in float32 and without a progress bar."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_pictures(pipeline: Any, prompts: list[str], seed: int = 0, **settings: Any) -> list[Image.Image]:
    """One picture per prompt, prompt i with seed + i; 25 steps and guidance 4 unless settings differ."""
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} | settings
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        mine = {name: _rows(value, start) for name, value in settings.items()}
        if isinstance(mine.get("negative_prompt"), str):
            mine["negative_prompt"] = [mine["negative_prompt"]] * len(part)
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        pictures += list(pipeline(prompt=part, generator=generators, **mine).images)
    return pictures


def _rows(value: Any, start: int) -> Any:
    """The rows of one batch, where a setting is a list of one picture per prompt."""
    return value[start : start + BATCH] if isinstance(value, list) else value


def refined(
    refiner: Any, prompts: list[str], pictures: list[Image.Image], seed: int = 0
) -> list[Image.Image]:
    """The pictures redrawn by the refiner at strength 0.3.

    Pictures, not latents: diffusers takes a tensor for latents only if it has 4 channels; these have 16.
    """
    return generate_pictures(refiner, prompts, seed, image=pictures, strength=REFINE_STRENGTH)


def overlap(picture: Image.Image, thing: Thing) -> float:
    """Intersection over union of the largest object seen and the one that should be there."""
    _, found = find_objects(picture)
    wanted = np.asarray(silhouette(thing, picture.width)) > 127
    if not found:
        return 0.0
    mask = max((seen.mask for seen in found), key=lambda mask: int(mask.sum()))
    return float((mask & wanted).sum() / (mask | wanted).sum())


def control_cases(count: int, kind: ControlKind = "canny") -> list[tuple[str, Scene, Image.Image]]:
    """Prompts that leave to the map what it shows, the scenes, and their maps; none was in the training.

    Left out are pairs of colours so equal in grey that Canny sees no edge.
    """
    random = Random(CONTROL_SEED)
    cases: list[tuple[str, Scene, Image.Image]] = []
    while len(cases) < count:
        scene = free_scene(random)
        control_map = MAPS[kind](scene)
        if control_map.any():
            cases.append((vague_caption(scene, random, kind), scene, Image.fromarray(control_map)))
    return cases


def controlled(
    pipeline: Any, cases: list[tuple[str, Scene, Image.Image]], **settings: Any
) -> list[Image.Image]:
    """The pictures of such cases."""
    prompts, _, maps = (list(column) for column in zip(*cases, strict=True))
    return generate_pictures(pipeline, prompts, image=maps, **settings)


def main() -> None:
    """Score all that are there, or those named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("models", nargs="*", default=[*NAMES])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / "models")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        folder = options.folder / f"tiny-{name}"
        for guidance in options.guidance:
            if kind_of_map := CONTROL_KINDS.get(name):
                _score_control(options.folder, kind_of_map, guidance, options.prompts)
                continue
            base = load(options.folder / "tiny-sdxl-base" if name == "sdxl-refiner" else folder)
            refiner = load(folder) if name == "sdxl-refiner" else None
            for kind, wanted in KINDS.items():
                prompts, scenes = zip(*islice(held_out(wanted), options.prompts), strict=True)
                pictures = generate_pictures(base, list(prompts), guidance_scale=guidance)
                if refiner is not None:
                    pictures = refined(refiner, list(prompts), pictures)
                print(name, kind, f"guidance {guidance}", accuracy(pictures, list(scenes)), flush=True)


def _score_control(folder: Path, kind: ControlKind, guidance: float, count: int) -> None:
    controlnet = ControlNetModel.from_pretrained(folder / f"tiny-sd15-{kind}", torch_dtype=torch.float32)
    base = load(folder / "tiny-sd15")
    pipeline = StableDiffusionControlNetPipeline(
        **base.components, controlnet=controlnet, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    cases = control_cases(count, kind)
    for weight in (1.0, 0.0):
        pictures = controlled(pipeline, cases, guidance_scale=guidance, controlnet_conditioning_scale=weight)
        overlaps = [
            overlap(picture, scene.things[0]) for picture, (_, scene, _) in zip(pictures, cases, strict=True)
        ]
        right = accuracy(pictures, [scene for _, scene, _ in cases])
        mean, median = np.mean(overlaps), np.median(overlaps)
        print(f"sd15-{kind} weight {weight} overlap {mean:.3f}, median {median:.3f}", right, flush=True)


if __name__ == "__main__":
    main()
