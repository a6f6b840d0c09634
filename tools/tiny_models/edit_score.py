"""Scores an edited picture by its pixels: what was asked for is there, and all else is where and as it was.

True renderings score 100 %, unedited ones 0 %.  `python -m tools.tiny_models.edit_score DIR` scores a
FluxKontextPipeline's folder on held-out edits.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from tools.tiny_models.edits import Edit, draw_edit, instruction
from tools.tiny_models.scenes import Scene, Thing, render
from tools.tiny_models.score import PURE, FoundObject, find_objects

HELD_OUT_SEED = 7_000_000
PLACE = 0.06  # of the picture: how far the centre of an object may be off
SIDE = 0.08  # the same for its side
ADDED = (0.15, 0.55)  # of the picture: the side of an object that is added
TOKENS = 32  # of T5
BATCH = 25


def shows(picture: Image.Image, scene: Scene) -> bool:
    """Whether the picture shows this drawing: background, and each object's shape, colour, place and size."""
    background, found = find_objects(picture)
    if background != scene.background or len(found) != len(scene.things):
        return False
    return all(
        any(_is(seen, thing, drawn) for seen in found)
        for thing, drawn in ((thing, _drawn(scene, thing)) for thing in scene.things)
    )


def shows_edit(picture: Image.Image, edit: Edit) -> bool:
    """Whether the picture shows the drawing after the edit.

    An instruction to add an object does not say where exactly: it may be anywhere on the free side of the
    other one, in any size that the drawings have, without touching it.
    """
    if edit.kind != "add":
        return shows(picture, edit.after)
    background, found = find_objects(picture)
    if background != edit.after.background or len(found) != len(edit.after.things):
        return False
    stays = edit.before.things[0]
    drawn = _drawn(edit.before, stays)
    first, second = found
    return any(
        _is(kept, stays, drawn) and _looks_like(new, edit.thing) and _is_beside(new, kept, edit)
        for kept, new in ((first, second), (second, first))
    )


def _is_beside(new: FoundObject, other: FoundObject, edit: Edit) -> bool:
    across, down = new.x - other.x, new.y - other.y
    along = down if edit.after.below else across
    return (along < 0) == (edit.index == 0) and ADDED[0] <= new.side <= ADDED[1]


def _drawn(scene: Scene, thing: Thing) -> FoundObject:
    """The object as it is seen in a true rendering of it alone."""
    alone = Scene(scene.seed, "one", scene.background, (thing,), True, True, variation=scene.variation)
    _, found = find_objects(render(alone))
    return max(found, key=lambda seen: seen.side)


def _is(seen: FoundObject, thing: Thing, drawn: FoundObject) -> bool:
    place = max(abs(seen.x - drawn.x), abs(seen.y - drawn.y)) <= PLACE
    return place and _looks_like(seen, thing) and abs(seen.side - drawn.side) <= SIDE


def _looks_like(seen: FoundObject, thing: Thing) -> bool:
    return seen.colour == thing.colour and seen.purity > PURE and seen.shape == thing.shape


def held_out(first_seed: int = HELD_OUT_SEED) -> Iterator[tuple[str, Edit]]:
    """Endless instructions with their edits, from combinations that training never saw."""
    random = Random(first_seed)
    for seed in count(first_seed):
        edit = draw_edit(seed, held_out=True)
        yield instruction(edit, random, plain=True), edit


def edited(pipeline: Any, texts: list[str], before: list[Image.Image], steps: int) -> list[Image.Image]:
    """One picture for each instruction about its reference, number i with seed i."""
    import torch  # scoring alone needs no torch

    pictures: list[Image.Image] = []
    for start in range(0, len(texts), BATCH):
        part = slice(start, start + BATCH)
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(texts[part]))]
        pictures += pipeline(
            prompt=texts[part],
            image=before[part],
            generator=generators,
            num_inference_steps=steps,
            width=128,
            height=128,
            max_area=128 * 128,
            _auto_resize=False,
            max_sequence_length=TOKENS,
        ).images
    return pictures


def accuracy(pictures: list[Image.Image], edits: list[Edit]) -> dict[str, float]:
    """Per cent of the pictures that show the drawing after the edit, by kind of edit, and of `all`."""
    right, asked = Counter[str](), Counter[str]()
    for picture, edit in zip(pictures, edits, strict=True):
        for name in (edit.kind, "all"):
            asked[name] += 1
            right[name] += shows_edit(picture, edit)
    return {name: round(100 * right[name] / asked[name], 1) for name in sorted(asked)}


def main() -> None:
    """Score a pipeline directory on held-out edits."""
    import torch
    from diffusers import FluxKontextPipeline

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = FluxKontextPipeline.from_pretrained(options.directory, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    texts, edits = zip(*islice(held_out(), options.edits), strict=True)
    for steps in options.steps:
        pictures = edited(pipeline, list(texts), [render(edit.before) for edit in edits], steps)
        print(steps, "steps", accuracy(pictures, list(edits)), flush=True)


if __name__ == "__main__":
    main()
