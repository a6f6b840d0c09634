"""A large batch of images as a Ray job: Ray Data over a file of prompts, into a folder or S3.

    ray job submit --working-dir . -- python -m examples.offline_batch prompts.txt s3://my-bucket/images

Needs `pip install 'weft[batch]'` (and `weft[s3]` for buckets) on the cluster. prompts.txt has one prompt a
line, or one JSON object with the fields of a GenerationRequest: {"prompt": "a red circle", "seed": 7}.

It may be killed at any time and started again: images in the folder are not generated again, and every file
there is complete. A file is named by its line and by a digest of its request, so a changed line gives a new
file. Requests whose replica dies are repeated. Requests that the model refuses are printed at the end, with
exit status 1; they do not stop the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import ray
from fsspec.implementations.local import LocalFileSystem
from ray import serve

from deployments.protocol.events import Artifact, Failed
from deployments.protocol.request import GenerationRequest
from examples.ray_job import check_folder

MAX_IN_FLIGHT = 16  # requests per actor; the replica runs them in shared forwards
MAX_ATTEMPTS = 3  # of a request whose replica dies


def read_requests(prompts: str, model: str) -> list[dict[str, str]]:
    """Rows of {name, request}, one per line that is not empty. Raises ValueError with the line at fault."""
    with fsspec.open(prompts, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    rows = []
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            fields = json.loads(line) if line.startswith("{") else {"prompt": line}
            request = GenerationRequest.model_validate({"model": model, "seed": number} | fields)
        except ValueError as error:
            raise ValueError(f"line {number + 1} of {prompts}: {error}") from error
        text = request.model_dump_json(exclude_defaults=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        rows.append({"name": f"{number:06}-{digest}", "request": text})
    return rows


def without_image(rows: list[dict[str, str]], folder: str) -> list[dict[str, str]]:
    """The rows whose first image, which is written last, is not in the folder."""
    files, root = fsspec.core.url_to_fs(folder)
    files.makedirs(root, exist_ok=True)
    there = {path.rsplit("/", 1)[-1] for path in files.ls(root, detail=False)}
    return [row for row in rows if f"{row['name']}.png" not in there]


class ImageWriter:
    """An actor of Ray Data: takes rows of requests, writes images, returns rows of {name, error}."""

    def __init__(self, folder: str, app: str) -> None:
        self._files, self._root = fsspec.core.url_to_fs(folder)
        self._app = app

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        with ThreadPoolExecutor(MAX_IN_FLIGHT) as pool:
            errors = list(pool.map(self._generate, batch["name"], batch["request"]))
        return {"name": list(batch["name"]), "error": errors}

    def _generate(self, name: str, text: str) -> str:
        """Write the images of one request. Returns the error, empty on success."""
        request = GenerationRequest.model_validate_json(text)
        handle = serve.get_deployment_handle(request.model, self._app)
        for left in reversed(range(MAX_ATTEMPTS)):
            try:
                images = []
                for event in handle.options(method_name="generate", stream=True).remote(
                    request, unlimited_wait=True
                ):
                    if isinstance(event, Failed):
                        return event.message
                    if isinstance(event, Artifact) and event.kind == "image":
                        images.append(event)
                # the first image marks the request as done, so it is written last
                for image in reversed(images):
                    suffix = f"-{image.index}" if image.index else ""
                    self._write(f"{name}{suffix}.png", image.data)
                return ""
            except ray.exceptions.RayActorError as error:
                if not left:
                    return f"its replica died {MAX_ATTEMPTS} times: {error}"
        raise AssertionError("not reached")

    def _write(self, name: str, data: bytes) -> None:
        """Write the file atomically: a bucket shows complete objects, a local file is renamed."""
        path = f"{self._root}/{name}"
        if not isinstance(self._files, LocalFileSystem):
            self._files.pipe_file(path, data)
            return
        part = f"{self._root}/.{uuid.uuid4().hex}"
        self._files.pipe_file(part, data)
        self._files.mv(part, path)


def generate_images(
    rows: list[dict[str, str]], folder: str, app: str, actors: int
) -> Iterator[dict[str, Any]]:
    """Yields a row of {name, error} per request as it ends."""
    results = ray.data.from_items(rows).map_batches(
        ImageWriter,
        fn_constructor_args=(folder, app),
        batch_size=MAX_IN_FLIGHT,
        num_cpus=0.1,  # an actor only waits
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    yield from results.iter_rows()


def main() -> int:
    parser = argparse.ArgumentParser(description="Images for a file of prompts.")
    parser.add_argument("prompts", help="a file, by path or fsspec URL")
    parser.add_argument("folder", help="folder for the images, by path or fsspec URL")
    parser.add_argument(
        "--model", default="tiny-flux-schnell", help="a model card's id (default: %(default)s)"
    )
    parser.add_argument("--app", default="weft", help="the Serve application (default: %(default)s)")
    parser.add_argument("--actors", type=int, default=2, help=f"each sends {MAX_IN_FLIGHT} requests at once")
    options = parser.parse_args()
    try:
        check_folder(options.folder)
    except ValueError as error:
        parser.error(str(error))
    ray.init()
    rows = read_requests(options.prompts, options.model)
    remaining = without_image(rows, options.folder)
    print(f"{len(rows)} prompts, {len(rows) - len(remaining)} of them done before", flush=True)
    refused = 0
    for row in generate_images(remaining, options.folder, options.app, options.actors) if remaining else ():
        if row["error"]:
            refused += 1
            print(f"{row['name']}: {row['error']}", file=sys.stderr, flush=True)
    print(f"{len(remaining) - refused} images made, {refused} requests refused", flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
