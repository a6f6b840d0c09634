"""The tiny models: share of held-out prompts that come out entirely right, and CPU seconds of an image.

Rows `tiny_flux_4step_accuracy`, `tiny_flux_20step_accuracy`, `tiny_flux_two_objects_accuracy`,
`tiny_flux_dev_accuracy`, `tiny_flux_dev_two_objects_accuracy`,
`tiny_flux_seeds_move`, `tiny_flux_dev_seeds_move`, `tiny_flux_edge_px`, `tiny_flux_seconds_per_picture`,
`tiny_flux_edit_accuracy`, `tiny_sd15_canny_overlap`, `tiny_sd15_depth_overlap`, `tiny_sd15_pose_overlap` and
`tiny_wan_accuracy`.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import ledger
import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    FluxKontextPipeline,
    FluxPipeline,
    StableDiffusionControlNetPipeline,
    WanPipeline,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tools.tiny_models import edit_score  # noqa: E402
from tools.tiny_models.controlnet import MAPS  # noqa: E402
from tools.tiny_models.scenes import render  # noqa: E402
from tools.tiny_models.score import accuracy, edge_px, find_objects, generate_pictures, held_out  # noqa: E402  the tiny models are no installed package
from tools.tiny_models.unet_score import control_cases, controlled, load, overlap  # noqa: E402
from tools.tiny_models.video_score import generate_clips, held_out_clips, video_accuracy  # noqa: E402

NOTE = (
    "attribute combinations left out of the training of these and the last weights (the oldest held none out)"
)
KINDS = {"one kind of object": ("one", "many"), "two different objects": ("two",)}
SEED_PROMPTS = {
    "a red heart": ("white", [("red", "heart")]),
    "a blue circle on a yellow background": ("yellow", [("blue", "circle")]),
    "a small green star on a black background": ("black", [("green", "star")]),
}
ROWS = [  # model, kind of prompt, steps, guidance, row
    ("schnell", "one kind of object", 4, 0.0, "tiny_flux_4step_accuracy"),
    ("schnell", "one kind of object", 20, 0.0, "tiny_flux_20step_accuracy"),
    ("schnell", "two different objects", 4, 0.0, "tiny_flux_two_objects_accuracy"),
    ("dev", "one kind of object", 20, 3.0, "tiny_flux_dev_accuracy"),
    ("dev", "two different objects", 20, 3.0, "tiny_flux_dev_two_objects_accuracy"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--models", nargs="+", default=["schnell", "dev", *OTHERS])
    parser.add_argument("--only-cost", action="store_true", help="no accuracy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only_cost:
        cost(_flux("schnell"))
        return
    for name in (name for name in options.models if name in OTHERS):
        OTHERS[name]()
    for model in (model for model in options.models if model not in OTHERS):
        pipeline = _flux(model)
        for _, kind, steps, guidance, row in (row for row in ROWS if row[0] == model):
            prompts, scenes = zip(*islice(held_out(KINDS[kind]), options.prompts), strict=True)
            right = accuracy(
                generate_pictures(pipeline, list(prompts), steps, guidance_scale=guidance), list(scenes)
            )
            what = f"tiny-flux-{model}, {kind}, every attribute right, {steps} steps, guidance {guidance:g}"
            notes = f"{what}; {NOTE}; {right}"
            ledger.record(row, right["whole"] / 100, "of 1", n=options.prompts, notes=notes)
        if model == "schnell":
            seeds(pipeline, 4, 0.0, "tiny_flux_seeds_move")
            edges(pipeline)
            cost(pipeline)
        else:
            seeds(pipeline, 20, 3.0, "tiny_flux_dev_seeds_move")


def _flux(model: str) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(ROOT / f"models/tiny-flux-{model}", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(pipeline: Any, steps: int, guidance: float, row: str, count: int = 32) -> None:
    """Measure how far seeds move an object that the prompt does not position, and what else they change."""
    spreads, sizes, kept = [], [], 0
    for prompt, expected in SEED_PROMPTS.items():
        seen = [
            find_objects(p)
            for p in generate_pictures(pipeline, [prompt] * count, steps, guidance_scale=guidance)
        ]
        kept += sum((ground, [(it.colour, it.shape) for it in found]) == expected for ground, found in seen)
        places = np.array([(found[0].x, found[0].y, found[0].side) for _, found in seen if found])
        spreads += [*places.std(0)[:2]]
        sizes.append(f"{places[:, 2].min():.2f} to {places[:, 2].max():.2f}")
    notes = (
        f"standard deviation of an object's centre over {count} seeds, share of the picture, both axes; "
        f"{', '.join(SEED_PROMPTS)}; sizes {', '.join(sizes)}; colour, shape and background as named in "
        f"{kept} of {count * len(SEED_PROMPTS)}"
    )
    ledger.record(row, float(np.mean(spreads)), "of picture", n=count * len(SEED_PROMPTS), notes=notes)


def edges(pipeline: Any, prompts: int = 100) -> None:
    """Measure how sharp edges are, compared with true renderings."""
    texts, scenes = zip(*islice(held_out(("one", "many")), prompts), strict=True)
    ours = np.mean([edge_px(picture) for picture in generate_pictures(pipeline, list(texts), 4)])
    theirs = np.mean([edge_px(render(scene)) for scene in scenes])
    notes = f"pixels between object and background, per pixel of outline; true renderings {theirs:.2f}"
    ledger.record("tiny_flux_edge_px", float(ours), "px", n=prompts, notes=notes)


def wan(prompts: int = 200) -> None:
    """Measure the share of videos that show everything their prompt names."""
    pipeline = WanPipeline.from_pretrained(ROOT / "models/tiny-wan", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    texts, clips = (list(part) for part in zip(*islice(held_out_clips(), prompts), strict=True))
    right = video_accuracy(generate_clips(pipeline, texts, 20, guidance_scale=3.0), clips)
    notes = f"tiny-wan, everything right that the prompt names, 20 steps, guidance 3; {right}"
    ledger.record("tiny_wan_accuracy", right["whole"] / 100, "of 1", n=prompts, notes=notes)


def edits(pairs: int = 300, steps: int = 8) -> None:
    """Measure the share of edited drawings that show the drawing after the edit, and nothing else changed."""
    pipeline = FluxKontextPipeline.from_pretrained(
        ROOT / "models/tiny-flux-kontext", torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    texts, asked = (list(part) for part in zip(*islice(edit_score.held_out(), pairs), strict=True))
    made = edit_score.edited(pipeline, texts, [render(edit.before) for edit in asked], steps)
    right = edit_score.accuracy(made, asked)
    notes = f"tiny-flux-kontext, held-out edits by instruction, {steps} steps, per cent by kind: {right}"
    ledger.record("tiny_flux_edit_accuracy", right["all"] / 100, "of 1", n=pairs, notes=notes)


def controls(count: int = 50) -> None:
    """Measure how well objects lie where the map of a ControlNet has them."""
    base = load(ROOT / "models/tiny-sd15")
    for kind in MAPS:
        folder = ROOT / f"models/tiny-sd15-{kind}"
        controlnet = ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline = StableDiffusionControlNetPipeline(
            **base.components, controlnet=controlnet, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        cases = control_cases(count, kind)
        with_map, without = (
            [
                overlap(picture, case[1].things[0])
                for picture, case in zip(
                    controlled(pipeline, cases, controlnet_conditioning_scale=weight), cases, strict=True
                )
            ]
            for weight in (1.0, 0.0)
        )
        notes = (
            f"tiny-sd15-{kind}: mean intersection over union of the object drawn and the one whose map was "
            f"given, 25 steps, guidance 4; weight 0: {np.mean(without):.2f}"
        )
        ledger.record(f"tiny_sd15_{kind}_overlap", float(np.mean(with_map)), "of 1", n=count, notes=notes)


def cost(pipeline: Any, pictures: int = 20) -> None:
    """Measure CPU seconds of one image, four steps, with the card's settings."""
    settings = {"height": 128, "width": 128, "max_sequence_length": 64, "guidance_scale": 0.0}
    pipeline("a red circle", num_inference_steps=4, **settings)
    began = time.process_time()
    for seed in range(pictures):
        generator = torch.Generator().manual_seed(seed)
        pipeline("a red circle on a blue background", num_inference_steps=4, generator=generator, **settings)
    seconds = (time.process_time() - began) / pictures
    ledger.record(
        "tiny_flux_seconds_per_picture", seconds, "s", n=pictures, notes="CPU time, one thread, 4 steps"
    )


OTHERS = {"wan": wan, "kontext": edits, "controls": controls}

if __name__ == "__main__":
    main()
