"""Scores a clip by its pixels: background, colour, shape and size of the object, and which way it moves.

Every second frame is looked at with score.py, enlarged to its 128 px.  The colour must be right on the
right background in nearly all of them; the shape is the template of the eight that overlaps best over all
of them; motion follows from the path of the centre and from the growth of the side.  True renderings score
100 %; guessing a shape 13 %, a motion 14 %.
`python -m tools.tiny_models.video_score DIR` scores a WanPipeline directory on held-out prompts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tools.tiny_models.scenes import BASE_SHAPES, PICTURE_PX, Thing, silhouette
from tools.tiny_models.score import FoundObject, Mask, find_objects
from tools.tiny_models.video_scenes import FRAMES, SIZES, TRAVEL, VIDEO_PX, Clip, Frames, caption, draw_clip

Cut = npt.NDArray[np.float32]  # (40, 40)

HELD_OUT_SEED = 5_000_000
MOVED = TRAVEL / 2  # fraction of the picture side that makes a motion
CHANGED = 1.4  # ratio of the sides that makes growing
SIZE_TOLERANCE = 0.07


@dataclass(frozen=True, slots=True)
class ClipAnalysis:
    """What a clip shows, from every second frame; names are the most frequent ones."""

    background: str
    colour: str
    shape: str
    motion: str | None  # None when no object is there throughout
    side: float  # median, fraction of the picture
    steady: float  # share of the frames with exactly one object, of that colour on that background


@dataclass(frozen=True, slots=True)
class VideoScore:
    """What is right; a size is right when the caption does not name it."""

    background: bool
    colour: bool
    shape: bool
    motion: bool
    size: bool

    @property
    def whole(self) -> bool:
        """Everything the caption names is right."""
        return self.background and self.colour and self.shape and self.motion and self.size


def analyse_clip(frames: Frames) -> ClipAnalysis:
    """Look at a clip, (17, H, W, 3)."""
    grounds: list[str] = []
    objects: list[FoundObject] = []
    steady = 0
    sampled = frames[::2]
    for frame in sampled:
        ground, found = find_objects(
            Image.fromarray(frame).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)
        )
        grounds.append(ground)
        objects += found if len(found) == 1 else []
    background = _most_frequent(grounds)
    if len(objects) < 0.7 * len(sampled):
        return ClipAnalysis(background, "", "", None, 0.0, 0.0)
    colour = _most_frequent([seen.colour for seen in objects])
    steady = sum(seen.colour == colour for seen in objects) - sum(ground != background for ground in grounds)
    shape = _shape([seen.mask for seen in objects])
    side = median(seen.side for seen in objects)
    return ClipAnalysis(background, colour, shape, motion_of(objects), side, steady / len(sampled))


def motion_of(objects: list[FoundObject]) -> str:
    """One of video_scenes.MOTIONS, from the objects of successive frames: ends against ends."""
    (x, y, first_side), (last_x, last_y, last_side) = (
        np.mean([(seen.x, seen.y, seen.side) for seen in ends], axis=0)
        for ends in (objects[:2], objects[-2:])
    )
    right, down = last_x - x, last_y - y
    if max(first_side, last_side) > CHANGED * min(first_side, last_side):
        return "grow" if last_side > first_side else "shrink"
    if max(abs(right), abs(down)) < MOVED:
        return "still"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def score_clip(frames: Frames, clip: Clip) -> VideoScore:
    """How well frames show a clip."""
    seen = analyse_clip(frames)
    smallest, largest = SIZES[clip.size] if clip.size else (0.0, 1.0)
    return VideoScore(
        background=seen.background == clip.background,
        colour=seen.colour == clip.colour and seen.steady >= 0.85,
        shape=seen.shape == clip.shape,
        motion=seen.motion == clip.motion,
        size=clip.size is None or smallest - SIZE_TOLERANCE <= seen.side <= largest + SIZE_TOLERANCE,
    )


def _shape(masks: list[Mask]) -> str:
    """The one of the eight shapes whose silhouette overlaps best with these."""
    cuts = [_cut_out(mask) for mask in masks]
    overlaps = {
        shape: sum(max(_overlap(cut, template) for template in _templates(shape)) for cut in cuts)
        for shape in BASE_SHAPES
    }
    return max(overlaps, key=lambda shape: overlaps[shape])


def _cut_out(mask: Mask) -> Cut:
    """The object centred in a square and brought to 40 x 40; 0..1."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8) * 255)
    square = Image.new("L", (max(cut.size), max(cut.size)), 0)
    square.paste(cut, ((square.width - cut.width) // 2, (square.width - cut.height) // 2))
    return np.asarray(square.resize((40, 40), Image.Resampling.BOX)).astype(np.float32) / np.float32(255)


@cache
def _templates(shape: str) -> list[Cut]:
    """The shape drawn at three sizes: small holes close and corners round off."""
    masks = (silhouette(Thing(shape, "black", side, 0.5, 0.5), PICTURE_PX) for side in (0.4, 0.55, 0.7))
    return [_cut_out(np.asarray(mask) > 127) for mask in masks]


def _overlap(a: Cut, b: Cut) -> float:
    """Intersection over union."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _most_frequent(names: list[str]) -> str:
    return Counter(names).most_common(1)[0][0]


# --- pipelines --------------------------------------------------------------------------------------------


def held_out_clips(first_seed: int = HELD_OUT_SEED) -> Iterator[tuple[str, Clip]]:
    """Endless prompts with their clips, from attribute combinations that training never saw."""
    random = Random(first_seed)
    for seed in count(first_seed):
        clip = draw_clip(seed, held_out=True)
        yield caption(clip, random, plain=True), clip


def generate_clips(
    pipeline: Any, prompts: list[str], steps: int, seed: int = 0, **settings: Any
) -> list[Frames]:
    """One clip (17, H, W, 3) per prompt, prompt i with seed + i; batches of 10."""
    import torch  # scoring alone needs no torch

    fitting = {"guidance_scale": 3.0, "height": VIDEO_PX, "width": VIDEO_PX, "num_frames": FRAMES}
    fitting |= {"max_sequence_length": 64} | settings
    clips: list[Frames] = []
    for start in range(0, len(prompts), 10):
        part = prompts[start : start + 10]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        answer = pipeline(prompt=part, num_inference_steps=steps, generator=generators, **fitting)
        clips += list(np.round(np.asarray(answer.frames) * 255).astype(np.uint8))
    return clips


def video_accuracy(videos: list[Frames], clips: list[Clip]) -> dict[str, float]:
    """Per cent of the videos with each attribute right, and `whole`."""
    scores = [score_clip(frames, clip) for frames, clip in zip(videos, clips, strict=True)]
    rows = [asdict(score) | {"whole": score.whole} for score in scores]
    return {name: round(100 * sum(row[name] for row in rows) / len(rows), 1) for name in rows[0]}


def main() -> None:
    """Score a pipeline directory on held-out prompts."""
    import torch
    from diffusers import WanPipeline

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--per-shape", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = WanPipeline.from_pretrained(options.directory, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts, clips = (list(part) for part in zip(*islice(held_out_clips(), options.prompts), strict=True))
    for steps in options.steps:
        for guidance in options.guidance:
            videos = generate_clips(pipeline, prompts, steps, guidance_scale=guidance)
            print(steps, "steps, guidance", guidance, video_accuracy(videos, clips), flush=True)
            for shape in BASE_SHAPES if options.per_shape else ():
                chosen = [pair for pair in zip(videos, clips, strict=True) if pair[1].shape == shape]
                whole = sum(score_clip(frames, clip).whole for frames, clip in chosen)
                print(f"  {shape}: {whole} of {len(chosen)}")


if __name__ == "__main__":
    main()
