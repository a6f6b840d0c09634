"""What became of every family in a mixed batch, as a table: `python -m tests.inference.families_table`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber, FiberCancelled
from deployments.engine.intercept import intercept
from tests.inference.engine.together import Together
from tests.inference.families import FAMILIES, PICTURE, Arguments, Family
from tests.inference.more_families import MORE

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
EVERY = FAMILIES | MORE  # the rows of the page, in this order
MAX_ROWS = 8


@dataclass(frozen=True)
class Outcome:
    """One family's mixed batch against the same requests alone."""

    pipelines: tuple[str, ...]
    denoiser: str
    tasks: tuple[str, ...]
    shared: dict[str, bool]  # "denoiser", "text encoders", "VAE" -> whether forwards were shared
    denoiser_calls: int
    denoiser_forwards: int
    compared: int
    cancelled: int
    error: float  # the largest difference, relative to the largest value of the picture or latents


def measure(family: Family) -> Outcome:
    """The family's requests in one engine, joining and leaving in the middle, against each alone."""
    torch.manual_seed(0)
    pipeline = family.build().to(dtype=family.dtype)
    modules = [part.eval() for part in pipeline.components.values() if isinstance(part, nn.Module)]
    works = _works(family, pipeline)
    expected = [work() for work in works]
    engine = Engine(Together(MAX_ROWS))
    restore = intercept(modules)
    try:
        fibers, victim, seen = _play(engine, works)
    finally:
        restore()
    for fiber in fibers:
        if fiber.failure is not None:
            raise fiber.failure
    denoiser = pipeline.components.get("transformer") or pipeline.components["unet"]
    name = f"{type(denoiser).__name__}.forward"
    counts = [count for seam, count in seen if seam == name]
    edits = family.image_class is not None or "image" in family.common
    video = family.output == "frames"
    return Outcome(
        pipelines=(type(pipeline).__name__, *([family.image_class] if family.image_class else [])),
        denoiser=type(denoiser).__name__,
        tasks=family.tasks
        if family.tasks is not None
        else ("t2v",) + ("i2v",) * edits
        if video
        else ("t2i",) * ("image" not in family.common) + ("i2i",) * edits,
        shared=_shared(pipeline, seen),
        denoiser_calls=sum(counts),
        denoiser_forwards=len(counts),
        compared=len(fibers),
        cancelled=int(isinstance(victim.failure, FiberCancelled)),
        error=max(_error(f.result, e) for f, e in zip(fibers, expected, strict=True)),
    )


def _works(family: Family, pipeline: Any) -> list[Callable[[], Tensor]]:
    templates: list[tuple[Any, Arguments]] = [(pipeline, request) for request in family.requests()]
    if family.image_class is not None:
        edit = _built(getattr(diffusers, family.image_class), pipeline)
        for request in family.requests()[:2]:
            image = PICTURE.resize((request["width"], request["height"]))
            extra = {"strength": 0.8} if "strength" in signature(edit.__call__).parameters else {}
            templates.append((edit, {**request, **extra, "image": image, "num_inference_steps": 4}))
    templates += [templates[0]] * 2  # in step with each other to the end, so that their decodes meet
    return [_work(family, *template, seed) for seed, template in enumerate(templates)]


def _work(family: Family, template: Any, request: Arguments, seed: int) -> Callable[[], Tensor]:
    """The first three give latents, the others pixels."""

    def call() -> Tensor:
        own = copy.copy(template)
        vars(own)["scheduler"] = copy.deepcopy(template.scheduler)
        own.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        output_type = "latent" if seed < 3 else "pt"
        result: Tensor = getattr(own(**request, generator=generator, output_type=output_type), family.output)
        return result

    return call


def _built(pipeline_class: Any, source: Any) -> Any:
    """A pipeline of this class over the components of `source`."""
    modules, options = pipeline_class._get_signature_keys(pipeline_class)
    config = {name: source.config[name] for name in options if name in source.config}
    return pipeline_class(**config, **{k: v for k, v in source.components.items() if k in modules})


def _play(
    engine: Engine, works: Sequence[Callable[[], Tensor]]
) -> tuple[list[Fiber], Fiber, list[tuple[str, int]]]:
    """Three at once and one that is cancelled; the others join while those run, the last two together.

    Returns the fibers, the cancelled one, and per forward its function's name and how many calls shared it.
    """
    fibers = [Fiber(work) for work in works]
    victim = Fiber(works[1])
    for fiber in (*fibers[:3], victim):
        engine.start(fiber)
    rest, seen = list(fibers[3:]), list[tuple[str, int]]()
    for step in range(10**6):
        if rest and step % 2:
            for fiber in rest if len(rest) == 2 else rest[:1]:
                engine.start(fiber)
            rest = [] if len(rest) == 2 else rest[1:]
        if step == 6:
            engine.cancel(victim)
        if engine.idle and not rest:
            break
        if not engine.idle:
            names = {f: f.call.seam.name for f in (*fibers, victim) if f.call is not None}
            before = engine.forwards
            moved = engine.step()
            together = engine.forwards == before + 1  # one that failed runs again in parts
            seen += [(names[moved[0]], len(moved))] if together else [(names[fiber], 1) for fiber in moved]
    return fibers, victim, seen


def _shared(pipeline: Any, seen: Iterable[tuple[str, int]]) -> dict[str, bool]:
    """By part of the pipeline: whether a forward served several calls."""
    merged = {name.partition(".")[0] for name, count in seen if count > 1}
    met = {name.partition(".")[0] for name, _ in seen}
    parts: dict[str, set[str]] = {"denoiser": set(), "text encoders": set(), "VAE": set()}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            role = "text encoders" if "encoder" in name else "VAE" if name == "vae" else "denoiser"
            parts[role] |= {type(part).__name__}
            if name == "vae":
                parts[role] |= {"Encoder", "Decoder"}
    parts["VAE"] &= merged  # not every one of encoder and decoder met another
    return {role: bool(names & met) and names & met <= merged for role, names in parts.items()}


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max())


def page(outcomes: dict[str, Outcome]) -> str:
    """docs/families.md."""
    lines = [
        "# Model families",
        "",
        "Which diffusers families share forward passes, and how exactly; written by a test.",
        "Each row is a tiny pipeline with random weights; its mixed batches equal each request alone.",
        "*merged*: calls of several requests shared forwards. *one at a time*: they took turns.",
        "",
        "The requests of a row differ in steps, guidance, seeds, prompts, numbers of images and, where the",
        "family allows it, size; some join while others run, and one is cancelled. `test_families.py` fails",
        "when this page and the code disagree; `python -m tests.inference.families_table` writes it.",
        "The suite runs the rows up to Ovis-Image and every day another part of the rest; `make families`",
        "runs all.",
        "",
        "| family | pipelines | denoiser | tasks | denoiser | text encoders | VAE | relative error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [row(name, outcome) for name, outcome in outcomes.items()]
    return "\n".join([*lines, ""])


def row(name: str, outcome: Outcome) -> str:
    """Of the page's table."""
    family = EVERY[name]
    kept = ["merged" if outcome.shared[part] else "one at a time" for part in outcome.shared]
    pipelines = ", ".join(outcome.pipelines)
    bound = f"< {'1e-12' if outcome.error < 1e-12 else family.tolerance} ({str(family.dtype)[6:]})"
    cells = [name, pipelines, outcome.denoiser, ", ".join(outcome.tasks), *kept, bound]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        outcomes = {name: measure(family) for name, family in EVERY.items()}
    PAGE.write_text(page(outcomes))


if __name__ == "__main__":
    main()
