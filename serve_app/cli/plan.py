"""`weft plan`: how a model runs on a device, and how much memory it needs there."""

from __future__ import annotations

from typing import Annotated

import typer

from deployments.planning.device_limit import GIB
from deployments.planning.file_needs import with_needs
from deployments.planning.gpus import GPUS
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.planning.profile import profile_key, read_profile
from deployments.planning.summary import summary
from deployments.protocol.card import ModelCard
from serve_app.admission.validation import find_card
from serve_app.card_settings import known_cards
from serve_app.cli.planned_machines import known_machine, machine_at_hand
from serve_app.settings import Settings

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
    settings = Settings.load()
    cards = known_cards(settings)
    card = with_needs(find_card(model, cards))
    beside = [cards[card.refiner]] if card.refiner in cards else []
    if every:
        for known in GPUS.values():
            print(f"{known.name:10} {summary(plan_of(card, known_machine(card, known.name), beside))}")
        return
    machine = known_machine(card, gpu) if gpu is not None else machine_at_hand(card, settings.model_device)
    made = plan_of(card, machine, beside)
    for line in [*table(made, machine), *measured(card, made, machine)]:
        print(line)
    if made.refusal is not None:
        raise typer.Exit(1)


def measured(card: ModelCard, made: Plan, machine: Machine) -> list[str]:
    """What `weft bench` measured of this model so planned, on such a device with the versions here."""
    profile = None if made.refusal else read_profile(card.weights, profile_key(card, made, machine))
    if profile is None:
        return []
    best, alone = profile.best_rows, min(profile.step_s)
    picture_s = profile.encode_s + card.steps.default * profile.step_s[alone] + profile.decode_s
    return [
        f"measured by weft bench at {profile.width}x{profile.height}: a step takes "
        f"{profile.step_s[alone]:.3g} s with {alone} rows, {profile.step_s[best]:.3g} s with {best}, which "
        f"gives most rows per second; a picture alone about {picture_s:.3g} s "
        f"({card.steps.default} steps, prompt {profile.encode_s:.3g} s, decoding {profile.decode_s:.3g} s)"
    ]


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
        form = part.form or "as they are"
        lines.append(f"{part.name:18} {part.dtype:9} {form:12} {part.placement:11} {sizes}")
    parts = {
        "weights": made.planned.weights,
        "others": made.planned.others,
        f"{made.lora_slots} LoRAs": made.planned.loras,
        "prompts": made.planned.prompts,
        f"{made.rows} rows": made.planned.steps,
        "decoding or encoding": made.planned.auxiliary,
        "weights of a layer in floats": made.planned.dequantisation,
    }
    sums = " + ".join(f"{size / GIB:.2f} {name}" for name, size in parts.items() if size)
    lines.append(
        f"peak {made.planned.peak / GIB:.2f} GiB = {sums}; {made.host_bytes / GIB:.2f} GiB on the host"
    )
    return [*lines, *(f"- {note}" for note in made.notes)]
