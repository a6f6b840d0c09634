"""Edits by reference with Modular pipelines: the pictures of the plain pipeline over the same parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.modular import ModularAdapter
from deployments.protocol.card import References
from deployments.protocol.errors import ModelFailed
from deployments.protocol.request import Task
from tests.inference.editing import PICTURES, klein, kontext, qwen_edit_plus
from tests.inference.pipelines.test_modular import quiet
from tests.inference.pipelines.test_reference_pictures import make_request

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes


def modular(name: str, plain: Any) -> ModularAdapter:
    """The Modular pipeline of diffusers with the parts of the plain one."""
    pipeline = getattr(diffusers, name)()
    known = [part for part in pipeline.component_names if plain.components.get(part) is not None]
    pipeline.update_components(**{part: plain.components[part] for part in known})
    return quiet(pipeline)


def model_of(pipeline: Any, most: int) -> DiffusersModel:
    limits = References(max=most, pixels=64 * 64 if most == 1 else None)
    return DiffusersModel(pipeline, [Task.edit], references=limits)


def edited(model: DiffusersModel, names: tuple[bytes, ...]) -> Any:
    pictures = [PICTURES[name] for name in names]
    made = model.call(make_request(names), lambda _step, _steps: None, references=pictures)
    return np.asarray(made[0])


@pytest.mark.parametrize(
    ("name", "build", "most", "references"),
    [
        ("Flux2KleinModularPipeline", klein, 10, [(b"square",), (b"square", b"wide")]),
        ("FluxKontextModularPipeline", kontext, 1, [(b"square",), (b"turned",)]),
    ],
    ids=["klein", "kontext"],
)
def test_a_modular_pipeline_edits_as_the_plain_one(
    name: str, build: Callable[[], Any], most: int, references: list[tuple[bytes, ...]]
) -> None:
    torch.manual_seed(0)
    plain = build()
    ours, theirs = model_of(modular(name, plain), most), model_of(plain, most)

    made = [edited(ours, names) for names in references]

    for names, picture in zip(references, made, strict=True):
        assert np.array_equal(picture, edited(theirs, names))
    assert not np.array_equal(made[0], made[1])  # the references count


def test_a_modular_kontext_with_several_references_is_refused_at_load() -> None:
    with pytest.raises(ModelFailed, match="takes one reference picture"):
        model_of(modular("FluxKontextModularPipeline", kontext()), 2)


def test_a_modular_pipeline_that_begins_with_its_picture_is_refused_at_load() -> None:
    with pytest.raises(ModelFailed, match="takes no reference pictures"):
        model_of(modular("QwenImageEditModularPipeline", qwen_edit_plus()), 1)
