"""Turns a checkpoint in one file into the folder of a pipeline.

    python -m deployments.import_checkpoint < job.json

The job has the file, the folder to be written, the dtype, the installation, and where the configuration comes
from: a folder, a hub repository, or null for the one that such files have. The last line of the output is
JSON: what became of it, or the error. `weft models add` runs it in a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from deployments.checkpoint_format.header import CheckpointHeader, read_header
from deployments.models.weight_cache import hub_files, use_installation
from deployments.protocol.card import Weights
from deployments.protocol.errors import WeftError
from deployments.protocol.installation import Installation

CONFIGURATION = ["*.json", "*.txt", "*.model", "*.jinja"]
INDEX = "model_index.json"


def _source_folder(header: CheckpointHeader, wanted: str) -> Path:
    """The folder of a pipeline with the configuration, and with the weights that the file lacks.

    Raises ModelFailed or ModelUnavailable where the hub does not give it.
    """
    from deployments.models.load_errors import explain
    from deployments.models.single_file import needed_from_source

    folder = Path(wanted).expanduser()
    if folder.is_dir() or wanted.startswith(("/", ".", "~")):
        return folder
    try:
        found = hub_files(wanted, CONFIGURATION)
        if (found / INDEX).is_file():
            index = json.loads((found / INDEX).read_bytes())
            parts = [f"{name}/*.safetensors" for name in needed_from_source(header, index)]
            found = hub_files(wanted, [*CONFIGURATION, *parts])
    except Exception as error:
        raise explain(error, Weights(repo=wanted)) from error
    return found


def _import(job: Mapping[str, Any]) -> dict[str, Any]:
    from deployments.models.single_file import default_source, import_checkpoint

    header = read_header(Path(job["file"]))
    wanted = job["source"] or default_source(header)
    source = _source_folder(header, wanted)
    imported = import_checkpoint(header.path, source, Path(job["target"]), job["dtype"])
    return {**asdict(imported), "source": wanted}


def main() -> int:
    """Import the file of the job on standard input. Returns the exit status."""
    job = json.load(sys.stdin)
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"  # a model folder may hold code; never run it
    use_installation(TypeAdapter(Installation).validate_python(job["installation"]))
    try:
        print(json.dumps({"imported": _import(job)}), flush=True)
    except WeftError as error:
        print(json.dumps({"error": error.message}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
