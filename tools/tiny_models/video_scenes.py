"""Moving captioned drawings: a clip is sampled from a seed, painted frame by frame, and put into words.

Every clip is a pure function of its seed.  One object of scenes.py moves, grows, shrinks or stands
still on one background.  Seeds move what the caption leaves open: shade, path and size by a few per cent.  A
tenth of all attribute combinations is held out for scoring.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from tools.tiny_models.scenes import BASE_SHAPES, COLOURS, MIN_CONTRAST, Colour, Thing, contrast, silhouette

Frames = npt.NDArray[np.uint8]  # (FRAMES, VIDEO_PX, VIDEO_PX, 3)

FRAMES = 17  # 4k + 1: the autoencoder keeps the first frame and folds each four that follow
VIDEO_PX = 64
SUPERSAMPLING = 2
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "still")
TRAVEL = 0.26  # of the picture side, from the first frame to the last
SIZES = {"small": (0.38, 0.41), "medium": (0.50, 0.54), "large": (0.63, 0.66)}
GROWN = {"small": (0.36, 0.40), "large": (0.72, 0.76)}  # sides at the two ends of growing and shrinking
HELD_OUT_SHARE = 10


@dataclass(frozen=True, slots=True)
class Clip:
    """What a video shows, and which parts of it the caption names."""

    seed: int  # of the shades
    shape: str
    colour: str
    background: str
    motion: str  # one of MOTIONS
    size: str | None  # key of SIZES; None: not named, and medium
    mentions_background: bool  # else it is white
    mentions_motion: bool  # else it stands still
    first: Thing
    last: Thing

    @property
    def key(self) -> str:
        """The attributes that a caption can name, as one string: the unit of holding out."""
        return f"{self.shape}|{self.colour}|{self.background}|{self.motion}|{self.size}"


def is_held_out(clip: Clip) -> bool:
    """True for the tenth of all attribute combinations that training never sees."""
    return zlib.crc32(clip.key.encode()) % HELD_OUT_SHARE == 0


# --- sampling ---------------------------------------------------------------------------------------------


def draw_clip(seed: int, *, held_out: bool = False) -> Clip:
    """The clip of this seed, from the trained or from the held-out combinations."""
    random = Random(seed)
    while True:
        clip = _draw(random)
        if is_held_out(clip) == held_out:
            return clip


def _draw(random: Random) -> Clip:
    shape, colour = random.choice(BASE_SHAPES), random.choice(list(COLOURS))
    white = random.random() < 0.25 and contrast(colour, "white") > MIN_CONTRAST
    others = [name for name in COLOURS if contrast(name, colour) > MIN_CONTRAST]
    background = "white" if white else random.choice(others)
    motion = random.choice(MOTIONS)
    changes_size = motion in ("grow", "shrink")
    size = random.choice(list(SIZES)) if random.random() < 0.4 and not changes_size else None
    first, last = _path(random, shape, colour, motion, size)
    return Clip(
        seed=random.getrandbits(32),
        shape=shape,
        colour=colour,
        background=background,
        motion=motion,
        size=size,
        mentions_background=not white or random.random() < 0.2,
        mentions_motion=motion != "still" or random.random() < 0.5,
        first=first,
        last=last,
    )


def _path(random: Random, shape: str, colour: str, motion: str, size: str | None) -> tuple[Thing, Thing]:
    """The object in the first and in the last frame."""
    x, y = 0.5 + random.uniform(-0.03, 0.03), 0.5 + random.uniform(-0.03, 0.03)
    if motion in ("grow", "shrink"):
        sides = random.uniform(*GROWN["small"]), random.uniform(*GROWN["large"])
        first, last = sides if motion == "grow" else sides[::-1]
        return Thing(shape, colour, first, x, y), Thing(shape, colour, last, x, y)
    side = random.uniform(*SIZES[size or "medium"])
    go_x, go_y = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}[motion]
    half = TRAVEL / 2
    return (
        Thing(shape, colour, side, x - go_x * half, y - go_y * half),
        Thing(shape, colour, side, x + go_x * half, y + go_y * half),
    )


# --- painting ---------------------------------------------------------------------------------------------


def render_clip(clip: Clip) -> Frames:
    """The frames of a clip, (17, 64, 64, 3) RGB: an even course from the first place and size to the last."""
    random = Random(clip.seed)
    ground, ink = _shade(random, clip.background), _shade(random, clip.colour)
    covers = np.empty((FRAMES, VIDEO_PX, VIDEO_PX), np.uint8)
    moving = clip.first != clip.last
    for index in range(FRAMES if moving else 1):
        mask = silhouette(_between(clip.first, clip.last, index / (FRAMES - 1)), VIDEO_PX * SUPERSAMPLING)
        covers[index] = np.asarray(mask.resize((VIDEO_PX, VIDEO_PX), Image.Resampling.BOX))
    share = (covers if moving else covers[:1]).astype(np.float32)[..., None] / 255
    frames = np.round(ground + (ink - ground) * share).astype(np.uint8)
    return frames if moving else frames.repeat(FRAMES, 0)


def _between(first: Thing, last: Thing, time: float) -> Thing:
    """The object at a time from 0 (first) to 1 (last)."""
    side, x, y = (
        a + (b - a) * time for a, b in ((first.side, last.side), (first.x, last.x), (first.y, last.y))
    )
    return Thing(first.shape, first.colour, side, x, y)


def _shade(random: Random, colour: str) -> npt.NDArray[np.float32]:
    """The named colour, a little lighter or darker: what a seed may change."""
    rgb: Colour = COLOURS[colour]
    light = random.uniform(-10, 10)
    return np.array([c + light + random.uniform(-4, 4) for c in rgb], np.float32).clip(0, 255)


def coverage(clip: Clip, latent_px: int = 8) -> npt.NDArray[np.bool_]:
    """Where the object passes: (5, 8, 8), one entry per latent; the first frame alone, then four by four."""
    cells = VIDEO_PX // latent_px
    answer = np.zeros((1 + (FRAMES - 1) // 4, cells, cells), bool)
    for index in range(FRAMES):
        thing = _between(clip.first, clip.last, index / (FRAMES - 1))
        side = 1.1 * thing.side  # the tips of stars stand out of their box
        rows, columns = (_covered(centre, side, cells) for centre in (thing.y, thing.x))
        answer[(index + 3) // 4, rows, columns] = True
    return answer


def _covered(centre: float, side: float, cells: int) -> slice:
    first, last = (centre - side / 2) * cells, (centre + side / 2) * cells
    return slice(max(0, int(first)), min(cells, int(last) + 1))


# --- captions ---------------------------------------------------------------------------------------------

NOUNS = {  # the first word is the most frequent
    "circle": ("circle", "ball", "disc", "dot"),
    "square": ("square", "box", "block"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "donut"),
}
COLOUR_WORDS = {
    "gray": ("gray", "grey"),
    "cyan": ("cyan", "turquoise", "teal"),
    "purple": ("purple", "violet"),
}
SIZE_WORDS = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium",),
    "large": ("large", "big", "huge"),
}
MOTION_WORDS = {
    "left": (
        "moving left",
        "moving to the left",
        "going left",
        "sliding left",
        "moves left",
        "moves to the left",
    ),
    "right": (
        "moving right",
        "moving to the right",
        "going right",
        "sliding right",
        "moves right",
        "moves to the right",
    ),
    "up": ("moving up", "rising", "going up", "flying up", "moves up", "moving upwards"),
    "down": ("moving down", "falling", "going down", "sinking", "moves down", "moving downwards"),
    "grow": ("growing", "getting bigger", "becoming larger", "grows", "expanding"),
    "shrink": ("shrinking", "getting smaller", "becoming smaller", "shrinks"),
    "still": ("standing still", "not moving", "staying still", "stands still", "at rest"),
}
FILLERS = """the very nice bright beautiful smooth slowly quickly simple clean little cute single plain
colorful animated cartoon high quality looping steady towards from side""".split()
OPENINGS = (
    "a video of ",
    "a clip of ",
    "an animation of ",
    "a movie of ",
    "show me ",
    "there is ",
    "a photo of ",
    "a drawing of ",
)


def caption(clip: Clip, random: Random, *, plain: bool = False) -> str:
    """The clip in words; plain leaves out openings, full stops and stray words."""
    size = [_mostly_first(SIZE_WORDS[clip.size], random)] if clip.size else []
    colour = _mostly_first(COLOUR_WORDS.get(clip.colour, (clip.colour,)), random)
    noun = _mostly_first(NOUNS.get(clip.shape, (clip.shape,)), random)
    thing = _with_article(" ".join([*size, colour, noun]))
    motion = f" {_mostly_first(MOTION_WORDS[clip.motion], random)}" if clip.mentions_motion else ""
    ground = _ground(clip.background, random) if clip.mentions_background else ""
    commas = motion and random.random() < 0.15
    late = ground and random.random() < 0.25  # "a red circle on a white background moving left"
    text = thing + ground + motion if late else thing + ("," if commas else "") + motion + ground
    return text if plain else _decorated(text, random)


def _ground(colour: str, random: Random) -> str:
    word = _mostly_first(COLOUR_WORDS.get(colour, (colour,)), random)
    article = _with_article(word)
    phrases = (
        f" on {article} background",
        f", {word} background",
        f" with {article} background",
        f" on {word}",
        f" against {article} backdrop",
        f" in front of {article} background",
    )
    return random.choices(phrases, (52, 15, 10, 11, 6, 6))[0]


def _decorated(text: str, random: Random) -> str:
    if random.random() < 0.2:
        text = random.choice(OPENINGS) + text
    if random.random() < 0.1:
        words = text.split(" ")
        letters = "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(2, 4)))
        words.insert(random.randint(0, len(words)), random.choice([letters, *FILLERS]))
        text = " ".join(words)
    return text + "." if random.random() < 0.12 else text


def _mostly_first(words: tuple[str, ...], random: Random) -> str:
    return words[0] if random.random() < 0.6 else random.choice(words)


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase
