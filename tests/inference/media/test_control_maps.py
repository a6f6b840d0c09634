"""Control maps: edges, depth and poses of plain pictures, and maps that are used as sent."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
)

from deployments.media import decode
from deployments.media.control import COLOURS, control_map, depth_map, edge_map, is_edge_map, pose_map
from deployments.media.fitting import fitted
from deployments.models import preprocessors
from deployments.models.preprocessors import lazy_preprocessors, padded_box, peaks
from deployments.protocol.card import ControlNet, Licence, Weights
from deployments.protocol.errors import BadRequest, ModelFailed
from deployments.protocol.request import Control
from tests.inference.tiny_controls import save_depth_estimator

CPU = torch.device("cpu")
LICENCE = Licence(name="MIT", url="https://example.org")
STANDING = np.array(  # COCO's 17 key points of a person who faces us, in parts of the picture
    [
        *((0.50, 0.13), (0.53, 0.10), (0.47, 0.10), (0.56, 0.11), (0.44, 0.11), (0.65, 0.28), (0.35, 0.28)),
        *((0.75, 0.44), (0.25, 0.44), (0.78, 0.60), (0.22, 0.60), (0.60, 0.60), (0.40, 0.60), (0.62, 0.78)),
        *((0.38, 0.78), (0.64, 0.94), (0.36, 0.94)),
    ]
)


def drawing(size: tuple[int, int] = (128, 96)) -> Image.Image:
    """A grey disc on white, with a black line under it."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((30, 20, 90, 70), fill=(90, 90, 90))
    draw.line((0, 85, size[0], 85), fill="black", width=3)
    return picture


def file(picture: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def person(width: int, height: int, score: float = 1.0) -> npt.NDArray[np.floating[Any]]:
    return np.concatenate([STANDING * (width, height), np.full((17, 1), score)], axis=1)


def pixels(picture: Image.Image) -> npt.NDArray[np.int16]:
    return np.asarray(picture.convert("RGB"), dtype=np.int16)


def fit(picture: Image.Image, is_map: bool) -> Image.Image:
    return fitted(picture, (128, 96), "stretch", black_border=is_map)


def made(picture: bytes, kind: Any = "canny", **changes: Any) -> Image.Image:
    """The control map of a request without models that find anything."""
    control = Control(image=picture, type=kind, **changes)
    return control_map(control, decode.own_size(picture, "control_image"), fit, "control_image", {})


# --- edges ------------------------------------------------------------------------------------------------


def test_edges_are_thin_white_lines_where_the_picture_changes() -> None:
    edges = pixels(edge_map(drawing()))

    assert set(np.unique(edges)) == {0, 255}
    assert edges.shape == (96, 128, 3)
    assert edges[45, 28:33].max() == 255  # the disc's left side
    assert edges[45, 40:80].max() == 0  # inside it
    assert edges[5].max() == 0  # nothing above it


def test_a_plain_picture_becomes_its_edges() -> None:
    assert np.array_equal(pixels(made(file(drawing()))), pixels(edge_map(drawing())))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_an_edge_map_is_recognized_and_not_changed(form: str) -> None:
    edges = edge_map(drawing())

    assert is_edge_map(edges)
    assert np.abs(pixels(made(file(edges))) - pixels(edges)).max() == 0
    taken = made(file(edges, form))
    assert np.abs(pixels(taken) - pixels(Image.open(io.BytesIO(file(edges, form))))).max() == 0


@pytest.mark.parametrize(
    "picture",
    [
        drawing(),
        Image.radial_gradient("L"),
        Image.new("RGB", (64, 64)),
        Image.new("RGB", (64, 64), "white"),
        Image.effect_noise((64, 64), 60),
        Image.merge("RGB", [Image.new("L", (64, 64), 255), *[Image.new("L", (64, 64))] * 2]),
    ],
    ids=["drawing", "gradient", "black", "white", "noise", "red"],
)
def test_photos_and_drawings_are_no_edge_maps(picture: Image.Image) -> None:
    assert not is_edge_map(picture)


def test_is_map_of_the_caller_overrides_the_detection() -> None:
    edges = edge_map(drawing())

    assert np.array_equal(pixels(made(file(drawing()), is_map=True)), pixels(drawing()))
    assert not np.array_equal(pixels(made(file(edges), is_map=False)), pixels(edges))


@pytest.mark.parametrize("kind", ["canny", "depth", "pose"])
def test_a_map_is_brought_to_the_requests_size(kind: str) -> None:
    assert made(file(drawing((320, 200))), kind, is_map=True).size == (128, 96)


def test_a_plain_picture_without_a_preprocessor_is_refused_with_advice() -> None:
    with pytest.raises(BadRequest, match="send a depth map and say is_map: true") as caught:
        made(file(drawing()), "depth")

    assert caught.value.param == "control_image"


def test_a_damaged_control_picture_is_named() -> None:
    with pytest.raises(BadRequest, match="control_image is damaged"):
        made(file(drawing())[:-200])


# --- depth ------------------------------------------------------------------------------------------------


def test_the_nearest_point_is_white_and_the_farthest_black() -> None:
    depth = np.array([[0.5, 1.0], [2.5, 1.5]])

    assert pixels(depth_map(depth))[..., 0].tolist() == [[0, 64], [255, 128]]


def test_a_flat_depth_is_black_and_no_division_by_zero() -> None:
    assert pixels(depth_map(np.ones((2, 2)))).max() == 0


# --- poses ------------------------------------------------------------------------------------------------


def test_a_person_is_drawn_with_openposes_colours_at_its_key_points() -> None:
    drawn = pixels(pose_map([person(512, 512)], 512, 512))

    at = {name: drawn[int(y * 512), int(x * 512)].tolist() for name, (x, y) in POINTS.items()}
    assert at == {name: list(COLOURS[index]) for name, index in OPENPOSE.items()}
    assert drawn[5, 5].tolist() == [0, 0, 0]


POINTS = {
    "nose": (0.50, 0.13),
    "neck": (0.50, 0.28),
    "right elbow": (0.25, 0.44),
    "left wrist": (0.78, 0.60),
    "right knee": (0.38, 0.78),
    "left ankle": (0.64, 0.94),
}
OPENPOSE = {"nose": 0, "neck": 1, "right elbow": 3, "left wrist": 7, "right knee": 9, "left ankle": 13}


def test_a_limb_is_darker_than_its_joints() -> None:
    drawn = pixels(pose_map([person(512, 512)], 512, 512))

    thigh = drawn[int(0.69 * 512), int(0.39 * 512)]  # between right hip and right knee: the eighth limb
    assert thigh.tolist() == [part * 3 // 5 for part in COLOURS[7]]


def test_key_points_that_were_not_seen_are_left_out() -> None:
    hidden = person(512, 512)
    hidden[[5, 7, 9], 2] = 0.1  # the left arm; and so there is no neck, to which limbs would lead

    drawn = pixels(pose_map([hidden], 512, 512))

    assert drawn[int(0.60 * 512), int(0.78 * 512)].max() == 0
    assert drawn[int(0.28 * 512), int(0.50 * 512)].max() == 0
    assert drawn[int(0.44 * 512), int(0.25 * 512)].max() > 0


def test_two_people_are_both_drawn() -> None:
    one, other = person(256, 512), person(256, 512)
    other[:, 0] += 256

    both = pixels(pose_map([one, other], 512, 512))

    apart = [pixels(pose_map([alone], 512, 512)) for alone in (one, other)]
    assert np.array_equal(both, np.maximum(*apart))


def test_a_picture_without_people_is_refused_with_advice() -> None:
    control = Control(image=file(drawing()), type="pose")

    with pytest.raises(BadRequest, match=r"no person was detected in .*; send a pose map"):
        control_map(control, drawing(), fit, "control_image", {"pose": lambda _: []})


def test_a_peak_is_a_part_of_the_sides_a_quarter_cell_towards_its_neighbour() -> None:
    heatmap = np.zeros((1, 9, 5))
    heatmap[0, 4, 2], heatmap[0, 4, 3] = 0.8, 0.4

    assert peaks(heatmap).tolist() == [[2.25 / 4, 0.5, 0.8]]


def test_a_box_is_widened_to_the_models_shape_with_a_margin() -> None:
    assert padded_box(np.array([10.0, 20.0, 20.0, 60.0]), 0.75) == (-3.75, 15.0, 33.75, 65.0)


# --- models that find depth and people --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models of the real classes, saved as the hub has them."""
    folder = tmp_path_factory.mktemp("preprocessors")
    torch.manual_seed(0)
    save_depth_estimator(folder / "depth")
    vit = VitPoseBackboneConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[64, 48],
        patch_size=[16, 16],
        out_indices=[2],
    )
    VitPoseForPoseEstimation(VitPoseConfig(backbone_config=vit, num_labels=17)).save_pretrained(
        folder / "pose"
    )
    resnet = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    detector = RTDetrConfig(
        backbone_config=resnet,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=5,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        id2label={0: "person", 1: "dog"},
    )
    RTDetrForObjectDetection(detector).save_pretrained(folder / "people")
    RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder / "people")
    return folder


def card_entry(folder: Path, preprocessor: str, detector: str | None = None) -> ControlNet:
    def weights(name: str) -> Weights:
        return Weights(path=str(folder / name), dtype="float32")

    return ControlNet(
        weights=weights("net"),
        preprocessor=weights(preprocessor),
        detector=None if detector is None else weights(detector),
        licence=LICENCE,
    )


def test_depth_is_found_by_the_cards_model(folder: Path) -> None:
    find = lazy_preprocessors({"depth": card_entry(folder, "depth")}, CPU)

    depth = find["depth"](drawing())
    drawn = control_map(Control(image=file(drawing()), type="depth"), drawing(), fit, "control_image", find)

    assert depth.shape == (96, 128)
    assert depth.std() > 0
    assert np.array_equal(pixels(drawn), pixels(depth_map(depth)))
    assert np.array_equal(find["depth"](drawing()), depth)


def test_people_are_found_by_the_cards_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessors, "MIN_PERSON_SCORE", 0.0)  # random weights are sure of nothing
    find = lazy_preprocessors({"pose": card_entry(folder, "pose", "people")}, CPU)

    people = find["pose"](drawing())

    assert 0 < len(people) <= 5
    assert {points.shape for points in people} == {(17, 3)}


def test_a_card_without_preprocessors_has_none() -> None:
    entry = ControlNet(weights=Weights(path="net"), licence=LICENCE)

    assert lazy_preprocessors({"canny": entry, "depth": entry, "pose": entry}, CPU) == {}


def test_a_preprocessor_whose_files_are_missing_is_named(tmp_path: Path) -> None:
    find = lazy_preprocessors({"depth": card_entry(tmp_path, "nowhere")}, CPU)

    with pytest.raises(ModelFailed, match=r"nowhere: config\.json is missing"):
        find["depth"](drawing())
