"""A batch of images from inside a Ray job, by Python handle: no HTTP, no job store.

    ray job submit --working-dir . -- python -m examples.ray_job prompts.txt images/

or, next to `weft serve` on the same machine, as in examples/README.md.
Nothing is durable on this path: the caller keeps the results, and repeats requests whose replica dies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from ray import serve

from deployments.protocol.events import Artifact, Failed
from deployments.protocol.request import GenerationRequest

MAX_IN_FLIGHT = 16  # requests; the replica runs them in shared forwards


def generate_images(prompts: Sequence[str], folder: Path, model: str, app: str = "weft") -> list[Path]:
    """One PNG per prompt, in order. Raises the WeftError of the first request that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = serve.get_deployment_handle(model, app).options(method_name="generate", stream=True)

    def one(numbered: tuple[int, str]) -> Path:
        number, prompt = numbered
        file = folder / f"{number:05}.png"
        for event in handle.remote(GenerationRequest(model=model, prompt=prompt, seed=number)):
            if isinstance(event, Failed):
                raise event.to_error()
            if isinstance(event, Artifact) and event.kind == "image":
                file.write_bytes(event.data)
        return file

    with ThreadPoolExecutor(MAX_IN_FLIGHT) as pool:
        return list(pool.map(one, enumerate(prompts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("folder", type=Path, help="folder for the images")
    parser.add_argument("--model", default="tiny-flux-schnell", help="a model card's id")
    options = parser.parse_args()
    ray.init()
    lines = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    files = generate_images(lines, options.folder, options.model)
    print(f"{len(files)} images in {options.folder}")


if __name__ == "__main__":
    main()
