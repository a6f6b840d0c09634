"""Rows of the denoiser's forwards over the rows that fit, for eight requests with guidance, by family.

In the default mode, on a device where every larger forward has more rows per second: whether the engine
fills forwards, not whether that pays on this machine.
"""

from __future__ import annotations

import argparse

import ledger

from tests.inference.engine.merging import MAX_ROWS, REQUESTS, merge_share
from tests.inference.families import FAMILIES

ROWS = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL", "wan": "Wan", "ltx": "LTX-Video"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    for name, family in ROWS.items():
        share = merge_share(FAMILIES[family])
        print(f"{family}: {share:.3f}", flush=True)
        if not options.dry:
            note = (
                f"tiny {family}, {REQUESTS} requests of 8 to 15 steps, at most {MAX_ROWS} rows, exact: prefer"
            )
            ledger.record(f"guided_merge_share.{name}", share, "of the rows that fit", n=REQUESTS, notes=note)


if __name__ == "__main__":
    main()
