"""What the engine itself costs per step boundary: a null denoiser with FLUX's arguments, 1 to 64 requests.

CPU seconds of the engine's thread, not wall time. The line through the medians gives a fixed cost per
forward and a cost per active request; the tensors are tiny, so that copying them hardly counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import ledger
import numpy as np
import torch
from torch import Tensor, nn

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.step_scheduler import StepScheduler

ACTIVE = (1, 2, 4, 8, 16, 32, 64)


class NullDenoiser(nn.Module):
    """Takes what FluxTransformer2DModel takes and gives its input back."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor,
        joint_attention_kwargs: dict[str, object] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        return (hidden_states,)


def request(denoiser: NullDenoiser, steps: int) -> None:
    """The denoising loop of one request, with nothing in it but the calls."""
    latents = torch.zeros(1, 4, 4)
    text, pooled = torch.zeros(1, 4, 4), torch.zeros(1, 4)
    img_ids, txt_ids = torch.zeros(4, 3), torch.zeros(4, 3)
    guidance = torch.full((1,), 3.5)
    for step in range(steps):
        latents = denoiser(
            hidden_states=latents,
            timestep=torch.full((1,), float(step)),
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=txt_ids,
            img_ids=img_ids,
            joint_attention_kwargs={},
            return_dict=False,
        )[0]


def cost_us(active: int, steps: int) -> float:
    """Median CPU microseconds of one step boundary with `active` requests."""
    denoiser = NullDenoiser()
    restore = intercept([denoiser])
    engine = Engine(StepScheduler(max_rows=64))
    for _ in range(active):
        engine.start(Fiber(lambda: request(denoiser, steps)))
    seconds: list[float] = []
    while not engine.idle:
        began = time.thread_time()
        engine.step()
        seconds.append(time.thread_time() - began)
    restore()
    return 1e6 * statistics.median(seconds[5:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        costs = [cost_us(active, options.steps) for active in ACTIVE]
    slope, fixed = np.polyfit(ACTIVE, costs, 1)
    spread = ", ".join(f"{n}: {cost:.0f}" for n, cost in zip(ACTIVE, costs, strict=True))
    print(f"fixed {fixed:.0f} us, per request {slope:.1f} us; by active requests {spread}")
    if not options.dry:
        notes = f"null denoiser, CPU time; us per step boundary by active requests: {spread}"
        ledger.record("engine_step_us", float(fixed), "us", n=options.steps, notes=notes)
        ledger.record("engine_per_request_us", float(slope), "us", n=options.steps, notes=notes)


if __name__ == "__main__":
    main()
