"""Pairs of drawings and instructions: what a picture shows before and after "make it blue".

An edit is a pure function of its seed, like a scene.  The drawing after it is wholly determined by the
drawing before it and the instruction: what the instruction does not name stays where and as it was.  A tenth
of all combinations of drawing and edit is held out for scoring.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from tools.tiny_models.scenes import (
    COLOURS,
    HELD_OUT_SHARE,
    MARGIN,
    MIN_CONTRAST,
    NATURAL_COLOURS,
    SHAPES,
    Scene,
    Thing,
    contrast,
    draw_scene,
)
from tools.tiny_models.vocabulary import caption_words

EditKind = Literal["colour", "background", "move", "size", "shape", "add", "remove"]
Direction = Literal["left", "right", "up", "down"]

KIND_WEIGHTS: dict[EditKind, int] = {
    "colour": 20,
    "background": 12,
    "move": 18,
    "size": 12,
    "shape": 16,
    "add": 14,
    "remove": 8,
}
STEP = 0.25  # of the picture: how far "move it left" moves an object; two tokens of the transformer
DIRECTIONS: dict[Direction, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
BIGGER, SMALLER = 1.45, 0.65  # factors of an object's side
SIDES = (0.36, 0.54)  # of an object that is edited
LARGEST = 0.74
OTHER_SIDES: dict[tuple[bool, int], str] = {  # of two objects: (one above the other, index) -> side
    (False, 0): "on the left",
    (False, 1): "on the right",
    (True, 0): "at the top",
    (True, 1): "at the bottom",
}
PAIR_SHARE = 0.25  # of the changes of colour and shape have a second object, which stays
INSTRUCTION_WORDS = """make paint turn change its colour color into it move shift push put to left right up
down upwards downwards add draw place another bigger larger smaller enlarge shrink remove delete erase take
away replace with background recolour please now big little""".split()


@dataclass(frozen=True, slots=True)
class Edit:
    """A drawing, the same after an edit, and what an instruction has to name."""

    kind: EditKind
    before: Scene
    after: Scene
    index: int = 0  # which object of `before` changes or goes; of `after`, which one is new
    direction: Direction | None = None

    @property
    def thing(self) -> Thing:
        """The object that the edit is about: as it was, or the new one."""
        return (self.after if self.kind == "add" else self.before).things[self.index]

    @property
    def is_among_two(self) -> bool:
        """True if the instruction must say which object it means."""
        return len(self.before.things) > 1

    @property
    def key(self) -> str:
        """The unit of holding out."""
        return f"{self.kind}|{self.before.key}|{self.after.key}|{self.direction}"


def is_held_out(edit: Edit) -> bool:
    """True for the tenth of all combinations that training never sees."""
    return zlib.crc32(edit.key.encode()) % HELD_OUT_SHARE == 0


def draw_edit(seed: int, *, held_out: bool = False) -> Edit:
    """The edit of this seed, from the trained or from the held-out combinations."""
    random = Random(f"{seed}/edit")
    kind = random.choices([*KIND_WEIGHTS], [*KIND_WEIGHTS.values()])[0]
    while True:
        edit = _draw(random, kind)
        if edit is not None and is_held_out(edit) == held_out:
            return edit


def _draw(random: Random, kind: EditKind) -> Edit | None:
    """An edit of this kind, or None where it does not fit into the drawing."""
    if kind in ("add", "remove"):
        return _with_one_fewer(random, kind)
    if kind in ("colour", "shape") and random.random() < PAIR_SHARE:
        before = _scene(random, "two")
        index = random.randrange(2)
    else:
        before, index = _one_object(random), 0
    thing = before.things[index]
    match kind:
        case "colour":
            colour = _another(random, thing.colour, before.background)
            return _changed(kind, before, index, replace(thing, colour=colour))
        case "background":
            after = replace(before, background=_another(random, before.background, thing.colour))
            return Edit(kind, before, after)
        case "shape":
            shape = random.choice([name for name in SHAPES if name != thing.shape])
            return _changed(kind, before, index, replace(thing, shape=shape))
        case "size":
            side = thing.side * random.choice((BIGGER, SMALLER))
            reach = min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) - MARGIN / 2
            fits = side <= LARGEST and side / 2 <= reach
            return _changed(kind, before, index, replace(thing, side=side)) if fits else None
        case _:
            direction = random.choice([*DIRECTIONS])
            across, down = DIRECTIONS[direction]
            moved = replace(thing, x=thing.x + STEP * across, y=thing.y + STEP * down)
            edit = _changed(kind, before, index, moved, direction)
            inside = all(
                MARGIN / 2 <= at - thing.side / 2 <= 1 - MARGIN / 2 - thing.side for at in (moved.x, moved.y)
            )
            return edit if inside else None


def _with_one_fewer(random: Random, kind: EditKind) -> Edit | None:
    """Two objects and one of them, in the order in which the edit sees them."""
    both = _scene(random, "two")
    index = random.randrange(2)
    if kind == "add" and random.random() < 0.4:  # "add a star" is yellow: let that be taught
        shape = random.choice([*NATURAL_COLOURS])
        new = replace(both.things[index], shape=shape, colour=NATURAL_COLOURS[shape])
        if contrast(new.colour, both.background) <= MIN_CONTRAST:
            return None
        both = replace(both, things=_replaced(both.things, index, new))
    if both.things[0].shape == both.things[1].shape and both.things[0].colour == both.things[1].colour:
        return None
    alone = replace(both, kind="one", things=(both.things[1 - index],), below=False)
    return Edit("add", alone, both, index) if kind == "add" else Edit("remove", both, alone, index)


def _scene(random: Random, kind: Literal["one", "two"]) -> Scene:
    return draw_scene(random.getrandbits(40), kind=kind)


def _one_object(random: Random) -> Scene:
    """One object of medium size anywhere in the picture, also near its edges."""
    scene = _scene(random, "one")
    side = random.uniform(*SIDES)
    x, y = (random.uniform(MARGIN + side / 2, 1 - MARGIN - side / 2) for _ in range(2))
    thing = replace(scene.things[0], side=side, x=x, y=y)
    return replace(scene, things=(thing,), size=None, position=None)


def _another(random: Random, colour: str, beside: str) -> str:
    """A colour clearly unlike both."""
    return random.choice([n for n in COLOURS if min(contrast(n, colour), contrast(n, beside)) > MIN_CONTRAST])


def _changed(
    kind: EditKind, before: Scene, index: int, thing: Thing, direction: Direction | None = None
) -> Edit:
    after = replace(before, things=_replaced(before.things, index, thing))
    return Edit(kind, before, after, index, direction)


def _replaced(things: tuple[Thing, ...], index: int, thing: Thing) -> tuple[Thing, ...]:
    return (*things[:index], thing, *things[index + 1 :])


def edit_words(captions: int) -> dict[str, int]:
    """The words of so many captions with their frequencies, and those of instructions."""
    words = caption_words(captions)
    return words | {word: 1 for word in INSTRUCTION_WORDS if word not in words}


# --- instructions -----------------------------------------------------------------------------------------


def instruction(edit: Edit, random: Random, *, plain: bool = False) -> str:
    """What to say for this edit.  plain: without capitals, signs and politeness."""
    text = random.choice(_sentences(edit, random))
    if plain:
        return text
    if random.random() < 0.15:
        text = random.choice((f"please {text}", f"{text} please", f"now {text}"))
    if random.random() < 0.25:
        text = text.capitalize()
    return text + random.choice(("", "", "", "."))


def _sentences(edit: Edit, random: Random) -> list[str]:
    it = _named(edit, random)
    after = edit.after.things[edit.index if edit.kind != "remove" else 0]
    match edit.kind:
        case "colour":
            colour = after.colour
            return [
                f"make {it} {colour}",
                f"paint {it} {colour}",
                f"turn {it} {colour}",
                f"change the colour of {it} to {colour}",
                f"change {it} to {colour}",
            ]
        case "background":
            colour = edit.after.background
            return [
                f"make the background {colour}",
                f"change the background to {colour}",
                f"put {it} on {_with_article(colour)} background",
                f"turn the background {colour}",
            ]
        case "shape":
            shape = after.shape
            return [
                f"turn {it} into a {shape}",
                f"replace {it} with a {shape}",
                f"make {it} a {shape}",
                f"change {it} into a {shape}",
            ]
        case "size":
            if after.side > edit.thing.side:
                return [f"make {it} bigger", f"make {it} larger", f"enlarge {it}"]
            return [f"make {it} smaller", f"shrink {it}"]
        case "move":
            return _moves(it, edit.direction)
        case "add":
            return _additions(edit, random)
        case "remove":
            return [f"remove {it}", f"delete {it}", f"erase {it}", f"take {it} away"]


def _moves(it: str, direction: Direction | None) -> list[str]:
    if direction in ("left", "right"):
        return [
            f"{verb} {it} {way}"
            for verb in ("move", "shift", "push")
            for way in (direction, f"to the {direction}")
        ]
    return [
        f"{verb} {it} {way}" for verb in ("move", "shift", "push") for way in (direction, f"{direction}wards")
    ]


def _additions(edit: Edit, random: Random) -> list[str]:
    """With its colour unless that is the natural one, and the side only sometimes: there is only one free."""
    thing = edit.thing
    natural = NATURAL_COLOURS.get(thing.shape) == thing.colour
    noun = thing.shape if natural and random.random() < 0.7 else f"{thing.colour} {thing.shape}"
    side = OTHER_SIDES[edit.after.below, edit.index]
    return [
        f"{verb} {_with_article(noun)}{where}"
        for verb in ("add", "draw", "add")
        for where in ("", f" {side}")
    ]


def _named(edit: Edit, random: Random) -> str:
    """ "it" or the object by name; among two by what the other is not."""
    thing = edit.thing
    full = f"the {thing.colour} {thing.shape}"
    if not edit.is_among_two:
        return random.choice(("it", "it", f"the {thing.shape}", full))
    other = edit.before.things[1 - edit.index]
    names = [full]
    if other.shape != thing.shape:
        names += [f"the {thing.shape}"] * 2
    return random.choice(names)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
