"""A batch of images from inside a Ray job, by Python handle: no HTTP, no job store.

    ray job submit --working-dir . -- python -m examples.ray_job prompts.txt s3://my-bucket/images

or, next to `weft serve` on the same machine, as in examples/README.md.
The folder is a path of the node that runs the job, or an fsspec URL. `--app model-sdxl` names the application
of a model that is one of its own (configs/serve/fleet.yaml).
Nothing is durable on this path: the caller keeps the results, and repeats requests whose replica dies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import ray
from ray import serve

from deployments.protocol.events import Artifact, Failed
from deployments.protocol.request import GenerationRequest

MAX_IN_FLIGHT = 16  # requests; the replica runs them in shared forwards


def check_folder(folder: str) -> None:
    """Raise ValueError for a folder whose files would be removed with the job.

    A job of `--working-dir` runs in a copy that Ray removes some time after the job, so a relative path is
    refused there.
    """
    lost = "working_dir_files" in Path.cwd().parts and "://" not in folder and not Path(folder).is_absolute()
    if lost:
        raise ValueError(
            f"{folder} would be removed with the job's copy of the working directory: "
            "give an absolute path of a shared disk, or a URL such as s3://my-bucket/images"
        )


def generate_images(prompts: Sequence[str], folder: str, model: str, app: str = "weft") -> list[str]:
    """Paths of one PNG per prompt, in order. Raises the WeftError of the first request that failed.

    folder: a path or an fsspec URL.
    """
    files, root = fsspec.core.url_to_fs(folder)
    files.makedirs(root, exist_ok=True)
    handle = serve.get_deployment_handle(model, app).options(method_name="generate", stream=True)

    def one(numbered: tuple[int, str]) -> str:
        number, prompt = numbered
        file = f"{root}/{number:05}.png"
        for event in handle.remote(GenerationRequest(model=model, prompt=prompt, seed=number)):
            if isinstance(event, Failed):
                raise event.to_error()
            if isinstance(event, Artifact) and event.kind == "image":
                files.pipe_file(file, event.data)
        return file

    with ThreadPoolExecutor(MAX_IN_FLIGHT) as pool:
        return list(pool.map(one, enumerate(prompts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("folder", help="folder for the images, by path or fsspec URL")
    parser.add_argument(
        "--model", default="tiny-flux-schnell", help="a model card's id (default: %(default)s)"
    )
    parser.add_argument("--app", default="weft", help="the Serve application (default: %(default)s)")
    options = parser.parse_args()
    try:
        check_folder(options.folder)
    except ValueError as error:
        parser.error(str(error))
    ray.init()
    lines = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    files = generate_images(lines, options.folder, options.model, options.app)
    print(f"{len(files)} images in {options.folder}")


if __name__ == "__main__":
    main()
