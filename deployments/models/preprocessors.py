"""Models that estimate depth and poses in plain pictures, for control maps; loaded at their first call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForObjectDetection,
    VitPoseForPoseEstimation,
)

from deployments.engine.out_of_memory import load_or_free
from deployments.models.device_memory import Thing
from deployments.models.hardware import free_unused_memory
from deployments.models.load import load_module, load_processor, module_bytes
from deployments.models.model_memory import Admit, MemoryBeside
from deployments.protocol.card import ControlNet, Weights
from deployments.protocol.request import ControlType

logger = logging.getLogger(__name__)

MAX_PEOPLE = 16  # in one picture, those with the highest scores
MIN_PERSON_SCORE = 0.3
BOX_MARGIN = 1.25  # ViTPose was trained on boxes a quarter larger than the person
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's

CURE = "send a finished control map, or try again when less is running"

Floats = npt.NDArray[np.floating[Any]]
AdmitWeights = Callable[[Weights], Admit]
Load = Callable[[AdmitWeights], Callable[[Image.Image], Any]]


def lazy_preprocessors(
    controls: Mapping[ControlType, ControlNet],
    device: torch.device,
    memory: MemoryBeside | None = None,
    *,
    in_float16: bool = False,
) -> dict[ControlType, LazyPreprocessor]:
    """Preprocessors for the types of control picture whose models the card names: depth, pose.

    Each may be called from any thread; one call runs at a time. The first call loads the model and raises
    ModelUnavailable if that fails.
    memory: admits the models to the device; None: they are not counted.
    in_float16: on a device without bfloat16, weights of that dtype are loaded in float16.
    """

    def on_device(weights: Weights) -> Weights:
        lacking = in_float16 and weights.dtype == "bfloat16"
        return weights.model_copy(update={"dtype": "float16"}) if lacking else weights

    preprocessors: dict[ControlType, LazyPreprocessor] = {}
    depth, pose = controls.get("depth"), controls.get("pose")
    if depth is not None and depth.preprocessor is not None:
        estimator = on_device(depth.preprocessor)
        load: Load = partial(load_depth_estimator, estimator, device)
        preprocessors["depth"] = LazyPreprocessor(load, (estimator,), memory)
    if pose is not None and pose.preprocessor is not None and pose.detector is not None:
        estimator, detector = on_device(pose.preprocessor), on_device(pose.detector)
        load = partial(load_pose_estimator, estimator, detector, device)
        preprocessors["pose"] = LazyPreprocessor(load, (estimator, detector), memory)
    return preprocessors


class LazyPreprocessor:
    """A preprocessor that is loaded by its first call; one call at a time."""

    def __init__(self, load: Load, weights: Sequence[Weights], memory: MemoryBeside | None) -> None:
        """weights: of the models that `load` loads."""
        self.weights = weights
        self._load = load
        self._memory = memory
        self._preprocess: Callable[[Image.Image], Any] | None = None
        self._lock = threading.Lock()

    @property
    def things(self) -> tuple[Thing, ...]:
        """Under which the account of the memory has its models."""
        return () if self._memory is None else tuple(map(self._memory.thing, self.weights))

    def load(self, beside: Collection[Thing] = ()) -> None:
        """Have its models on the device; after a failure none of them is, and nothing is claimed.

        beside: what the same request holds already. Raises what the loading of a model raises.
        """
        with self._lock:
            self._ensure_loaded(beside)

    def unload(self) -> None:
        """Free its models, after a call that runs."""
        with self._lock:
            self._preprocess = None
            self._release()

    def __call__(self, picture: Image.Image) -> Any:
        with self._lock:
            preprocess = self._ensure_loaded(())
            with torch.inference_mode():
                return load_or_free(
                    "a control map", partial(preprocess, picture), cure=CURE, param="control_image"
                )

    def _ensure_loaded(self, beside: Collection[Thing]) -> Callable[[Image.Image], Any]:
        if self._preprocess is not None:
            return self._preprocess
        memory = self._memory
        admit: AdmitWeights = _uncounted if memory is None else partial(memory.admit, beside=beside)
        try:
            self._preprocess = load_or_free(
                "the model that makes control maps",
                partial(self._load, admit),
                _bytes_of(self.weights),
                cure=CURE,
                param="control_image",
            )
        except BaseException:
            self._release()
            raise
        return self._preprocess

    def _release(self) -> None:
        free_unused_memory()
        if self._memory is not None:
            for weights in self.weights:
                self._memory.release(weights)


def _uncounted(_weights: Weights) -> Admit:
    return lambda _size: None


def _bytes_of(weights: Sequence[Weights]) -> int | None:
    """Of these models on the device; None if it is not known."""
    return sum(module_bytes(one) or 0 for one in weights) or None


def load_depth_estimator(
    weights: Weights, device: torch.device, admit: AdmitWeights
) -> Callable[[Image.Image], Floats]:
    """A function from a picture to its depth (height, width), larger is nearer, by such as Depth Anything."""
    model, processor = _load(AutoModelForDepthEstimation, weights, device, admit), _processor(weights)

    def estimate(picture: Image.Image) -> Floats:
        inputs = processor(images=picture, return_tensors="pt").to(device, model.dtype)
        outputs = model(**inputs)
        (result,) = processor.post_process_depth_estimation(
            outputs, target_sizes=[(picture.height, picture.width)]
        )
        depth: Floats = result["predicted_depth"].float().cpu().numpy()
        return depth

    return estimate


def load_pose_estimator(
    weights: Weights, detector_weights: Weights, device: torch.device, admit: AdmitWeights
) -> Callable[[Image.Image], list[Floats]]:
    """A function from a picture to its people: for each (17, 3), x and y in pixels and a score."""
    detector = _load(AutoModelForObjectDetection, detector_weights, device, admit)
    processor = _processor(detector_weights)
    model = _load(VitPoseForPoseEstimation, weights, device, admit)
    person_labels = {label for label, name in detector.config.id2label.items() if name == "person"}

    def estimate(picture: Image.Image) -> list[Floats]:
        inputs = processor(images=picture, return_tensors="pt").to(device, detector.dtype)
        (detected,) = processor.post_process_object_detection(
            detector(**inputs),
            target_sizes=torch.tensor([(picture.height, picture.width)]),
            threshold=MIN_PERSON_SCORE,
        )
        people = [
            (float(score), box.float().cpu().numpy())
            for score, label, box in zip(
                detected["scores"], detected["labels"], detected["boxes"], strict=True
            )
            if int(label) in person_labels
        ]
        people.sort(key=lambda person: -person[0])
        return [_key_points(model, picture, box, device) for _, box in people[:MAX_PEOPLE]]

    return estimate


def _key_points(model: Any, picture: Image.Image, box: Floats, device: torch.device) -> Floats:
    """Key points (17, 3) of the person in `box` (left, top, right, bottom in pixels).

    Computed here and not by the image processor of transformers, which needs SciPy.
    """
    rows, columns = model.config.backbone_config.image_size
    left, top, right, bottom = padded_box(box, columns / rows)
    crop = picture.transform(
        (columns, rows),
        Image.Transform.EXTENT,
        (left, top, right, bottom),
        Image.Resampling.BILINEAR,
    )
    pixels = (np.asarray(crop, dtype=np.float32) / 255 - MEAN) / STD  # (rows, columns, 3)
    batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None]).to(device, model.dtype)
    heatmaps = model(pixel_values=batch).heatmaps[0].float().cpu().numpy()  # (17, rows/4, columns/4)
    points = peaks(heatmaps)
    points[:, 0] = left + points[:, 0] * (right - left)
    points[:, 1] = top + points[:, 1] * (bottom - top)
    return points


def padded_box(box: Floats, aspect: float) -> tuple[float, float, float, float]:
    """The box with the margin of ViTPose, extended to width / height = aspect."""
    left, top, right, bottom = (float(side) for side in box)
    width, height = max(right - left, 1.0), max(bottom - top, 1.0)
    width, height = max(width, height * aspect), max(height, width / aspect)
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    half_width, half_height = width * BOX_MARGIN / 2, height * BOX_MARGIN / 2
    return middle_x - half_width, middle_y - half_height, middle_x + half_width, middle_y + half_height


def peaks(heatmaps: Floats) -> Floats:
    """(n, 3): x and y (0..1 of the sides) and value of the maximum of each of (n, rows, columns) heatmaps.

    A quarter of a cell is added towards the higher neighbour, as is usual.
    """
    count, rows, columns = heatmaps.shape
    points = np.zeros((count, 3))
    for index, heatmap in enumerate(heatmaps):
        row, column = divmod(int(heatmap.argmax()), columns)
        x, y = float(column), float(row)
        if 0 < column < columns - 1:
            x += 0.25 * float(np.sign(heatmap[row, column + 1] - heatmap[row, column - 1]))
        if 0 < row < rows - 1:
            y += 0.25 * float(np.sign(heatmap[row + 1, column] - heatmap[row - 1, column]))
        points[index] = x / (columns - 1), y / (rows - 1), heatmap[row, column]
    return points


def _load(kind: Any, weights: Weights, device: torch.device, admit: AdmitWeights) -> Any:
    """The model on the device."""
    model = load_module(kind, weights, device, admit(weights))
    logger.info("preprocessor loaded", extra={"weights": weights.path or weights.repo})
    return model


def _processor(weights: Weights) -> Any:
    return load_processor(AutoImageProcessor, weights, backend="pil")
