"""What the tiny ControlNets are shown of a scene: its edges, its depth, or a figure in place of each object.

Drawings are flat, so depth and pose are agreed on here: an object bulges towards the viewer, a larger one
more, and a figure stands where an object is, as tall as it.  Maps look as the service's preprocessors draw
them.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from deployments.media.control import Person, depth_map, pose_map
from tools.tiny_models.scenes import PICTURE_PX, Picture, Scene, Thing, render, silhouette

LOWER, UPPER = 100, 200  # Canny's thresholds, in differences of grey 0..255
RIM = 0.5  # of an object's height is at its rim, the rest is its bulge
# COCO's 17 key points of a standing figure with raised arms, x and y from -1 to 1: nose, eyes, ears,
# shoulders, elbows, wrists, hips, knees, ankles; left before right, as seen by the figure
FIGURE = np.array(
    [
        (0.0, -0.8),
        (0.1, -0.9),
        (-0.1, -0.9),
        (0.2, -0.85),
        (-0.2, -0.85),
        (0.4, -0.5),
        (-0.4, -0.5),
        (0.75, -0.45),
        (-0.75, -0.45),
        (0.95, -0.8),
        (-0.95, -0.8),
        (0.25, 0.2),
        (-0.25, 0.2),
        (0.35, 0.6),
        (-0.35, 0.6),
        (0.45, 1.0),
        (-0.45, 1.0),
    ]
)


def edges(picture: Picture) -> Picture:
    """White edges on black of an RGB picture, (H, W, 3), as the service's own preprocessor draws them."""
    found = cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), LOWER, UPPER)
    return np.repeat(found[:, :, None], 3, 2).astype(np.uint8)


def canny(scene: Scene) -> Picture:
    """The edges of the scene's picture."""
    return edges(np.asarray(render(scene)))


def depth(scene: Scene) -> Picture:
    """Grey values (H, W, 3): the background is black, the highest point of the largest object white."""
    heights = np.zeros((PICTURE_PX, PICTURE_PX), np.float32)
    for thing in scene.things:
        heights = np.maximum(heights, _bulge(thing))
    return np.asarray(depth_map(heights))


def _bulge(thing: Thing) -> npt.NDArray[np.float32]:
    inside = (np.asarray(silhouette(thing, PICTURE_PX)) > 127).astype(np.uint8)
    from_rim = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
    height: npt.NDArray[np.float32] = thing.side * inside * (RIM + (1 - RIM) * from_rim / from_rim.max())
    return height


def pose(scene: Scene) -> Picture:
    """One OpenPose figure for each object, in its place and of its size."""
    return np.asarray(pose_map([_figure(thing) for thing in scene.things], PICTURE_PX, PICTURE_PX))


def _figure(thing: Thing) -> Person:
    points = (np.array([thing.x, thing.y]) + FIGURE * thing.side / 2) * PICTURE_PX
    return np.column_stack([points, np.ones(len(points))])
