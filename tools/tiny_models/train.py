"""Makes every tiny model from nothing: `python -m tools.tiny_models.train --work DIR [STAGE ...]`.

Stages run in the order in which `flux_stages.py`, `unet_stages.py`, `video_stages.py` and `edit_stages.py`
list them.  Checkpoints lie in the work folder: a stage that was interrupted continues from its last one.  The
models are written to models/tiny-*.  Seeds are fixed.  With --rehearsal every stage takes a few steps only,
to see in minutes that all of them work; name another folder than models/ with --out then.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.tiny_models import edit_stages, flux_stages, unet_stages, video_stages
from tools.tiny_models.plan import Plan, Stage

SHIPPED = Path(__file__).parents[2] / "models"
REHEARSAL = {  # each stage cuts what else would be long
    "pool": 40,
    "vae_steps": 2,
    "text_steps": 2,
    "flow_steps": 2,
    "distil_steps": 2,
    "adapter_steps": 2,
    "edit_steps": 2,
}
STAGES: dict[str, Stage] = flux_stages.STAGES | unet_stages.STAGES | video_stages.STAGES | edit_stages.STAGES


def main(argv: Sequence[str] | None = None) -> None:
    """Run the named stages, or all of them."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], metavar="STAGE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--warm-start", type=Path, default=None)
    parser.add_argument("--pool", type=int, default=80_000)
    parser.add_argument("--vae-steps", type=int, default=3_000)
    parser.add_argument("--text-steps", type=int, default=2_500)
    parser.add_argument("--flow-steps", type=int, default=10_000)
    parser.add_argument("--distil-steps", type=int, default=600)
    parser.add_argument("--adapter-steps", type=int, default=300)
    parser.add_argument("--edit-pairs", type=int, default=24_000)
    parser.add_argument("--edit-steps", type=int, default=6_000)
    parser.add_argument("--edit-batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rehearsal", action="store_true")
    options = vars(parser.parse_args(argv))
    stages = options.pop("stages") or list(STAGES)
    if options["rehearsal"]:
        if options["out"].resolve() == SHIPPED.resolve():
            parser.error("a rehearsal would overwrite the shipped models with untrained ones: give --out")
        options |= REHEARSAL
    plan = Plan(**options)
    plan.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for stage in stages:
        STAGES[stage](plan)


if __name__ == "__main__":
    main()
