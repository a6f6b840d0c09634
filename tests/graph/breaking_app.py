"""The application of serve_config.yaml, whose picture models break their device when a test says so."""

import os
from pathlib import Path
from typing import Any

from ray.serve import Application

import serve_app.app
from deployments.replica import ModelReplica
from serve_app.ray_serve.args import AppArgs

FOLDER = "BREAKS"  # environment variable: the folder of the orders


def order(folder: Path, part: str) -> None:
    """Have the next forward of this part of a model, such as "vae.decoder", break its device, once."""
    (folder / part).touch()


class BreakingReplica(ModelReplica):
    """A replica that reports an illegal access of the GPU when it finds an order."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        (loaded,) = self._runtime.models.models
        for part in ("transformer", "vae.decoder"):
            name, _, path = part.partition(".")
            module = getattr(loaded.pipelines._pipeline, name).get_submodule(path)
            # of a layer: the part itself is intercepted, and runs its forward without hooks
            first = next(layer for layer in module.modules() if not [*layer.children()])
            first.register_forward_pre_hook(_Order(Path(os.environ[FOLDER]) / part))


class _Order:
    """Takes the order of one part, and breaks the device."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, *_arguments: object) -> None:
        if self._file.exists():
            import torch

            self._file.unlink()
            error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            error.error_code = 700  # type: ignore[attr-defined]
            raise error


def build(args: AppArgs) -> Application:
    """See serve_app.app.build."""
    serve_app.app.ModelReplica = BreakingReplica  # type: ignore[misc]
    return serve_app.app.build(args)
