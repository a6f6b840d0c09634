"""The pipeline calls of one request: one for each picture, which is then the picture of its seed alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from deployments.engine.branches import SharedResults, run_branches
from deployments.engine.fiber import current_unproven, note_step, skip_calls, use_exactness, use_lora_set
from deployments.engine.work import Emit
from deployments.executors.inputs import Inputs
from deployments.executors.previews import attach_previews
from deployments.executors.run import Run
from deployments.pipelines.framewise import set_frame
from deployments.pipelines.prompt_cache import share_prompts
from deployments.pipelines.replay import StateMismatch
from deployments.pipelines.resume import Progress, State, capture, origin_of, restore, size_bytes
from deployments.pipelines.truncation import TokenizedText, watch_tokenizers
from deployments.protocol.events import Step
from deployments.validation.resolve import denoising_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StateReady:
    """The state of a request that runs, to be stored; its copies to the host may not have been made yet."""

    step: int
    state: State


class PipelineCalls:
    """All calls of a request as one piece of work for the engine.

    diffusers can make several pictures in one call, but some of its pipelines draw their noise from the first
    picture's generator only, and a call of several rows has other bits than one of each.
    """

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.steps = denoising_steps(run.request, run.model.card)  # of each picture
        self.tokenized: list[TokenizedText] = []  # by all calls
        self._origin = origin_of(run.model.card.weights)
        restored = restore(run.resume, run.request, self._origin) if run.resume else None
        self._progress = restored or [Progress() for _ in range(run.request.num_images)]
        self.restarted = bool(run.resume) and restored is None  # though it had a state
        self._reported = self.steps_done
        self._saved_at = time.monotonic()
        self._run = run
        self._inputs = inputs
        self._prompts = SharedResults()

    @property
    def steps_done(self) -> int:
        """Finished steps, as the mean of all pictures."""
        return sum(picture.done for picture in self._progress) // len(self._progress)

    @property
    def unproven(self) -> frozenset[str]:
        """Modules whose forwards were shared in sizes not proven exact, on this and on earlier replicas."""
        return frozenset[str]().union(*(picture.unproven for picture in self._progress))

    def work(self, emit: Emit) -> list[Any]:
        """What the calls return, in the order of the seeds. Runs as a fiber on the engine's thread."""
        use_lora_set(self._run.lora_set)
        use_exactness(self._run.request.exact)
        calls = [partial(self._call, index, emit) for index in range(len(self._progress))]
        results = [calls[0]()] if len(calls) == 1 else run_branches(calls)
        return [picture for result in results for picture in result]

    def capture(self) -> State | None:
        """The state for a Handover; None if there is none. Called on the engine's thread."""
        return capture(self._progress, self._origin)

    def _call(self, index: int, emit: Emit) -> list[Any]:
        try:
            return self._try_call(index, emit)
        except StateMismatch as error:
            logger.warning("a request's state does not fit; it starts anew", extra={"reason": str(error)})
            skip_calls(None)
            self._progress[index].forget()
            self._reported = self.steps_done
            self.restarted = True
            return self._try_call(index, emit)

    def _try_call(self, index: int, emit: Emit) -> list[Any]:
        request, progress = self._run.request, self._progress[index]
        seed = request.seed + index
        note_step(progress.done, self.steps)

        def on_step(step: int, all_steps: int) -> None:
            progress.unproven |= current_unproven()
            note_step(step, all_steps)
            if self.steps_done > self._reported:
                self._reported = self.steps_done
                emit(Step(self._reported, all_steps))
            self._emit_state(emit)

        return self._run.model.pipelines.call(
            request.model_copy(update={"seed": seed, "num_images": 1}),
            on_step,
            self._inputs.image,
            self._inputs.mask,
            self._inputs.control_maps,
            references=self._inputs.references,
            last_image=self._inputs.last_image,
            output_type="pending",
            progress=progress,
            attach=partial(self._attach, progress, emit if index == 0 else None),
            refiner=None if self._run.refiner is None else self._run.refiner.pipelines,
        )

    def _emit_state(self, emit: Emit) -> None:
        """Emit a StateReady if the last one is older than the caller wants."""
        policy, now = self._run.checkpoints, time.monotonic()
        if policy is None or now - self._saved_at < policy.interval_s:
            return
        self._saved_at = now
        if (size := size_bytes(self._progress)) > policy.max_bytes:
            logger.warning("a request's state is too large to be kept", extra={"size_bytes": size})
        elif (state := self.capture()) is not None:
            emit(StateReady(self.steps_done, state))

    def _attach(self, progress: Progress, emit: Emit | None, pipeline: Any) -> None:
        """emit: takes previews; None for pictures that have none."""
        run, request, loras = self._run, self._run.request, self._run.lora_set
        watch_tokenizers(pipeline, request.max_sequence_length, self.tokenized.append)
        text_loras = loras.label if loras and loras.touches_text else None
        # of requests without a promise, embeddings may be inexact and are kept for such requests only
        promised = request.exact != "off"
        unproven: Callable[[], frozenset[str]] = current_unproven if promised else frozenset
        run.model.prompts.attach(pipeline, (text_loras, promised), unproven, self.tokenized)
        if len(self._progress) > 1:
            share_prompts(pipeline, self._prompts)
        if run.frame is not None:
            set_frame(pipeline, run.frame)
        if emit is not None:
            attach_previews(pipeline, run.model.previewer, request, progress, emit)
