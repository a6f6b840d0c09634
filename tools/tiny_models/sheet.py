"""Draws the contact sheet of the model card and README's pictures: `python -m tools.tiny_models.sheet`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw

from tools.tiny_models.autoencoder import STYLES
from tools.tiny_models.network import Pipeline
from tools.tiny_models.score import generate_pictures

COLUMNS = 6
LABEL_PX = 14
PROMPTS = [
    "a red circle on a blue background",
    "two green squares",
    "small yellow triangle, top left, black background",
    "a purple star on a white background",
    "three orange hearts on a cyan background",
    "a red square and a blue circle",
    "a pink flower on a green background",
    "a cat on a purple background",
    "four black crosses on a yellow background",
    "a green tree left of a red house",
    "a large white moon on a black background",
    "a blue diamond on an orange background",
    "a brown house on a green background",
    "yellow sun above blue fish",
    "a gray ring at the bottom right on a pink background",
    "A photo of a Red Heart on a White background.",
    "an orange fish on a blue background",
    "a blue star on the left and a red star on the right",
    "a white cloud on a blue background",
    "two yellow stars on a purple background",
    "a tiny cyan square in the center on brown",
    "black cat on a yellow background",
    "a blue triangle on top of a yellow square",
    "a purple moon next to a pink heart on white",
    "a dog wearing sunglasses",
    "castle at sunset",
    "heart",
    "four small fish",
    "a huge green diamond",
    "an apple",
]
SHORT_ROW = PROMPTS[:COLUMNS]  # shown once more by dev and with each adapter
ADAPTERS = [*((style,) for style in STYLES), ("outline", "night"), ("mosaic", "night")]
SEEDS_PROMPT = "a red heart"
README_PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "tiny-flux-schnell.png"
README_PROMPTS = [
    "a red circle",
    "a green tree left of a red house",
    "two blue stars",
    "a yellow sun above a blue fish",
    "three orange squares",
    "a blue ring on a pink background",
    "a large white moon on a black background",
    "a black cat on a yellow background",
]
README_COLUMNS, README_GAP_PX = 4, 8


def main() -> None:
    """Paint every prompt in four steps, one in six seeds, then the first row by dev and with adapters."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[2] / "models")
    folder: Path = parser.parse_args().models
    schnell, dev = _pipeline(folder / "tiny-flux-schnell"), _pipeline(folder / "tiny-flux-dev")
    _tiles(generate_pictures(schnell, README_PROMPTS, 4, seed=1000)).save(README_PICTURE, optimize=True)
    pictures, labels = generate_pictures(schnell, PROMPTS, 4, seed=1000), list(PROMPTS)
    pictures += generate_pictures(schnell, [SEEDS_PROMPT] * COLUMNS, 4, seed=1)
    labels += [f"[seed {seed}] {SEEDS_PROMPT}" for seed in range(1, COLUMNS + 1)]
    pictures += generate_pictures(dev, SHORT_ROW, 20, seed=1000, guidance_scale=3.0)
    labels += [f"[dev] {prompt}" for prompt in SHORT_ROW]
    for style in STYLES:
        saved = folder / "tiny-flux-schnell" / "loras" / f"lora_{style}"
        schnell.load_lora_weights(saved, adapter_name=style)
    for styles in ADAPTERS:
        schnell.set_adapters(list(styles))
        pictures += generate_pictures(schnell, SHORT_ROW, 4, seed=1000)
        labels += [f"[{' + '.join(styles)}] {prompt}" for prompt in SHORT_ROW]
    _sheet(pictures, labels).save(folder / "contact-sheet.png", optimize=True)


def _pipeline(folder: Path) -> Pipeline:
    pipeline: Pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tiles(pictures: list[Image.Image]) -> Image.Image:
    """The pictures in rows of four."""
    step, rows = pictures[0].width + README_GAP_PX, -(-len(pictures) // README_COLUMNS)
    size = README_COLUMNS * step - README_GAP_PX, rows * step - README_GAP_PX
    tiles = Image.new("RGB", size, "lightgray")
    for index, picture in enumerate(pictures):
        tiles.paste(picture, (index % README_COLUMNS * step, index // README_COLUMNS * step))
    return tiles


def _sheet(pictures: list[Image.Image], labels: list[str]) -> Image.Image:
    width, height = pictures[0].width + 4, pictures[0].height + LABEL_PX
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(pictures) // COLUMNS) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = index % COLUMNS * width, index // COLUMNS * height
        sheet.paste(picture, (left, top))
        pen.text((left, top + picture.height), label[:27], fill="black", font_size=9)
    return sheet


if __name__ == "__main__":
    main()
