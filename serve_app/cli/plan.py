"""`weft plan`: how a model runs on a device, and how much memory it needs there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from deployments.planning.device_limit import GIB
from deployments.planning.gpus import GPUS
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.planning.summary import summary
from deployments.protocol.card import ModelCard, load_cards
from deployments.protocol.errors import BadRequest, ModelUnavailable
from serve_app.admission.validation import find_card
from serve_app.settings import ROOT, Settings

THIS_MACHINE_TIMEOUT_S = 120.0

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Id or alias of a model card.")],
    gpu: Annotated[
        str | None, typer.Option(help="A known GPU, such as a10g.  Default: the device at hand.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="One line for each known GPU.")] = False,
) -> None:
    """Print how a model runs on a device; exit status 1 when it does not fit."""
    cards = load_cards(Settings.load().cards_dir)
    card = find_card(model, cards)
    beside = [cards[card.refiner]] if card.refiner in cards else []
    if every:
        for known in GPUS.values():
            print(f"{known.name:10} {summary(plan_of(card, _known(card, known.name), beside))}")
        return
    machine = _known(card, gpu) if gpu is not None else machine_at_hand(card)
    made = plan_of(card, machine, beside)
    for line in table(made, machine):
        print(line)
    if made.refusal is not None:
        raise typer.Exit(1)


def machine_at_hand(card: ModelCard) -> Machine:
    """The device that a replica of this card would have here, asked in a child process: torch is large.

    Raises ModelUnavailable when that fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "deployments.models.this_machine", str(card.serving.num_gpus)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=THIS_MACHINE_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelUnavailable(f"the device cannot be asked ({last}); name one with --gpu")
    return _limited(_machine(json.loads(done.stdout.splitlines()[-1])), card)


def table(made: Plan, machine: Machine) -> list[str]:
    """The plan in lines: the device, each part, the bytes together, and what changes pictures or speed."""
    there = "no limit" if machine.limit_bytes is None else f"{machine.limit_bytes / GIB:.1f} GiB"
    lines = [f"{machine.name}: {there} for one replica"]
    if made.refusal is not None:
        return [*lines, f"refused: {made.refusal.message}"]
    if made.planned is None:
        return [*lines, f"{summary(made)}, in {made.dtype}; bytes are not known or not limited"]
    lines.append(f"{'part':18} {'dtype':9} {'weights':12} {'place':11} {'GiB':>6} {'on device':>10}")
    for part in made.parts:
        sizes = f"{part.weight_bytes / GIB:6.2f} {part.device_bytes / GIB:10.2f}"
        form = part.quantisation or "as they are"
        lines.append(f"{part.name:18} {part.dtype:9} {form:12} {part.placement:11} {sizes}")
    parts = {
        "weights": made.planned.weights,
        "others": made.planned.others,
        f"{made.lora_slots} LoRAs": made.planned.loras,
        "prompts": made.planned.prompts,
        f"{made.rows} rows": made.planned.steps,
        "decoding or encoding": made.planned.auxiliary,
    }
    sums = " + ".join(f"{size / GIB:.2f} {name}" for name, size in parts.items() if size)
    lines.append(
        f"peak {made.planned.peak / GIB:.2f} GiB = {sums}; {made.host_bytes / GIB:.2f} GiB on the host"
    )
    return [*lines, *(f"- {note}" for note in made.notes)]


def _known(card: ModelCard, name: str) -> Machine:
    """A machine with this GPU. Raises BadRequest for a name that is not known."""
    if name not in GPUS:
        raise BadRequest(f"there is no GPU {name!r} in the table; there is {', '.join(GPUS)}")
    return _limited(GPUS[name].machine(card.serving.num_gpus), card)


def _limited(machine: Machine, card: ModelCard) -> Machine:
    """With no more memory than the card allows."""
    if card.serving.memory_gib is None:
        return machine
    most = int(card.serving.memory_gib * GIB)
    limit = most if machine.limit_bytes is None else min(most, machine.limit_bytes)
    return replace(machine, limit_bytes=limit)


def _machine(facts: Mapping[str, Any]) -> Machine:
    capability = facts["capability"]
    return Machine(**{**facts, "capability": None if capability is None else tuple(capability)})
