"""Measures a model on the device of this process: seconds of a forward of its denoiser by rows.

    python -m deployments.bench < job.json

The job has the card, the installation and a limit in seconds. Each line of the output is JSON: one per batch
size, then the profile and its file; or the error. `weft bench` runs it in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from deployments.engine.scheduled_job import ParkedCall, ScheduledJob
from deployments.engine.step_scheduler import StepScheduler
from deployments.models.device_memory import use_expandable_segments
from deployments.models.weight_cache import use_installation
from deployments.planning.profile import Profile, write_profile
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, ModelFailed, WeftError
from deployments.protocol.events import Failed
from deployments.protocol.installation import Installation
from deployments.protocol.request import GenerationRequest, ResolvedRequest
from deployments.validation.resolve import resolve

STEPS = 6  # of each request, as far as the card allows
PROMPTS = ("a warm-up", "a lighthouse", "a red circle")  # the last one is measured

Forwards = dict[Hashable, dict[int, list[float]]]  # seconds, by key and rows


class _AllTogether(StepScheduler):
    """Puts all calls that wait into one forward, and keeps the seconds of every forward."""

    forwards: Forwards

    def pick(self, waiting: Sequence[ParkedCall], now: float = 0.0, *, observe: bool = True) -> list[int]:
        """Indices of the calls that share the key of the first one."""
        del now, observe
        key = waiting[0].key if waiting else None
        return [0] if key is None else [i for i, call in enumerate(waiting) if call.key == key]

    def record_forward(
        self,
        key: Hashable | None,
        batch_size: int,
        seconds: float,
        jobs: Sequence[ScheduledJob] = (),
        now: float = 0.0,
    ) -> None:
        """One forward ran."""
        super().record_forward(key, batch_size, seconds, jobs, now)
        self.forwards[key][batch_size].append(seconds)

    def start(self) -> None:
        """Forget the forwards so far."""
        self.forwards = defaultdict(lambda: defaultdict(list))


class _Bench:
    """One card's model, loaded as planned for this device."""

    def __init__(self, card: ModelCard, installation: Installation) -> None:
        """Raises what kept the model from loading."""
        # here and not above: the allocator is set before torch is imported
        from deployments.models.determinism import set_determinism_flags
        from deployments.runtime import Runtime

        self._card = card
        # batch sizes are not proven: what is measured is what they take
        measured = card.model_copy(update={"serving": card.serving.model_copy(update={"exact": "off"})})
        self._schedulers: list[_AllTogether] = []
        self._runtime = Runtime(
            [measured],
            {},
            gpu_share=card.serving.num_gpus,
            lora_files=None,
            lora_folder=None,
            encoder=None,
            device_name=installation.device,
            schedule=self._scheduler_of,
        )
        self._runtime.check_loaded(card.id)
        self._measured = measured
        if card.serving.exact != "off":
            set_determinism_flags()

    def _scheduler_of(self, max_rows: int, row_limit: Any) -> StepScheduler:
        self._schedulers.append(_AllTogether(max_rows, row_limit))
        return self._schedulers[-1]

    async def measure(self, limit_s: float) -> Profile:
        """Print each batch size as it is measured; those that do not fit, and those beyond the limit, are
        left out. The smallest one is always measured."""
        ends_at = time.monotonic() + limit_s
        for prompt in PROMPTS:
            before = self._module_seconds()
            forwards = await self._run(1, prompt)
        after = self._module_seconds()
        took = {name: seconds - before.get(name, (0, 0.0))[1] for name, (_, seconds) in after.items()}
        denoiser = max(after, key=lambda name: after[name][0] - before.get(name, (0, 0.0))[0])
        decode_s = sum(seconds for name, seconds in took.items() if "decode" in name.lower())
        encode_s = sum(took.values()) - took[denoiser] - decode_s
        step_s = dict([_slowest_size(forwards)])
        call_rows = min(step_s)
        _print({"rows": call_rows, "seconds": step_s[call_rows]})
        requests, most_rows = 2, self._schedulers[-1].max_batch_size
        while requests <= self._card.serving.slots and requests * call_rows <= most_rows:
            if time.monotonic() > ends_at:
                break
            rows, seconds = _slowest_size(await self._run(requests, PROMPTS[-1]))
            if rows < requests * call_rows:  # it did not fit and was run in parts
                break
            step_s[rows] = seconds
            _print({"rows": rows, "seconds": seconds})
            requests *= 2
        sizes = self._card.sizes
        return Profile(sizes.width, sizes.height, call_rows, step_s, encode_s, decode_s)

    def keep(self, profile: Profile) -> str:
        """The file in which the profile is kept."""
        (model,) = self._runtime.models.models
        return str(write_profile(self._card.weights, model.profile_key, profile))

    def stop(self) -> None:
        self._runtime.worker.stop()

    def _module_seconds(self) -> dict[str, tuple[int, float]]:
        """Forwards so far and their seconds, by module."""
        found: dict[str, tuple[int, float]] = {}
        for labels, (count, seconds) in self._runtime.worker.stats.forwards.items():
            known = found.get(labels.module, (0, 0.0))
            found[labels.module] = known[0] + count, known[1] + seconds
        return found

    async def _run(self, requests: int, prompt: str) -> Forwards:
        """The forwards of so many requests at once. Raises the error of one that fails."""
        scheduler = self._schedulers[-1]
        await self._runtime.worker.run_on_thread(scheduler.start)
        await asyncio.gather(*[self._request(prompt, seed) for seed in range(requests)])
        return scheduler.forwards

    async def _request(self, prompt: str, seed: int) -> None:
        async with self._runtime.stream(
            self._measured, self._resolved(prompt, seed), "", None, None
        ) as events:
            async for event in events:
                if isinstance(event, Failed):
                    raise ModelFailed(event.message)

    def _resolved(self, prompt: str, seed: int) -> ResolvedRequest:
        steps = min(max(STEPS, self._card.steps.min), self._card.steps.max)
        request = GenerationRequest(model=self._card.id, prompt=prompt, seed=seed, num_inference_steps=steps)
        return resolve(request, self._card, fresh_seed=seed).request


def _slowest_size(forwards: Forwards) -> tuple[int, float]:
    """Rows and seconds of the denoiser's largest forwards: its key has run most often."""
    by_rows = max(forwards.values(), key=lambda sizes: sum(map(len, sizes.values())))
    rows = max(by_rows)
    return rows, statistics.median(by_rows[rows])


def _print(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> int:
    """Measure the model of the job on standard input. Returns the exit status."""
    job = json.load(sys.stdin)
    card = ModelCard.model_validate(job["card"])
    installation = TypeAdapter(Installation).validate_python(job["installation"])
    try:
        if "t2i" not in card.tasks:
            raise BadRequest(
                f"{card.id} makes no pictures from text, and others are not measured", param="model"
            )
        os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"  # a model folder may hold code; never run it
        use_installation(installation)
        if card.serving.num_gpus:
            use_expandable_segments(installation.hip_alloc_conf)
        bench = _Bench(card, installation)
        try:
            profile = asyncio.run(bench.measure(job["limit_s"]))
            _print({"profile": asdict(profile), "file": bench.keep(profile)})
        finally:
            bench.stop()
    except WeftError as error:
        _print({"error": error.message})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
