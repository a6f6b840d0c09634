"""An edit by reference pictures that goes on elsewhere gives the same bits, after every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen_module

from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.prompt_cache import PromptCache
from deployments.protocol.card import References
from deployments.protocol.request import Task
from tests.inference.editing import klein, kontext, qwen_edit_plus
from tests.inference.executors.test_seeds_of_pictures import CARD, Loaded
from tests.inference.pipelines.test_reference_pictures import make_request
from tests.inference.pipelines.test_resumed_pipelines import assert_continues_everywhere


@pytest.mark.parametrize(
    ("build", "pictures"),
    [(kontext, 1), (klein, 2), (qwen_edit_plus, 2)],
    ids=["kontext", "flux2_klein", "qwen_edit_plus"],
)
def test_an_edit_continues_after_every_step(
    build: Callable[[], Any], pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen_module, "VAE_IMAGE_SIZE", 32 * 32)
    monkeypatch.setattr(qwen_module, "CONDITION_IMAGE_SIZE", 56 * 56)
    torch.manual_seed(0)
    pipeline = build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    limits = References(max=pictures, pixels=64 * 64 if pictures == 1 else None)
    model = Loaded(DiffusersModel(pipeline, [Task.edit], references=limits), PromptCache(2**20), None, CARD)

    assert_continues_everywhere(model, make_request((b"",) * pictures))
