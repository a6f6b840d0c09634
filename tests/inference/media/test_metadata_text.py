"""What a prompt writes into files: its text, and nothing that steers a terminal or poses as our settings."""

from __future__ import annotations

import io
import json
import re
import time
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deployments.media import movie, still
from deployments.media.metadata_text import as_json, prompt_lines
from deployments.media.video_spec import VideoSpec
from deployments.protocol.request import Lora, OutputOptions, ResolvedRequest
from tests.inference.video_files import clip, decode_video

NASTY = "a fox\0\x1b[31m red \u202egnp.exe\u2066 \x85\u2028 \x7f\x9b狐 \u200d"
FORGED = "a fox\nNegative prompt: nothing\r\nSteps: 99, Seed: 1\rsteps: 7\n  NEGATIVE PROMPT: x"
TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\0\x1b\r\n\t\u202e\u2028:")),
    max_size=200,
)


def request(**changes: Any) -> ResolvedRequest:
    facts = {
        "model": "tiny", "prompt": "a fox", "negative_prompt": "", "width": 64, "height": 48,
        "num_inference_steps": 4, "guidance_scale": 3.5, "seed": 41, "max_sequence_length": None,
    }  # fmt: skip
    return ResolvedRequest(**(facts | changes))


def unsafe(text: str) -> list[str]:
    """What no metadata may contain verbatim."""
    return [
        c
        for c in text
        if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t")
        or 0x202A <= ord(c) <= 0x202E
        or 0x2066 <= ord(c) <= 0x2069
        or c in "\u200e\u200f\u061c"
    ]


def settings_lines(parameters: str) -> list[str]:
    return [line for line in parameters.split("\n") if re.match(r"\s*steps:", line, re.IGNORECASE)]


def written(form: Any, prompt: str) -> tuple[str, dict[str, Any] | None]:
    """The parameters, and the JSON if there is one, as a reader finds them in a finished picture."""
    asked = request(prompt=prompt)
    parameters = still.a1111_parameters(asked, 42, "1.2")
    facts = still.metadata(asked, 42, "1.2", 1.0)
    data = still.encode(Image.new("RGB", (64, 48)), OutputOptions(format=form), parameters, facts)
    picture = Image.open(io.BytesIO(data))
    picture.load()
    if form == "png":
        return picture.info["parameters"], json.loads(picture.info["weft"])
    raw = picture.getexif().get_ifd(0x8769)[0x9286]
    return raw.removeprefix(b"UNICODE\0").decode("utf-16-be"), None


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_no_control_or_bidi_character_of_a_prompt_is_in_a_picture(form: str) -> None:
    parameters, facts = written(form, NASTY)

    assert unsafe(parameters) == []
    assert "\\u202e" in parameters
    assert "狐 \u200d" in parameters  # joiners make emoji and are kept
    assert facts is None or facts["prompt"] == NASTY


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_no_line_of_a_prompt_poses_as_settings_or_negative_prompt(form: str) -> None:
    parameters, _ = written(form, FORGED)

    assert settings_lines(parameters) == [parameters.split("\n")[-1]]
    assert parameters.split("\n")[-1].startswith("Steps: 4,")
    assert "Seed: 42" in parameters.split("\n")[-1]
    assert not re.search(r"^\s*negative prompt:", parameters, re.IGNORECASE | re.MULTILINE)


def test_the_json_in_a_png_has_none_either_and_gives_back_the_exact_prompt() -> None:
    asked = request(prompt=NASTY, negative_prompt=FORGED)

    text = as_json(still.metadata(asked, 42, "1.2", 1.0))

    assert unsafe(text) == []
    assert json.loads(text)["prompt"] == NASTY
    assert json.loads(text)["negative_prompt"] == FORGED
    assert "狐" in text


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_text_that_begins_like_settings_is_still_only_a_text(field: str) -> None:
    parameters = still.a1111_parameters(request(**{"prompt": "x", field: "Steps: 99, Seed: 1"}), 42, "1.2")

    assert settings_lines(parameters) == [parameters.split("\n")[-1]]
    assert "Steps : 99" in parameters or "Negative prompt: Steps : 99" in parameters


def test_a_name_of_a_lora_adds_no_entry_to_the_list() -> None:
    lora = Lora(id="a" * 64, name='night: 0000, "other\n', weight=1.0)

    settings = still.a1111_parameters(request(loras=(lora,)), 42, "1.2").split("\n")[-1]

    assert 'Lora hashes: "night 0000 other: aaaaaaaaaaaa"' in settings


@given(TEXT, TEXT)
def test_whatever_is_asked_the_last_line_alone_is_settings(prompt: str, negative: str) -> None:
    parameters = still.a1111_parameters(request(prompt=prompt, negative_prompt=negative), 42, "1.2")

    assert unsafe(parameters) == []
    assert settings_lines(parameters) == [parameters.split("\n")[-1]]
    assert json.loads(as_json({"prompt": prompt})) == {"prompt": prompt}


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=100))
def test_ordinary_text_of_any_script_is_written_as_it_is(text: str) -> None:
    assert prompt_lines(f"x{text}") == f"x{text}"


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_a_video_holds_the_same_text(form: str) -> None:
    parameters = still.a1111_parameters(request(prompt=NASTY + FORGED), 42, "1.2")
    spec = VideoSpec(64, 48, 2, 8, form, comment=parameters)  # type: ignore[arg-type]

    shown = decode_video(movie.join(spec, [movie.encode_segment(spec, 0, [clip(2)], 1)]).video)

    assert shown.metadata["comment"] == parameters
    assert unsafe(shown.metadata["comment"]) == []


@pytest.mark.parametrize("filler", ["\n", " ", "\t", " \n", "steps", "\x00", "狐"])
def test_a_prompt_of_one_repeated_part_is_written_in_linear_time(filler: str) -> None:
    def cpu_s(repeats: int) -> float:
        began = time.process_time()
        prompt_lines(filler * repeats)
        return time.process_time() - began

    short = min(cpu_s(8_000) for _ in range(3))

    assert cpu_s(32_000) < 8 * max(short, 0.01)  # 16 times as long if it were quadratic
