"""What a model took on a device, as measured by `weft bench` and kept beside the weights. Pure: no torch.

A profile belongs to one device, one form of the model and the versions of the libraries that computed it;
others have files of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deployments import __version__
from deployments.planning.local_files import ROOT, model_cache
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan
from deployments.protocol.card import ModelCard, Weights

FOLDER = "weft-profiles"  # in the folder of the weights, or in that of downloaded weights

logger = logging.getLogger(__name__)

Key = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds on one device at one size of the pictures."""

    width: int
    height: int
    call_rows: int  # of one request's call: 2 where classifier-free guidance makes one call of both
    step_s: Mapping[int, float]  # of one forward of the denoiser, by rows
    encode_s: float  # of the prompt of one request
    decode_s: float  # of one picture

    @property
    def best_rows(self) -> int:
        """Rows of the forward with the most rows per second."""
        return max(self.step_s, key=lambda rows: rows / self.step_s[rows])


def profile_key(card: ModelCard, plan: Plan, machine: Machine) -> dict[str, str]:
    """What a profile holds for: the device, how the model runs on it, and versions."""
    device = machine.name
    if machine.kind == "cpu":
        device = f"{device}, {os.cpu_count()} cores, {max(1, int(card.serving.num_cpus))} threads"
    parts = [
        f"{part.name}: {part.dtype}, {part.placement}, {part.form}, {part.resident_blocks}"
        for part in plan.parts
    ]
    options = [plan.attention, plan.vae_tiling, plan.vae_slicing, plan.channels_last, card.serving.compile]
    versions = {"weft": __version__} | {name: version(name) for name in ("torch", "diffusers")}
    return {
        "weights": _source(card.weights),
        "device": device,
        "form": "; ".join([plan.dtype, *parts, *map(str, options)]),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def _source(weights: Weights) -> str:
    """Nothing of a local folder, which the profile is in."""
    place = weights.repo or (weights.path if weights.is_remote else "")
    files = "".join(f", {name}: {file.name} {file.revision}" for name, file in sorted(weights.gguf.items()))
    return f"{place}, {weights.revision}, {weights.variant}, {weights.dtype}{files}"


def read_profile(weights: Weights, key: Key) -> Profile | None:
    """The profile of this key; None where nothing was measured. A damaged one is ignored with a warning."""
    for folder in _folders(weights):
        file = folder / _name(key)
        try:
            found = json.loads(file.read_bytes())
            return _checked(found["profile"]) if found["key"] == key else None
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            logger.warning("a profile cannot be read", extra={"file": str(file), "error": repr(error)})
    return None


def write_profile(weights: Weights, key: Key, profile: Profile) -> Path:
    """Keep a profile beside the weights, else in the folder of downloaded weights. Returns its file.

    Raises OSError where neither can be written.
    """
    text = json.dumps({"key": dict(key), "profile": asdict(profile)}, indent=1)
    *first, last = _folders(weights)
    for folder in first:
        try:
            return _write(folder / _name(key), text)
        except OSError as error:
            logger.info("the folder of the weights cannot be written", extra={"error": repr(error)})
    return _write(last / _name(key), text)


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(f".{os.getpid()}")
    whole.write_text(text, encoding="utf-8")
    whole.replace(file)
    return file


def _name(key: Key) -> str:
    """Not .json: a search for damaged files of the weights reads those."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".profile"


def _folders(weights: Weights) -> list[Path]:
    """Where profiles of these weights are: beside them, if they are in a folder, and in the model cache."""
    places = [model_cache() / FOLDER]
    if weights.path is not None and not weights.is_remote:
        places.insert(0, ROOT / Path(weights.path).expanduser() / FOLDER)
    return places


def _checked(found: Mapping[str, Any]) -> Profile:
    """Raises ValueError, TypeError or LookupError for what is no profile."""
    step_s = {int(rows): float(seconds) for rows, seconds in found["step_s"].items()}
    if not step_s or min(step_s) < 1 or not all(0 < seconds < float("inf") for seconds in step_s.values()):
        raise ValueError(f"step_s is {step_s}")
    return Profile(
        int(found["width"]),
        int(found["height"]),
        int(found["call_rows"]),
        step_s,
        float(found["encode_s"]),
        float(found["decode_s"]),
    )
