"""What a run did, as plain data for tests and as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tests.device_sim.costs import Cost
from tests.device_sim.device import SimulatedDevice
from tests.device_sim.measurements import Forward, Sync, is_denoiser
from tests.device_sim.run import Account, Outcome
from tests.device_sim.scenario import Wave

GIB = 2**30

Part = dict[str, Any]


def part_of(
    device: SimulatedDevice, wave: Wave | None, outcomes: Sequence[Outcome], account: Account
) -> Part:
    """The loading of the model (no wave) or one wave, as JSON holds it; seconds are modelled."""
    measurements, memory = device.measurements, device.memory
    return {
        "wave": None if wave is None else asdict(wave),
        "requests": [
            {"events": dict(outcome.events), "last": outcome.last, "error": outcome.error}
            for outcome in outcomes
        ],
        "memory": {
            "before": memory.before,
            "peak": memory.peak,
            "after": memory.live,
            "limit": memory.limit,
            "refused": memory.refused,
            "account": account,
            "grown_by_source": {source: size for source, size in memory.grown().items() if size},
        },
        "forwards": [_forward(forward) for forward in measurements.forwards],
        "packages": {package: _cost(cost) for package, cost in measurements.total.by_source.items()},
        "syncs": [
            _sync(sync, wave, measurements.forwards)
            for sync in sorted(measurements.syncs.values(), key=lambda sync: -sync.count)
        ],
        "mixing": dict(measurements.mixing),
        "hazards": dict(memory.hazards),
    }


def _cost(cost: Cost) -> dict[str, float]:
    return {"kernels": cost.kernels, "flops": cost.flops, "bytes": cost.bytes, "ms": cost.seconds * 1e3}


def _forward(forward: Forward) -> dict[str, Any]:
    return {
        "module": forward.module,
        "rows": forward.rows,
        "thread": forward.thread,
        "is_proof": forward.is_proof,
        "failed": forward.failed,
        **_cost(forward.cost.total),
        "peak": forward.memory.peak,
        "kernels_by_package": {package: cost.kernels for package, cost in forward.cost.by_source.items()},
    }


def _sync(sync: Sync, wave: Wave | None, forwards: Sequence[Forward]) -> dict[str, Any]:
    return {
        "kind": sync.kind,
        "source": str(sync.source),
        "ours": str(sync.ours),
        "line": sync.source.line,
        "thread": sync.thread,
        "count": sync.count,
        "per_step": wave is not None and sync.thread == "engine" and _is_per_step(sync, wave, forwards),
    }


def _is_per_step(sync: Sync, wave: Wave, forwards: Sequence[Forward]) -> bool:
    """Whether it happens in most steps of some requests, or around most forwards of the denoiser."""
    denoised = sum(is_denoiser(forward.module) for forward in forwards)
    return len(sync.steps) > (wave.steps - 2) / 2 or len(sync.forwards) > denoised / 2


def as_text(parts: Sequence[Part]) -> str:
    """The report for people."""
    sections = (_memory_lines, _forward_lines, _package_lines, _sync_lines, _fault_lines)
    return "\n".join(line for part in parts for section in sections for line in section(part))


def _memory_lines(part: Part) -> list[str]:
    memory = part["memory"]
    ends = Counter((request["last"], request["error"]) for request in part["requests"])
    done = ", ".join(f"{count} {last} {error}".strip() for (last, error), count in ends.items())
    return [
        "",
        f"requests: {done}" if part["wave"] else "load",
        f"memory: {memory['before'] / GIB:.2f} GiB before, peak {memory['peak'] / GIB:.2f}, "
        f"after {memory['after'] / GIB:.2f}; {memory['refused']} allocations refused",
        "  by the replica's account: "
        + ", ".join(f"{name} {(size or 0) / GIB:.2f}" for name, size in memory["account"].items()),
        *(
            f"  {size / GIB:+.3f} GiB from {source}"
            for source, size in memory["grown_by_source"].items()
            if part["wave"] and abs(size) > GIB / 100
        ),
    ]


def _forward_lines(part: Part) -> list[str]:
    lines = [
        "forwards: module, rows, number; of the last: kernels (of LoRAs), TFLOP, GiB moved, peak GiB, ms"
    ]
    groups: dict[tuple[str, int, bool, str], list[dict[str, Any]]] = {}
    for forward in part["forwards"]:
        key = (forward["module"], forward["rows"], forward["is_proof"], forward["failed"])
        groups.setdefault(key, []).append(forward)
    for (module, rows, is_proof, failed), members in groups.items():
        last = members[-1]
        loras = last["kernels_by_package"].get("deployments/loras", 0)
        lines.append(
            f"  {module:38s} {rows:3d} rows x{len(members):<4d}{' proof' if is_proof else ''} {failed}"
            f"{last['kernels']:7d} ({loras}) {last['flops'] / 1e12:8.2f} {last['bytes'] / GIB:8.2f} "
            f"{last['peak'] / GIB:7.3f} {last['ms']:8.1f}"
        )
    return lines


def _package_lines(part: Part) -> list[str]:
    return [
        "kernels by the code that launched them: number, TFLOP, GiB moved, modelled ms",
        *(
            f"  {package:30s} {cost['kernels']:8d} {cost['flops'] / 1e12:10.2f} {cost['bytes'] / GIB:9.2f} "
            f"{cost['ms']:10.1f}"
            for package, cost in sorted(part["packages"].items())
        ),
    ]


def _sync_lines(part: Part) -> list[str]:
    return [
        "waits of the host for the device: number, whether in every step, thread, kind, line, our line",
        *(
            f"  {sync['count']:5d} {'EVERY STEP ' if sync['per_step'] else ''}{sync['thread']} "
            f"{sync['kind']} {sync['source']}:{sync['line']} < {sync['ours']}"
            for sync in part["syncs"]
        ),
    ]


def _fault_lines(part: Part) -> list[str]:
    lines = []
    for name, faults in (("tensors of two devices", part["mixing"]), ("stream hazards", part["hazards"])):
        lines.append(f"{name}: {sum(faults.values()) or 'none'}")
        lines += [f"  {count:5d} {what}" for what, count in faults.items()]
    return lines
