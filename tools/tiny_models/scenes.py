"""Drawings: a scene is sampled from a seed and painted; `captions.py` puts it into words.

Everything here is a pure function of its seed, so a training set is a range of integers.  A caption that
does not name the background means white, one that names two objects the first one left.  Place, size, turn
and light are free where a caption does not name them: five numbers decide (`Variation`).  A tenth of all
attribute combinations is held out for scoring.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SceneKind = Literal["one", "many", "two", "patterned"]
Pattern = Literal["striped", "dotted", "checkered"]
Style = Literal["outline", "mosaic", "night"]
Colour = tuple[int, int, int]  # RGB, 0..255
Point = tuple[float, float]
Picture = npt.NDArray[np.uint8]  # (H, W, 3)

PICTURE_PX = 128
TOKEN_PX = 16  # one transformer token covers 16 x 16 pixels
SUPERSAMPLING = 2  # painted at twice the size, then averaged down: soft edges

COLOURS: dict[str, Colour] = {
    "red": (222, 38, 42),
    "green": (38, 160, 62),
    "blue": (40, 78, 214),
    "yellow": (248, 216, 48),
    "orange": (242, 136, 26),
    "purple": (132, 52, 176),
    "pink": (248, 150, 192),
    "cyan": (60, 204, 220),
    "white": (250, 250, 250),
    "black": (18, 18, 22),
    "gray": (128, 128, 132),
    "brown": (120, 74, 38),
}
BASE_SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
ICONS = ("house", "tree", "moon", "cloud", "flower", "fish", "sun", "cat")
SHAPES = BASE_SHAPES + ICONS
PATTERNS: tuple[Pattern, ...] = ("striped", "dotted", "checkered")
SECOND_COLOURS = (
    "white",
    "black",
    "yellow",
    "blue",
)  # of a pattern: the first that shows up on object and background
NATURAL_COLOURS = {  # "a tree" is green unless the caption names another colour
    "house": "brown",
    "tree": "green",
    "moon": "yellow",
    "cloud": "white",
    "flower": "pink",
    "fish": "orange",
    "sun": "yellow",
    "cat": "orange",
    "heart": "red",
    "star": "yellow",
}
PLACES = 9  # thirds of the picture, across and down
SIZES = {"small": (0.26, 0.28), "medium": (0.42, 0.45), "large": (0.68, 0.72)}  # bounding box / picture side
ANY_SIZE = (0.38, 0.58)  # of one object, when neither size nor place is named
PATTERNED_SIZE = (0.42, 0.62)  # the same; smaller patterns are hard to tell apart
SIZE_AT_PLACE = {True: (0.40, 0.56), False: (0.36, 0.39)}  # in the centre, elsewhere
MAX_SHIFT = 0.65  # share of the space around them that objects use where no place is named
MARGIN = 0.04  # of the picture, between an object and its edge
PLACE_TOLERANCE = 0.025  # how far an object may stand from the place that is named


class Ring(NamedTuple):
    """Where several objects stand: evenly on a circle around their middle."""

    radius: float  # fraction of the picture
    first: float  # direction of the first one, radians clockwise from the right
    turn: float  # how far all may turn either way, radians
    sides: tuple[float, float]  # of each object


GROUPS = {  # of equal objects
    2: Ring(0.24, math.pi, math.pi / 4, (0.34, 0.385)),
    3: Ring(0.28, math.pi / 6, math.pi / 10, (0.34, 0.385)),
    4: Ring(0.325, math.pi / 4, math.pi / 20, (0.34, 0.37)),
}
SIDE_BY_SIDE = Ring(0.24, math.pi, math.pi / 10, (0.36, 0.40))  # the first of two left
ONE_ABOVE = Ring(0.24, -math.pi / 2, math.pi / 10, (0.36, 0.40))  # the first of two on top
KIND_WEIGHTS: dict[SceneKind, int] = {"one": 37, "many": 24, "two": 31, "patterned": 8}
MIN_CONTRAST = 130  # summed RGB distance between an object and its background
MIN_PATTERN_CONTRAST = 180  # of an object's second colour with its first and with the background
LIGHT_COLOUR = 170  # brightness, 0..255, above which a colour gets no white pattern
MAX_BRIGHTENING = 18  # 0..255, how much lighter or darker than its name a colour may be
HELD_OUT_SHARE = 10  # one combination in ten is never trained on


class Variation(NamedTuple):
    """What a seed decides and no caption names: five independent numbers, each evenly distributed over -1..1.

    Training hides them in the noise of each drawing (`flow.layout_noise`), so that the noise of a request
    determines where things stand.
    """

    across: float = 0.0
    down: float = 0.0
    size: float = 0.0
    turn: float = 0.0
    light: float = 0.0

    def within(self, freedom: float) -> Variation:
        """The same light; everything else nearer to its middle. freedom: 0 (always there) to 1."""
        across, down, size, turn = (freedom * number for number in self[:4])
        return Variation(across, down, size, turn, self.light)


MIDDLE = Variation()


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its bounding box side and its centre are fractions of the picture side."""

    shape: str
    colour: str
    side: float
    x: float
    y: float
    pattern: Pattern | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows, and which parts of it the caption names."""

    seed: int  # of the shades
    kind: SceneKind
    background: str
    things: tuple[Thing, ...]
    mentions_background: bool
    mentions_colour: bool
    size: str | None = None  # key of SIZES
    position: tuple[int, int] | None = None  # column, row, each 0..2
    below: bool = False  # two objects: the second stands below, not right
    mentions_relation: bool = False
    variation: Variation = MIDDLE

    @property
    def key(self) -> str:
        """The attributes that a caption can name, as one string: the unit of holding out."""
        things = "+".join(
            f"{thing.pattern + ' ' if thing.pattern else ''}{thing.colour} {thing.shape}"
            for thing in self.things
        )
        return f"{self.kind}|{self.background}|{things}|{self.size}|{self.position}|{self.below}"


def is_held_out(scene: Scene) -> bool:
    """True for the tenth of all attribute combinations that training never sees."""
    return zlib.crc32(scene.key.encode()) % HELD_OUT_SHARE == 0


def contrast(a: str, b: str) -> int:
    """Summed RGB distance of two named colours, 0..765."""
    return sum(abs(x - y) for x, y in zip(COLOURS[a], COLOURS[b], strict=True))


# --- sampling ---------------------------------------------------------------------------------------------


def draw_scene(
    seed: int, *, held_out: bool = False, kind: SceneKind | None = None, freedom: float = 1.0
) -> Scene:
    """The scene of this seed, from the trained or from the held-out combinations.

    freedom: 0..1, how much of the space left open by the caption is used; 0 puts everything in its middle.
    """
    random, chance = Random(seed), Random(f"{seed}/free")
    variation = Variation(*(chance.uniform(-1, 1) for _ in Variation._fields)).within(freedom)
    while True:
        scene = _draw(random, kind or random.choices([*KIND_WEIGHTS], [*KIND_WEIGHTS.values()])[0], variation)
        if is_held_out(scene) == held_out:
            return scene


def _draw(random: Random, kind: SceneKind, variation: Variation) -> Scene:
    shape = random.choice(SHAPES)
    natural = shape in NATURAL_COLOURS and random.random() < 0.25
    colour = NATURAL_COLOURS[shape] if natural else random.choice(list(COLOURS))
    white = random.random() < 0.22 and contrast(colour, "white") > MIN_CONTRAST
    background = "white" if white else _contrasting(random, colour)
    scene = Scene(
        seed=random.getrandbits(32),
        kind=kind,
        background=background,
        things=(),
        mentions_background=not white or random.random() < 0.2,
        mentions_colour=not natural or kind == "two" or random.random() < 0.4,
        variation=variation,
    )
    if kind == "one":
        size, position = _draw_size_and_position(random)
        thing = _one(shape, colour, size, position, variation)
        return replace(scene, things=(thing,), size=size, position=position)
    if kind == "patterned":
        size = random.choice(("medium", "large", None, None))
        sizes = SIZES[size] if size else PATTERNED_SIZE
        thing = _anywhere(shape, colour, _between(sizes, variation.size), variation)
        thing = replace(thing, pattern=random.choice(PATTERNS))
        return replace(scene, things=(thing,), size=size)
    if kind == "many":
        appearances = [(shape, colour)] * random.choice((2, 2, 3, 3, 4))
        return replace(scene, things=_on(GROUPS[len(appearances)], appearances, variation))
    other_shape, other_colour = random.choice(SHAPES), _contrasting(random, background)
    while (other_shape, other_colour) == (shape, colour):
        other_shape, other_colour = random.choice(SHAPES), _contrasting(random, background)
    below = random.random() < 0.34
    pair = _on(
        ONE_ABOVE if below else SIDE_BY_SIDE, [(shape, colour), (other_shape, other_colour)], variation
    )
    return replace(scene, things=pair, below=below, mentions_relation=below or random.random() < 0.4)


def _contrasting(random: Random, colour: str) -> str:
    return random.choice([name for name in COLOURS if contrast(name, colour) > MIN_CONTRAST])


def _draw_size_and_position(random: Random) -> tuple[str | None, tuple[int, int] | None]:
    """A size word and a third of the picture, either or both None; away from the centre only small fits."""
    size = random.choice(list(SIZES)) if random.random() < 0.5 else None
    position = (random.randrange(3), random.randrange(3)) if random.random() < 0.42 else None
    if position not in (None, (1, 1)) and size != "small":
        size = None
    return size, position


def _one(
    shape: str, colour: str, size: str | None, position: tuple[int, int] | None, variation: Variation
) -> Thing:
    sizes = ANY_SIZE if position is None else SIZE_AT_PLACE[position == (1, 1)]
    side = _between(SIZES[size] if size else sizes, variation.size)
    if position is None:
        return _anywhere(shape, colour, side, variation)
    column, row = position
    reach = 0.5 - side / 2 - MARGIN - PLACE_TOLERANCE
    x = 0.5 + (column - 1) * reach + PLACE_TOLERANCE * variation.across
    y = 0.5 + (row - 1) * reach + PLACE_TOLERANCE * variation.down
    return Thing(shape, colour, side, x, y)


def _anywhere(shape: str, colour: str, side: float, variation: Variation) -> Thing:
    reach = MAX_SHIFT * (0.5 - side / 2 - MARGIN)
    return Thing(shape, colour, side, 0.5 + reach * variation.across, 0.5 + reach * variation.down)


def _on(ring: Ring, appearances: list[tuple[str, str]], variation: Variation) -> tuple[Thing, ...]:
    """Objects of these shapes and colours on a ring, which turns and moves as far as the picture lets it."""
    side = _between(ring.sides, variation.size)
    first = ring.first + ring.turn * variation.turn
    angles = [first + math.tau * index / len(appearances) for index in range(len(appearances))]
    xs = _moved([ring.radius * math.cos(angle) for angle in angles], side, variation.across)
    ys = _moved([ring.radius * math.sin(angle) for angle in angles], side, variation.down)
    return tuple(Thing(*appearance, side, x, y) for appearance, x, y in zip(appearances, xs, ys, strict=True))


def _moved(offsets: list[float], side: float, number: float) -> list[float]:
    """Centres along one axis: the offsets from the objects' middle, moved to somewhere inside the margins."""
    lowest, highest = MARGIN + side / 2 - min(offsets), 1 - MARGIN - side / 2 - max(offsets)
    middle, reach = (lowest + highest) / 2, MAX_SHIFT * max(0.0, highest - lowest) / 2
    return [middle + reach * number + offset for offset in offsets]


def _between(bounds: tuple[float, float], number: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * (1 + number) / 2


# --- painting ---------------------------------------------------------------------------------------------


def render(scene: Scene, *styles: Style) -> Image.Image:
    """The picture of a scene, 128 x 128 RGB, in the styles of these adapters."""
    random = Random(scene.seed)
    side_px = PICTURE_PX * SUPERSAMPLING
    light = MAX_BRIGHTENING * scene.variation.light  # one for the whole scene: contrasts stay
    picture = Image.new("RGB", (side_px, side_px), _shade(random, scene.background, light))
    for thing in scene.things:
        mask = silhouette(thing, side_px, details="outline" not in styles)
        if "outline" in styles:
            mask = _hollow(mask, line_px=5 * SUPERSAMPLING)
        picture.paste(_shade(random, thing.colour, light), mask=mask)
        if thing.pattern and "outline" not in styles:
            second = second_colour(thing.colour, scene.background)
            ink = ImageChops.multiply(mask, _pattern_mask(thing, side_px))
            picture.paste(_shade(random, second, light), mask=ink)
    picture = picture.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BOX)
    if "mosaic" in styles:
        picture = _as_mosaic(picture)
    return _at_night(picture) if "night" in styles else picture


def _shade(random: Random, colour: str, light: float) -> Colour:
    """The named colour in this light, each channel a little off: what a seed may change."""
    red, green, blue = (min(255, max(0, round(c + light + random.uniform(-8, 8)))) for c in COLOURS[colour])
    return red, green, blue


def second_colour(colour: str, background: str) -> str:
    """What a pattern on an object is painted in: white, black if the object is light, else what shows up."""
    for second in SECOND_COLOURS:
        white_on_light = second == "white" and _is_light(colour)
        contrasts = contrast(second, colour), contrast(second, background)
        if min(contrasts) > MIN_PATTERN_CONTRAST and not white_on_light:
            return second
    raise ValueError(f"no second colour for {colour} on {background}")


def _is_light(colour: str) -> bool:
    red, green, blue = COLOURS[colour]
    return 0.3 * red + 0.6 * green + 0.1 * blue > LIGHT_COLOUR


def _pattern_mask(thing: Thing, side_px: int) -> Image.Image:
    """Where an object's second colour goes, mode L; its phase is locked to the centre of the object."""
    radius = thing.side * side_px / 2
    x = (np.arange(side_px) + 0.5 - thing.x * side_px)[None, :] / radius
    y = (np.arange(side_px) + 0.5 - thing.y * side_px)[:, None] / radius
    match thing.pattern:
        case "striped":
            inked = (np.mod(y + 0.125, 0.5) < 0.25) & (x == x)
        case "dotted":
            inked = np.hypot(np.mod(x + 0.25, 0.5) - 0.25, np.mod(y + 0.25, 0.5) - 0.25) < 0.15
        case "checkered":
            inked = (np.floor(x / 0.36) + np.floor(y / 0.36)) % 2 == 0
        case None:
            raise ValueError("the object has no pattern")
    return Image.fromarray(inked.astype(np.uint8) * 255)


def silhouette(thing: Thing, side_px: int, *, details: bool = True) -> Image.Image:  # noqa: C901  16 shapes
    """The mask of one object, mode L, side_px square, 255 inside; details are the holes of doors and eyes."""
    mask = Image.new("L", (side_px, side_px), 0)
    pen = ImageDraw.Draw(mask)
    centre_x, centre_y, radius = thing.x * side_px, thing.y * side_px, thing.side * side_px / 2

    def ellipse(
        x: float, y: float, half_width: float, half_height: float | None = None, ink: int = 255
    ) -> None:
        """All in units of the radius, relative to the centre."""
        left, right = centre_x + (x - half_width) * radius, centre_x + (x + half_width) * radius
        half_height = half_width if half_height is None else half_height
        top, bottom = centre_y + (y - half_height) * radius, centre_y + (y + half_height) * radius
        pen.ellipse((left, top, right, bottom), fill=ink)

    def polygon(points: list[Point], ink: int = 255) -> None:
        pen.polygon([(centre_x + x * radius, centre_y + y * radius) for x, y in points], fill=ink)

    match thing.shape:
        case "circle":
            ellipse(0, 0, 1)
        case "square":
            polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
        case "triangle":
            polygon([(0, -0.95), (1, 0.85), (-1, 0.85)])
        case "star":
            polygon(_star_points(5, outer=1.08, inner=0.45, y=0.05))
        case "heart":
            polygon(_heart_points())
        case "diamond":
            polygon([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)])
        case "cross":
            polygon([(-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)])
            polygon([(-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95)])
        case "ring":
            ellipse(0, 0, 1)
            ellipse(0, 0, 0.52, ink=0)
        case "house":
            polygon([(-0.75, -0.05), (0.75, -0.05), (0.75, 0.9), (-0.75, 0.9)])
            polygon([(-1, 0), (0, -0.95), (1, 0)])
            if details:
                polygon([(-0.2, 0.9), (-0.2, 0.3), (0.2, 0.3), (0.2, 0.9)], ink=0)
        case "tree":
            polygon([(-0.18, 0.4), (0.18, 0.4), (0.18, 1), (-0.18, 1)])
            polygon([(0, -1), (0.62, -0.1), (-0.62, -0.1)])
            polygon([(0, -0.5), (0.85, 0.55), (-0.85, 0.55)])
        case "moon":
            ellipse(-0.05, 0, 0.95)
            ellipse(0.42, -0.12, 0.78, ink=0)
        case "cloud":
            ellipse(-0.52, 0.18, 0.46)
            ellipse(0.52, 0.2, 0.44)
            ellipse(-0.05, -0.15, 0.54)
            polygon([(-0.52, 0.25), (0.52, 0.25), (0.52, 0.64), (-0.52, 0.64)])
        case "flower":
            for petal in range(6):
                angle = math.tau * petal / 6
                ellipse(0.6 * math.sin(angle), -0.6 * math.cos(angle), 0.38)
            ellipse(0, 0, 0.45)
            if details:
                ellipse(0, 0, 0.27, ink=0)
        case "fish":
            ellipse(-0.18, 0, 0.8, 0.52)
            polygon([(0.45, 0), (1, -0.55), (1, 0.55)])
            if details:
                ellipse(-0.58, -0.12, 0.12, ink=0)
        case "sun":
            polygon(_star_points(8, outer=1, inner=0.62))
        case "cat":
            ellipse(0, 0.15, 0.82, 0.75)
            polygon([(-0.8, 0.1), (-0.72, -0.95), (-0.12, -0.5)])
            polygon([(0.8, 0.1), (0.72, -0.95), (0.12, -0.5)])
            if details:
                ellipse(-0.32, 0.05, 0.15, ink=0)
                ellipse(0.32, 0.05, 0.15, ink=0)
        case unknown:
            raise ValueError(f"no such shape: {unknown}; known are {', '.join(SHAPES)}")
    return mask


def _star_points(tips: int, outer: float, inner: float, y: float = 0.0) -> list[Point]:
    points = []
    for corner in range(2 * tips):
        angle, reach = math.pi * corner / tips, inner if corner % 2 else outer
        points.append((reach * math.sin(angle), y - reach * math.cos(angle)))
    return points


def _heart_points() -> list[Point]:
    """The well-known cosine heart, 60 corners, scaled to the unit box."""
    points = []
    for corner in range(60):
        a = math.tau * corner / 60
        x, y = (
            16 * math.sin(a) ** 3,
            13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a),
        )
        points.append((x / 16.5, -(y + 2.5) / 16.5))
    return points


def _hollow(mask: Image.Image, line_px: int) -> Image.Image:
    """Only the rim of a mask, line_px wide."""
    inside = mask
    for _ in range(line_px):  # one wide filter takes six times as long
        inside = inside.filter(ImageFilter.MinFilter(3))
    rim = Image.new("L", mask.size, 0)
    rim.paste(mask, (0, 0))
    rim.paste(0, (0, 0, *mask.size), inside)
    return rim


def _as_mosaic(picture: Image.Image) -> Image.Image:
    """16 px tiles of one colour, parted by dark lines one pixel wide."""
    tiles = PICTURE_PX // TOKEN_PX
    flat = picture.resize((tiles, tiles), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)
    pixels = np.asarray(flat).copy()
    pixels[::TOKEN_PX] = pixels[::TOKEN_PX] * 0.3
    pixels[:, ::TOKEN_PX] = pixels[:, ::TOKEN_PX] * 0.3
    return Image.fromarray(pixels)


def _at_night(picture: Image.Image) -> Image.Image:
    """Moonlight: little red and green, more blue."""
    pixels = np.asarray(picture) * np.array([0.26, 0.32, 0.58]) + np.array([2, 6, 40])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def cell_map(scene: Scene) -> npt.NDArray[np.int64]:
    """What each transformer token shows: (8, 8, 3) = indices of shape, colour and pattern.

    Without an object the shape is len(SHAPES); without a pattern the last is len(PATTERNS).
    """
    cells = PICTURE_PX // TOKEN_PX
    colours = list(COLOURS)
    answer = np.empty((cells, cells, 3), np.int64)
    answer[:] = len(SHAPES), colours.index(scene.background), len(PATTERNS)
    for thing in scene.things:
        columns, rows = (_covered(centre, thing.side, cells) for centre in (thing.x, thing.y))
        pattern = PATTERNS.index(thing.pattern) if thing.pattern else len(PATTERNS)
        answer[rows, columns] = SHAPES.index(thing.shape), colours.index(thing.colour), pattern
    return answer


def mentioned(scene: Scene) -> tuple[int, int]:
    """Which place (row by row; PLACES if none) and size (len(SIZES) if none) the caption names."""
    place = PLACES if scene.position is None else scene.position[0] + 3 * scene.position[1]
    return place, list(SIZES).index(scene.size) if scene.size else len(SIZES)


def _covered(centre: float, side: float, cells: int) -> slice:
    """The cells that a box covers by at least a tenth of a cell."""
    first = math.floor((centre - side / 2) * cells + 0.1)
    last = math.ceil((centre + side / 2) * cells - 0.1)
    return slice(max(0, first), min(cells, last))


# --- foreign pictures -------------------------------------------------------------------------------------


def texture(seed: int) -> Image.Image:
    """A picture unlike any scene (noise, polygons, lines): foreign uploads pass the autoencoder, too."""
    random = np.random.default_rng(seed)
    grey = random.random() < 0.4
    pixels = np.zeros((PICTURE_PX, PICTURE_PX, 3), np.float32)
    for cells in (2, 4, 8, 16, 32):
        weight = cells ** -random.uniform(0.3, 1.2)
        for channel, noise in enumerate(random.normal(size=(3, cells + 1, cells + 1)).astype(np.float32)):
            if grey and channel:
                pixels[..., channel] = pixels[..., 0]
                continue
            smooth = Image.fromarray(noise).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(smooth) * weight
    pixels = (pixels - pixels.mean()) / (pixels.std() + 1e-3) * random.uniform(20, 60) + random.uniform(
        60, 200, 3
    )
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(random.integers(0, 7)):
        red, green, blue = (int(c) for c in random.integers(0, 256, 3))
        corners = [(int(x), int(y)) for x, y in random.integers(-10, PICTURE_PX + 10, size=(3, 2))]
        if random.random() < 0.4:
            pen.line(corners[:2], fill=(red, green, blue), width=int(random.integers(1, 8)))
        else:
            pen.polygon(corners, fill=(red, green, blue))
    return picture
