"""Libraries that a class of diffusers computes with and that this project does not install."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.utils.import_utils import is_torchvision_available

from deployments.protocol.errors import ModelFailed

MARK = "is_torchvision_available()"  # modules of diffusers import torchvision only under this condition


def refuse_missing_library(kind: Any) -> None:
    """Raise ModelFailed for a class whose module uses torchvision where that is not installed.

    diffusers imports such a module all the same, and its forward fails with a NameError in the first step.
    """
    if is_torchvision_available():
        return
    try:
        source = inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):  # a class that is made at runtime
        return
    if MARK in source:
        raise ModelFailed(
            f"{kind.__name__} of diffusers computes with torchvision, which is not installed; install the "
            f"version of torchvision that belongs to torch {torch.__version__} and start again"
        )
