"""What models of real size ask of a GPU: kernels, bytes and memory, counted on the tests' simulated device.

No weights and no GPU: tensors have shapes and no values. Kernels are operators that launch at least one;
bytes are what they read and write; memory is what torch's allocator hands out. One request per LoRA (ranks
16 and 32 in turns), all in one forward of the denoiser; ratios are to the same forward without LoRAs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import ledger

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.device_sim.expectations import GIB, decoding, full_forward, planned_bytes
from tests.device_sim.plans import CASES
from tests.device_sim.simulation import run_module, simulate

LORAS = 4
ROWS = {"flux": 4, "sdxl": 8, "sd15": 8}  # of a full forward: with classifier-free guidance a request has two
STEPS = 4


def waves_of(model: str) -> list[str]:
    """Options of the run: requests without LoRAs, then as many with one each."""
    waves = ["loras=0", f"loras={LORAS}"] if model in ("flux", "sdxl") else ["loras=0"]
    wave = ["--requests", str(LORAS), "--steps", str(STEPS), "--rows", str(ROWS[model])]
    return [*wave, *(word for changes in waves for word in ("--wave", changes))]


def figures(model: str) -> list[tuple[str, float, str, str]]:
    """Name, value, unit and notes of every row of this model."""
    load, plain, *with_loras = simulate(model, *waves_of(model), quiet_s=300.0)
    forward = full_forward(plain)
    rows = forward["rows"]
    notes = f"{model}, default size, forward of {rows} rows in bfloat16"
    decode = decoding(plain)[0]
    found = [
        (f"sim_kernels.{model}", forward["kernels"], "kernels per forward", notes),
        (f"sim_tflop.{model}", forward["flops"] / 1e12 / rows, "TFLOP per row", notes),
        (f"sim_moved.{model}", forward["bytes"] / GIB, "GiB per forward", notes),
        (f"sim_weights.{model}", load["memory"]["after"] / GIB, "GiB", f"{model}, all modules"),
        (f"sim_row.{model}", forward["peak"] / GIB / rows, "GiB of activations per row", notes),
        (f"sim_decode.{model}", decode["peak"] / GIB / decode["rows"], "GiB per picture decoded", notes),
        (
            f"sim_peak.{model}",
            plain["memory"]["peak"] / GIB,
            "GiB",
            f"{notes}; weights and decoding included",
        ),
    ]
    for part in with_loras:
        changed = full_forward(part)
        assert changed["rows"] == rows, "all requests share one forward"
        notes = f"{model}, {LORAS} LoRAs of ranks 16 and 32 in a forward of {rows} rows, to none"
        found += [
            (f"sim_lora_kernels.{model}", changed["kernels"] / forward["kernels"], "x", notes),
            (f"sim_lora_bytes.{model}", changed["bytes"] / forward["bytes"], "x", notes),
            (f"sim_lora_flops.{model}", changed["flops"] / forward["flops"], "x", notes),
        ]
    return found


def account_errors() -> dict[str, float]:
    """By model, how far the replica's account of the memory is from the peak that the device saw."""
    errors = {}
    for model, images, rows in (("sdxl", 4, 8), ("flux", 2, 4)):
        wave = ["--requests", "1", "--images", str(images), "--rows", str(rows), "--steps", "3"]
        served = simulate(model, *wave, "--loras", "1", quiet_s=300.0)[-1]
        errors[model] = abs(planned_bytes(served) / served["memory"]["peak"] - 1)
    return errors


def record_plans(cases: Sequence[str]) -> None:
    """Carry out these plans: what they reckon with, what the device saw, and how far the first is from it."""
    for case in cases or CASES:
        run = run_module("tests.device_sim.plans", case, quiet_s=300.0)
        assert set(run["ends"]) == {"Done"}, run["ends"]
        planned, peak = run["planned"]["peak"], run["peak"]
        notes = f"{run['model']} on {run['gpu']}: {run['rows']} rows, {run['lora_slots']} LoRAs of rank 32"
        ledger.record(f"plan_planned.{case}", planned / GIB, "GiB", notes=notes)
        ledger.record(f"plan_peak.{case}", peak / GIB, "GiB", notes=notes)
        error = planned / peak - 1
        ledger.record(f"plan_bytes_error.{case}", error, "of the simulated peak, by the plan", notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*ROWS], help=f"of {', '.join(ROWS)}; all if left out")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--account", action="store_true", help="only the account of the device's memory")
    parser.add_argument("--plans", nargs="*", metavar="CASE", help=f"only plans, of {', '.join(CASES)}")
    options = parser.parse_args()
    if options.plans is not None:
        record_plans(options.plans)
        return
    if options.account:
        errors = account_errors()
        notes = ", ".join(f"{model} {error:.3f}" for model, error in errors.items())
        ledger.record("plan_bytes_error", max(errors.values()), "of the simulated peak", notes=notes)
        return
    for model in options.models:
        for name, value, unit, notes in figures(model):
            if options.dry:
                print(f"{name} = {value:.4g} {unit}  {notes}", flush=True)
            else:
                ledger.record(name, value, unit, notes=notes)


if __name__ == "__main__":
    main()
