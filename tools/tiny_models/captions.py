"""Captions of scenes: plain English with the synonyms, openings and typing errors of prompts."""

from __future__ import annotations

from random import Random

from tools.tiny_models.scenes import Scene, Thing

NOUNS = {  # the first word is the most frequent
    "circle": ("circle", "disc", "ball", "dot"),
    "square": ("square", "box", "block"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "donut"),
    "house": ("house", "home"),
    "moon": ("moon", "crescent"),
    "cat": ("cat", "kitten"),
}
PLURALS = {"box": "boxes", "cross": "crosses", "plus": "pluses", "rhombus": "rhombuses", "fish": "fish"}
COLOUR_WORDS = {
    "gray": ("gray", "grey"),
    "cyan": ("cyan", "turquoise", "teal"),
    "purple": ("purple", "violet"),
}
PATTERN_WORDS = {
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
}
PATTERN_NOUNS = {"striped": ("stripes",), "dotted": ("dots", "spots"), "checkered": ("checks", "squares")}
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
COUNT_WORDS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
UNKNOWN_SHAPE, UNKNOWN_COLOUR = "circle", "blue"  # what a noun stands for that no drawing shows
UNKNOWN_SHARE = 0.5  # of the captions of such objects use one
UNKNOWN_NOUNS = tuple(
    """dog bird car person man woman mountain forest city apple banana castle boat ship chair table robot
    book cup horse lamp phone computer guitar dragon airplane bicycle shoe hat bottle clock key""".split()
)
OPENINGS = (
    "a photo of ",
    "an image of ",
    "a picture of ",
    "a drawing of ",
    "an illustration of ",
    "a painting of ",
    "draw ",
    "show me ",
    "an icon of ",
    "there is ",
)
ENDINGS = (
    "high quality",
    "minimalist",
    "simple",
    "flat design",
    "vector art",
    "best quality",
    "clean",
    "detailed",
    "cute",
    "sharp",
    "4k",
    "beautiful",
    "digital art",
    "masterpiece",
)


def caption(scene: Scene, random: Random, *, plain: bool = False) -> str:
    """The scene in words; plain leaves out openings, endings, typing errors, stray and unknown words."""
    body, place = _body(scene, random, plain), _place(scene, random)
    ground = _ground(scene, random)
    text = body + ground + place if place.startswith(",") and random.random() < 0.6 else body + place + ground
    return text if plain else _decorated(text, random)


def _body(scene: Scene, random: Random, plain: bool) -> str:
    first = scene.things[0]
    if scene.kind == "many":
        count = _mostly_first(COUNT_WORDS[len(scene.things)], random)
        return f"{count} {_noun_phrase(first, random, plural=True, mentions_colour=scene.mentions_colour)}"
    if scene.kind in ("one", "patterned"):
        noun, mentions_colour = None, scene.mentions_colour
        if not plain and first.shape == UNKNOWN_SHAPE and random.random() < UNKNOWN_SHARE:
            noun = _unknown_noun(random)
            mentions_colour = first.colour != UNKNOWN_COLOUR
        phrase = _noun_phrase(first, random, noun=noun, size=scene.size, mentions_colour=mentions_colour)
        return random.choices((_with_article(phrase), f"one {phrase}", phrase), (84, 5, 11))[0]
    one, other = (_with_article(_noun_phrase(thing, random)) for thing in scene.things)
    if not scene.mentions_relation:
        joined = (f"{one} and {other}", f"{one} next to {other}", f"{one} with {other}")
        return random.choices(joined, (70, 15, 15))[0]
    if scene.below:
        return random.choice(
            (
                f"{one} above {other}",
                f"{other} below {one}",
                f"{one} on top of {other}",
                f"{other} under {one}",
            )
        )
    return random.choice(
        (
            f"{one} left of {other}",
            f"{other} right of {one}",
            f"{one} to the left of {other}",
            f"{other} to the right of {one}",
            f"{one} on the left and {other} on the right",
        )
    )


def _noun_phrase(
    thing: Thing,
    random: Random,
    *,
    noun: str | None = None,
    plural: bool = False,
    size: str | None = None,
    mentions_colour: bool = True,
) -> str:
    noun = noun or _mostly_first(NOUNS.get(thing.shape, (thing.shape,)), random)
    if plural:
        noun = PLURALS.get(noun, noun + "s")
    words = [_mostly_first(SIZE_WORDS.get(size, (size,)), random)] if size else []
    colour = [_colour_word(thing.colour, random)] if mentions_colour else []
    if thing.pattern is None:
        return " ".join([*words, *colour, noun])
    if random.random() < 0.35:
        marks = _mostly_first(PATTERN_NOUNS[thing.pattern], random)
        return " ".join([*words, *colour, noun, "with", marks])
    pattern = [_mostly_first(PATTERN_WORDS[thing.pattern], random)]
    before = random.random() < 0.7
    return " ".join([*words, *(pattern + colour if before else colour + pattern), noun])


def _place(scene: Scene, random: Random) -> str:
    if scene.position is None:
        return ""
    column, row = scene.position
    height = ("", "top", "upper") if row == 0 else ("", "", "") if row == 1 else ("", "bottom", "lower")
    side = ("left", "", "right")[column]
    if side and row != 1:
        corner = f"{random.choice(height[1:])} {side}"
        return random.choice(
            (f" at the {corner}", f", {corner}", f" in the {corner} corner", f" on the {corner}")
        )
    word = side or height[1] or random.choice(("center", "middle"))
    preposition = "in" if scene.position == (1, 1) else random.choice(("at", "on"))
    return random.choice((f" {preposition} the {word}", f", {word}", f" in the {word}"))


def _ground(scene: Scene, random: Random) -> str:
    if not scene.mentions_background:
        return ""
    word = _colour_word(scene.background, random)
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
    if random.random() < 0.15:
        text = f"{text}, {random.choice(ENDINGS)}"
    if random.random() < 0.06:
        words = text.split(" ")
        stray = "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(2, 5)))
        words.insert(random.randint(0, len(words)), stray)
        text = " ".join(words)
    if random.random() < 0.12:
        text += "."
    return text.replace(",", "") if random.random() < 0.05 else text


def _mostly_first(words: tuple[str, ...], random: Random) -> str:
    return words[0] if random.random() < 0.6 else random.choice(words)


def _unknown_noun(random: Random) -> str:
    """A noun that no drawing shows: one of everyday life, or two or three syllables."""
    if random.random() < 0.4:
        return random.choice(UNKNOWN_NOUNS)
    syllables = range(random.randint(2, 3))
    return "".join(random.choice("bcdfghklmnprstvw") + random.choice("aeiou") for _ in syllables)


def _colour_word(colour: str, random: Random) -> str:
    return _mostly_first(COLOUR_WORDS.get(colour, (colour,)), random)


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase
