"""Scores a picture by its pixels: background, count, colour, shape, position and size of what it should show.

An object is a connected patch that differs from the picture's border.  Its colour is the nearest named one,
its shape the template (of all 16) with the best overlap.  True renderings score 100 %; guessing a shape 6 %.
`python -m tools.tiny_models.score DIR` scores a FluxPipeline directory on held-out prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from tools.tiny_models.captions import caption
from tools.tiny_models.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    Pattern,
    Scene,
    SceneKind,
    Thing,
    draw_scene,
    second_colour,
    silhouette,
)

Mask = npt.NDArray[np.bool_]  # (H, W)

BORDER_PX = 3  # the background is the colour of this rim of the picture
DIFFERS = 55  # RGB distance from the background that makes an object
SPECK = 0.006  # of the picture: smaller patches are ignored
TEMPLATE_PX = 40
PURE = 0.8  # share of an object's inner pixels that must have its colour
PURE_OF_TWO = 0.7  # the same for both colours of a pattern, whose borders blend
PATTERN_SHARE = (0.08, 0.75)  # of the second colour
STRIPED = 0.6  # of the variance of a pattern lies between rows
CHECKERED = 0.36  # share of the second colour from which on a pattern is no longer dots
MIXED = (0.2, 0.8)  # an edge pixel's share of the object
HELD_OUT_SEED = 5_000_000


@dataclass(frozen=True, slots=True)
class FoundObject:
    """One object seen in a picture; x, y (centre) and side are fractions of the picture."""

    mask: Mask
    names: npt.NDArray[np.int64]  # (H, W) index of the nearest colour, -1 outside and at the soft edge
    x: float
    y: float
    side: float

    @property
    def colour(self) -> str:
        """The colour of most of its inner pixels."""
        return list(COLOURS)[int(np.bincount(self.names[self.names >= 0]).argmax())]

    def share(self, colour: str) -> float:
        """The share of its inner pixels that have this colour, 0..1."""
        return float((self.names[self.names >= 0] == list(COLOURS).index(colour)).mean())

    @property
    def purity(self) -> float:
        """The share of its inner pixels that have its colour, 0..1."""
        return self.share(self.colour)

    def pattern_in(self, second: str) -> Pattern:
        """The pattern that pixels of a second colour form.

        Along a stripe nothing changes, so rows explain nearly all of the variance; of dots and checks, checks
        cover more.
        """
        inked = (self.names == list(COLOURS).index(second)).astype(np.float64)
        inside = self.names >= 0
        counts, mean = inside.sum(1), inked[inside].mean()
        in_rows = (inked * inside).sum(1) / np.maximum(counts, 1)
        explained = (counts * np.square(in_rows - mean)).sum() / (mean * (1 - mean) * counts.sum() + 1e-9)
        return "striped" if explained > STRIPED else "checkered" if mean > CHECKERED else "dotted"

    @property
    def shape(self) -> str:
        """The name of the template that overlaps best."""
        overlaps = {name: max(_overlap(_normal(self.mask), t) for t in _templates(name)) for name in SHAPES}
        return max(overlaps, key=lambda name: overlaps[name])


@dataclass(frozen=True, slots=True)
class Score:
    """What is right; position, size and pattern are right when the caption does not name them."""

    background: bool
    count: bool
    colour: bool
    shape: bool
    position: bool
    size: bool
    pattern: bool

    @property
    def whole(self) -> bool:
        """Everything the caption names is right."""
        appearance = self.colour and self.shape and self.pattern
        return appearance and self.background and self.count and self.position and self.size


def score(picture: Image.Image, scene: Scene) -> Score:
    """How well a picture shows a scene."""
    background, found = find_objects(picture)
    colour, shape = _colours_and_shapes(found, scene)
    only = found[0] if len(found) == 1 else None
    place = None if only is None else (_third(only.x), _third(only.y))
    size = scene.size is None or (only is not None and _has_size(only, scene.size))
    return Score(
        background=background == scene.background
        or (not scene.mentions_background and background == "white"),
        count=len(found) == len(scene.things),
        colour=colour,
        shape=shape,
        position=scene.position in (None, place),
        size=size,
        pattern=_patterns_right(found, scene),
    )


def find_objects(picture: Image.Image) -> tuple[str, list[FoundObject]]:
    """The background's colour name and the objects of a picture."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.float32)
    inner = np.zeros(pixels.shape[:2], bool)
    inner[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = True
    background = np.median(pixels[~inner], axis=0)
    differs = np.sqrt(np.square(pixels - background).sum(-1)) > DIFFERS
    patches = [mask for mask in _patches(_closed(differs)) if mask.sum() > SPECK * mask.size]
    largest = max((mask.sum() for mask in patches), default=0)
    return _colour_name(background), [_found(pixels, mask) for mask in patches if mask.sum() > largest / 4]


def edge_px(picture: Image.Image) -> float:
    """How wide the edge of a picture's one-coloured objects is: the pixels that are a mixture of object and
    background (20 to 80 %), per pixel of outline.  A true rendering has about 0.5, the same blurred by 1 px
    about 1.4."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.float32)
    _, found = find_objects(picture)
    background = np.median(pixels[0], axis=0)
    mixed = outline = 0
    for seen in found:
        towards = np.median(pixels[seen.names >= 0], axis=0) - background
        share = (pixels - background) @ towards / np.square(towards).sum()
        near = np.asarray(_image(seen.mask).filter(ImageFilter.MaxFilter(9))) > 0
        mixed += int((near & (share > MIXED[0]) & (share < MIXED[1])).sum())
        inner = np.asarray(_image(seen.mask).filter(ImageFilter.MinFilter(3))) > 0
        outline += int((seen.mask & ~inner).sum())
    return mixed / max(1, outline)


def _closed(mask: Mask) -> Mask:
    """The mask without gaps of up to two pixels: where two colours of a pattern meet, their mean may be the
    background's colour."""
    return np.asarray(_image(mask).filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.MinFilter(3))) > 0


def _found(pixels: npt.NDArray[np.float32], mask: Mask) -> FoundObject:
    height, width = mask.shape
    top, bottom, left, right = _box(mask)
    core = np.asarray(_image(mask).filter(ImageFilter.MinFilter(5))) > 0  # without the soft edge
    inside = core if core.sum() > 12 else mask
    names = np.full(mask.shape, -1, np.int64)
    names[inside] = np.square(pixels[inside][:, None] - _palette()[None]).sum(-1).argmin(1)
    return FoundObject(
        mask=mask,
        names=names,
        x=(left + right) / 2 / width,
        y=(top + bottom) / 2 / height,
        side=max(right - left, bottom - top) / min(height, width),
    )


def _colours_and_shapes(found: list[FoundObject], scene: Scene) -> tuple[bool, bool]:
    if len(found) != len(scene.things):
        return False, False
    if scene.kind == "patterned":
        (seen,), (thing,) = found, scene.things
        colour, second = thing.colour, second_colour(thing.colour, scene.background)
        pure = (
            seen.share(colour) + seen.share(second) > PURE_OF_TWO
            and seen.share(colour) > 1 - PATTERN_SHARE[1]
        )
        return pure or not scene.mentions_colour, seen.shape == thing.shape
    if scene.kind != "two":
        return _all_alike(found, scene.things, scene.mentions_colour)
    in_order = sorted(found, key=lambda seen: seen.y if scene.below else seen.x)
    stand_below = abs(found[0].y - found[1].y) > abs(found[0].x - found[1].x)
    in_caption_order = (
        _all_alike(in_order, scene.things, True) if stand_below == scene.below else (False, False)
    )
    if scene.mentions_relation:
        return in_caption_order
    return max(in_caption_order, _all_alike(in_order[::-1], scene.things, True), key=sum)  # any order will do


def _all_alike(
    found: list[FoundObject], things: tuple[Thing, ...], mentions_colour: bool
) -> tuple[bool, bool]:
    pairs = list(zip(found, things, strict=True))
    named = all(seen.colour == thing.colour for seen, thing in pairs) or not mentions_colour
    colour = named and all(seen.purity > PURE for seen in found)
    return colour, all(seen.shape == thing.shape for seen, thing in pairs)


def _patterns_right(found: list[FoundObject], scene: Scene) -> bool:
    if scene.kind != "patterned":
        return True
    if len(found) != 1:
        return False
    (thing,) = scene.things
    second = second_colour(thing.colour, scene.background)
    shows = PATTERN_SHARE[0] < found[0].share(second) < PATTERN_SHARE[1]
    return shows and found[0].pattern_in(second) == thing.pattern


def _third(fraction: float) -> int:
    return 0 if fraction < 0.41 else 2 if fraction > 0.59 else 1


def _has_size(seen: FoundObject, size: str) -> bool:
    smallest, largest = SIZES[size]
    return smallest - 0.09 <= seen.side <= largest + 0.07  # a square fills 88 % of its box


# --- pixels -----------------------------------------------------------------------------------------------


@cache
def _palette() -> npt.NDArray[np.float32]:
    return np.array(list(COLOURS.values()), np.float32)


def _colour_name(rgb: npt.NDArray[np.float32]) -> str:
    return list(COLOURS)[int(np.square(_palette() - rgb).sum(1).argmin())]


def _image(mask: Mask) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def _box(mask: Mask) -> tuple[int, int, int, int]:
    """Top, bottom, left, right; the ends excluded."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _patches(mask: Mask) -> Iterator[Mask]:
    """The connected parts of a mask (neighbours share a side), in reading order of their first pixel."""
    left = mask.copy()
    while left.any():
        patch = np.zeros_like(left)
        start = np.unravel_index(int(left.argmax()), left.shape)
        stack = [(int(start[0]), int(start[1]))]
        left[stack[0]] = False
        while stack:
            row, column = stack.pop()
            patch[row, column] = True
            for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= y < left.shape[0] and 0 <= x < left.shape[1] and left[y, x]:
                    left[y, x] = False
                    stack.append((y, x))
        yield patch


def _normal(mask: Mask) -> npt.NDArray[np.float32]:
    """The object cut out, centred in a square and brought to 40 x 40; 0..1."""
    top, bottom, left, right = _box(mask)
    side = max(bottom - top, right - left)
    square = Image.new("L", (side, side), 0)
    cut = _image(mask[top:bottom, left:right])
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    small = square.resize((TEMPLATE_PX, TEMPLATE_PX), Image.Resampling.BOX)
    return np.asarray(small).astype(np.float32) / np.float32(255)


@cache
def _templates(shape: str) -> tuple[npt.NDArray[np.float32], ...]:
    """The shape drawn small, medium and large, because small holes close and corners round off."""
    masks = (silhouette(Thing(shape, "black", side, 0.5, 0.5), 128) for side in (0.28, 0.45, 0.75))
    return tuple(_normal(np.asarray(mask) > 127) for mask in masks)


def _overlap(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Intersection over union."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


# --- pipelines --------------------------------------------------------------------------------------------


def held_out(kinds: Iterable[SceneKind], first_seed: int = HELD_OUT_SEED) -> Iterator[tuple[str, Scene]]:
    """Endless prompts with their scenes, from attribute combinations that training never saw."""
    wanted, random = set(kinds), Random(first_seed)
    for seed in count(first_seed):
        scene = draw_scene(seed, held_out=True)
        if scene.kind in wanted:
            yield caption(scene, random, plain=True), scene


def generate_pictures(
    pipeline: Any, prompts: list[str], steps: int, seed: int = 0, **settings: Any
) -> list[Image.Image]:
    """One picture per prompt, prompt i with seed + i; batches of 25."""
    import torch  # scoring alone needs no torch

    settings = {"guidance_scale": 0.0, "height": 128, "width": 128, "max_sequence_length": 64} | settings
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), 25):
        part = prompts[start : start + 25]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        pictures += pipeline(prompt=part, num_inference_steps=steps, generator=generators, **settings).images
    return pictures


def accuracy(pictures: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """Per cent of the pictures with each attribute right, and `whole`."""
    scores = [score(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    names = ("background", "count", "colour", "shape", "position", "size", "pattern", "whole")
    return {name: round(100 * sum(getattr(s, name) for s in scores) / len(scores), 1) for name in names}


def main() -> None:
    """Score a pipeline directory: one kind of object, then two different ones, then patterns."""
    import torch
    from diffusers import FluxPipeline

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--per-shape", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = FluxPipeline.from_pretrained(options.directory, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    kinds: dict[str, tuple[SceneKind, ...]] = {
        "one kind": ("one", "many"),
        "two objects": ("two",),
        "patterned": ("patterned",),
    }
    for name, wanted in kinds.items():
        prompts, scenes = zip(*islice(held_out(wanted), options.prompts), strict=True)
        for steps in options.steps:
            pictures = generate_pictures(pipeline, list(prompts), steps, guidance_scale=options.guidance)
            print(name, steps, "steps", accuracy(pictures, list(scenes)), flush=True)
            if options.per_shape:
                _print_per_shape(pictures, list(scenes))


def _print_per_shape(pictures: list[Image.Image], scenes: list[Scene]) -> None:
    for shape in SHAPES:
        chosen = [(p, s) for p, s in zip(pictures, scenes, strict=True) if s.things[0].shape == shape]
        whole = sum(score(picture, scene).whole for picture, scene in chosen)
        print(f"  {shape}: {whole} of {len(chosen)}")


if __name__ == "__main__":
    main()
