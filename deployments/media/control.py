"""Control maps for ControlNets, made from a plain picture or used as sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import Control, ControlType

Depth = npt.NDArray[np.floating[Any]]  # (height, width); larger is nearer
Person = npt.NDArray[np.floating[Any]]  # (17, 3): x and y in pixels and a score 0..1 per COCO key point
Point = tuple[float, float]  # x and y in pixels
Preprocessor = Callable[[Image.Image], Any]  # returns a Depth, or a list of Person
Fit = Callable[[Image.Image, bool], Image.Image]  # whether it is a map, whose border is black

CANNY_LOW, CANNY_HIGH = 100, 200  # thresholds of the edges that public ControlNets were trained on
BLACK, WHITE = 16, 239  # grey values that JPEG may make of black (at most) and white (at least)
MIN_SCORE = 0.3  # key points below it are not drawn
# OpenPose's 18 key points as COCO's 17: nose, neck (between the shoulders), right arm, left arm, right
# leg, left leg, eyes, ears
NOSE, NECK = 0, 1
COCO_OF_OPENPOSE = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
COCO_SHOULDERS = (5, 6)
# fmt: off
LIMBS = (
    (NECK, 2), (NECK, 5), (2, 3), (3, 4), (5, 6), (6, 7), (NECK, 8), (8, 9), (9, 10), (NECK, 11), (11, 12),
    (12, 13), (NECK, NOSE), (NOSE, 14), (14, 16), (NOSE, 15), (15, 17),
)
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
    (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)
# fmt: on


def control_map(
    control: Control,
    given: Image.Image,
    fit: Fit,
    field: str,
    preprocessors: Mapping[ControlType, Preprocessor],
) -> Image.Image:
    """The control map for a ControlNet: RGB, of the request's size.

    given: the control picture in its own size. fit: lays it into that size. field: its name in errors.
    preprocessors: estimate depth and poses; edges need none.
    Raises BadRequest when the map cannot be made.
    """
    is_map = control.is_map
    if is_map is None:
        is_map = control.type == "canny" and is_edge_map(given)
    picture = fit(given, is_map)
    if is_map:
        return picture
    if control.type == "canny":
        return edge_map(picture)
    if control.type not in preprocessors:
        raise BadRequest(
            f"this model makes no {control.type} map from a plain picture; send a {control.type} map "
            "and say is_map: true",
            param=field,
        )
    estimate = preprocessors[control.type](picture)
    if control.type == "depth":
        return depth_map(estimate)
    if not estimate:
        raise BadRequest(f"no person was detected in {field}; send a pose map", param=field)
    return pose_map(estimate, picture.width, picture.height)


def is_edge_map(picture: Image.Image) -> bool:
    """Whether a picture is almost only black and white, and more black than white: edges, not a photo."""
    channels = np.asarray(picture.convert("RGB"))
    black = (channels <= BLACK).all(axis=2).mean()
    white = (channels >= WHITE).all(axis=2).mean()
    return bool(black + white >= 0.97 and 0 < white < 0.5)


def edge_map(picture: Image.Image) -> Image.Image:
    """Canny edges, white on black, RGB, in the size of the picture."""
    import cv2

    edges = cv2.Canny(np.asarray(picture.convert("L")), CANNY_LOW, CANNY_HIGH)
    return Image.fromarray(edges).convert("RGB")


def depth_map(depth: Depth) -> Image.Image:
    """Depth as grey values, RGB: the nearest point is white, the farthest black."""
    low, high = float(depth.min()), float(depth.max())
    scale = 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(((depth - low) * scale).round().astype(np.uint8)).convert("RGB")


def pose_map(people: Sequence[Person], width: int, height: int) -> Image.Image:
    """People as coloured OpenPose skeletons on black, RGB."""
    canvas = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(canvas)
    thickness = max(2.0, 4.0 * math.sqrt(width * height) / 512)  # radius in pixels; 4 at 512x512
    for person in people:
        points = _openpose(person)
        for (first, second), colour in zip(LIMBS, COLOURS, strict=False):
            start, end = points[first], points[second]
            if start is not None and end is not None:
                red, green, blue = colour
                dimmed = (red * 3 // 5, green * 3 // 5, blue * 3 // 5)  # limbs are darker than joints
                draw.polygon(_limb(start, end, thickness), fill=dimmed)
        for point, colour in zip(points, COLOURS, strict=True):
            if point is not None:
                x, y = point
                draw.ellipse((x - thickness, y - thickness, x + thickness, y + thickness), fill=colour)
    return canvas


def _openpose(person: Person) -> list[Point | None]:
    """The 18 key points; None for those with a low score."""

    def point(index: int) -> Point | None:
        x, y, score = (float(value) for value in person[index])
        return (x, y) if score >= MIN_SCORE else None

    points = [None if index is None else point(index) for index in COCO_OF_OPENPOSE]
    left, right = (point(index) for index in COCO_SHOULDERS)
    if left is not None and right is not None:
        points[NECK] = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2)
    return points


def _limb(start: Point, end: Point, thickness: float) -> list[Point]:
    """Corners of an ellipse from start to end, as OpenPose draws a limb."""
    middle_x, middle_y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    half = math.dist(start, end) / 2
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    corners = []
    for turn in np.linspace(0, 2 * math.pi, 36, endpoint=False):
        along, across = half * math.cos(turn), thickness * math.sin(turn)
        corners.append(
            (
                middle_x + along * math.cos(angle) - across * math.sin(angle),
                middle_y + along * math.sin(angle) + across * math.cos(angle),
            )
        )
    return corners
