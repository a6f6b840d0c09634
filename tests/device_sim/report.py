"""What a run did, as plain data for tests and as text for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from tests.device_sim.costs import Cost
from tests.device_sim.measurements import Forward, Sync
from tests.device_sim.run import Finished

GIB = 2**30


def report(finished: Finished) -> dict[str, Any]:
    """The run as JSON holds it. Bytes and FLOPs are of the simulated device, seconds are modelled."""
    device, measurements = finished.device, finished.device.measurements
    memory = device.memory
    return {
        "scenario": asdict(finished.scenario),
        "requests": [
            {"events": dict(outcome.events), "last": outcome.last, "error": outcome.error}
            for outcome in finished.outcomes
        ],
        "memory": {
            "weights": finished.weights_bytes,
            "peak": memory.peak,
            "left": memory.live - finished.weights_bytes,
            "limit": memory.limit,
            "refused": memory.refused,
            "account": finished.account,
            "left_by_source": dict(Counter(memory.live_by_source).most_common(12)),
        },
        "forwards": [_forward(forward) for forward in measurements.forwards],
        "packages": {package: _cost(cost) for package, cost in sorted(measurements.total.by_source.items())},
        "syncs": [
            _sync(sync, finished)
            for sync in sorted(measurements.syncs.values(), key=lambda sync: -sync.count)
        ],
        "mixing": dict(measurements.mixing),
        "hazards": dict(memory.hazards),
    }


def _cost(cost: Cost) -> dict[str, float]:
    return {
        "kernels": cost.kernels,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "ms": cost.seconds * 1e3,
    }


def _forward(forward: Forward) -> dict[str, Any]:
    return {
        "module": forward.module,
        "rows": forward.rows,
        "thread": forward.thread,
        "is_proof": forward.is_proof,
        "failed": forward.failed,
        **_cost(forward.cost.total),
        "peak_bytes": forward.memory.peak,
        "kernels_by_package": {package: cost.kernels for package, cost in forward.cost.by_source.items()},
    }


def _sync(sync: Sync, finished: Finished) -> dict[str, Any]:
    return {
        "kind": sync.kind,
        "source": str(sync.source),
        "ours": str(sync.ours),
        "line": sync.source.line,
        "thread": sync.thread,
        "count": sync.count,
        "per_step": sync.thread == "engine" and _is_per_step(sync, finished),
    }


def _is_per_step(sync: Sync, finished: Finished) -> bool:
    """Whether it happens in most steps of most requests, or around most forwards of the denoiser."""
    scenario = finished.scenario
    inner_steps = scenario.requests * (scenario.steps - 2)
    denoised = sum(is_denoiser(forward.module) for forward in finished.device.measurements.forwards)
    return len(sync.steps) > inner_steps / 2 or len(sync.forwards) > denoised / 2


def is_denoiser(module: str) -> bool:
    """Whether a forward of this name is a denoising step."""
    return "Transformer" in module or "UNet" in module


def as_text(data: dict[str, Any]) -> str:
    """The report for people."""
    parts = (_memory_lines, _forward_lines, _package_lines, _sync_lines, _fault_lines)
    return "\n".join(line for part in parts for line in part(data))


def _memory_lines(data: dict[str, Any]) -> list[str]:
    memory = data["memory"]
    ends = Counter((request["last"], request["error"]) for request in data["requests"])
    return [
        "requests: " + ", ".join(f"{count} {last} {error}".strip() for (last, error), count in ends.items()),
        f"memory: weights {memory['weights'] / GIB:.2f} GiB, peak {memory['peak'] / GIB:.2f}, above weights "
        f"{(memory['peak'] - memory['weights']) / GIB:.2f}, left at the end {memory['left'] / GIB:.3f}; "
        f"{memory['refused']} allocations refused",
    ]


def _forward_lines(data: dict[str, Any]) -> list[str]:
    lines = [
        "forwards: module, rows: number; of the last: kernels (of LoRAs), TFLOP, GiB moved, peak GiB, ms"
    ]
    groups: dict[tuple[str, int, bool, str], list[dict[str, Any]]] = {}
    for forward in data["forwards"]:
        key = (forward["module"], forward["rows"], forward["is_proof"], forward["failed"])
        groups.setdefault(key, []).append(forward)
    for (module, rows, is_proof, failed), members in groups.items():
        last = members[-1]
        loras = last["kernels_by_package"].get("deployments/loras", 0)
        lines.append(
            f"  {module:38s} {rows:3d} rows x{len(members):<4d}{' proof' if is_proof else ''} {failed}"
            f"{last['kernels']:7d} ({loras}) {last['flops'] / 1e12:8.2f} {last['bytes'] / GIB:8.2f} "
            f"{last['peak_bytes'] / GIB:7.3f} {last['ms']:8.1f}"
        )
    return lines


def _package_lines(data: dict[str, Any]) -> list[str]:
    lines = ["kernels by the code that launched them: number, TFLOP, GiB moved, modelled ms"]
    lines += [
        f"  {package:30s} {cost['kernels']:8d} {cost['flops'] / 1e12:10.2f} {cost['bytes'] / GIB:9.2f} "
        f"{cost['ms']:10.1f}"
        for package, cost in data["packages"].items()
    ]
    return lines


def _sync_lines(data: dict[str, Any]) -> list[str]:
    lines = ["waits of the host for the device: number, whether in every step, thread, kind, line, our line"]
    lines += [
        f"  {sync['count']:5d} {'EVERY STEP ' if sync['per_step'] else ''}{sync['thread']} {sync['kind']} "
        f"{sync['source']}:{sync['line']} < {sync['ours']}"
        for sync in data["syncs"]
    ]
    return lines


def _fault_lines(data: dict[str, Any]) -> list[str]:
    lines = []
    for name, faults in (("tensors of two devices", data["mixing"]), ("stream hazards", data["hazards"])):
        lines.append(f"{name}: {sum(faults.values()) or 'none'}")
        lines += [f"  {count:5d} {what}" for what, count in faults.items()]
    return lines
