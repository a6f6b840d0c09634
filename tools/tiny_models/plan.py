"""The command line of a training run, and single-thread processes that share its work."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True, slots=True)
class Plan:
    """The command line; a stage takes it and leaves its results in the folders `work` and `out`."""

    work: Path  # checkpoints and intermediate results
    out: Path  # where the models are written
    warm_start: Path | None  # a tiny FLUX whose weights are taken over where they fit
    pool: int  # pictures
    vae_steps: int
    text_steps: int
    flow_steps: int
    distil_steps: int
    adapter_steps: int
    edit_pairs: int
    edit_steps: int
    edit_batch: int
    workers: int
    rehearsal: bool = False  # a few steps of a few pictures: shows that the stages fit together

    def cut(self, number: int, least: int = 2) -> int:
        """This number of steps, pictures or captions; in a rehearsal only `least`."""
        return min(number, least) if self.rehearsal else number


Stage = Callable[[Plan], None]


def in_processes(work: Callable[[int, Plan], None], plan: Plan) -> None:
    """Run `work` in single-thread processes that average their gradients, each on a core of its own.

    On a busy machine that is much faster than one process with as many threads, or than processes that may
    meet on one core and wait for each other there.  A single one is this process itself.
    """
    if plan.workers == 1:
        work(0, plan)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    spawn(_process, (work, plan), nprocs=plan.workers)


def _process(rank: int, work: Callable[[int, Plan], None], plan: Plan) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", rank=rank, world_size=plan.workers)
    work(rank, plan)
    dist.destroy_process_group()
