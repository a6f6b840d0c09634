"""What the tests of all models look at in a report."""

from __future__ import annotations

from typing import Any

from tests.device_sim.measurements import is_denoiser

GIB = 2**30

Part = dict[str, Any]


def ends(part: Part) -> list[str]:
    """The last event of every request, with its error."""
    return [f"{request['last']} {request['error']}".strip() for request in part["requests"]]


def denoising(part: Part) -> list[dict[str, Any]]:
    """The forwards of the denoiser for requests."""
    return [
        forward for forward in part["forwards"] if is_denoiser(forward["module"]) and not forward["is_proof"]
    ]


def full_forward(part: Part) -> dict[str, Any]:
    """The last of the denoiser's forwards with the most rows; what a first forward prepares is there then."""
    rows = max(forward["rows"] for forward in denoising(part))
    return [forward for forward in denoising(part) if forward["rows"] == rows][-1]


def decoding(part: Part) -> list[dict[str, Any]]:
    """The forwards of the VAE's decoder."""
    return [forward for forward in part["forwards"] if forward["module"] == "Decoder.forward"]


def waits_per_step(part: Part) -> set[str]:
    """Lines at which the engine's thread waits for the device in most steps or around most forwards."""
    return {sync["source"] for sync in part["syncs"] if sync["per_step"]}


def lora_kernels(forward: dict[str, Any]) -> int:
    return int(forward["kernels_by_package"].get("deployments/loras", 0))


def planned_bytes(part: Part) -> int:
    """What the replica's account says that all parts and the largest forwards have together."""
    account = part["memory"]["account"]
    held = ("weights", "loras", "stacks", "prompts", "requests")
    return sum(account[name] for name in (*held, "activations"))


def grown_gib(part: Part) -> float:
    """Memory that a wave left allocated."""
    return float(part["memory"]["after"] - part["memory"]["before"]) / GIB


def faults(parts: list[Part]) -> list[str]:
    """Operators over two devices, and races, in any part of a run."""
    return [fault for part in parts for fault in (*part["mixing"], *part["hazards"])]
