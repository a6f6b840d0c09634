"""What `weft doctor` finds of the served models: whether and how each fits the device that it runs on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from deployments.planning.file_needs import with_needs
from deployments.planning.gpus import ACCELERATORS
from deployments.planning.machine import Machine
from deployments.planning.plan import Plan, plan_of
from deployments.planning.summary import summary
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import WeftError
from serve_app.cli.findings import Finding, Level
from serve_app.cli.planned_machines import known_machine, machine_at_hand

SLOW = ("streamed", "sequential")  # weights that are copied again and again


def plan_findings(cards: Mapping[str, ModelCard], model_device: str | None = None) -> Iterator[Finding]:
    """One for each model that is served, with its plan.

    cards: by id, with their refiners. model_device: the setting MODEL_DEVICE.
    """
    at_hand: dict[tuple[float, float | None], Machine | WeftError] = {}
    for card in cards.values():
        serving = card.serving
        wanted = serving.accelerator_type
        if serving.num_gpus and wanted is not None:
            yield _of_accelerator(card, wanted, cards)
        elif not serving.num_gpus and (sys.platform != "darwin" or model_device == "cpu"):
            yield _planned(card, known_machine(card, "cpu"), cards)
        else:
            key = (serving.num_gpus, serving.memory_gib)
            if key not in at_hand:
                at_hand[key] = _asked(card, model_device)
            yield _at_hand(card, at_hand[key], cards)


def _asked(card: ModelCard, model_device: str | None) -> Machine | WeftError:
    """The device here as a replica finds it: the service that is checked may have all its memory now."""
    try:
        return machine_at_hand(card, model_device, alone=True)
    except WeftError as error:
        return error


def _at_hand(card: ModelCard, machine: Machine | WeftError, cards: Mapping[str, ModelCard]) -> Finding:
    if isinstance(machine, WeftError):
        return Finding(Level.warn, f"{card.id}: {machine.message}")
    if card.serving.num_gpus and not machine.is_gpu:
        return Finding(
            Level.warn,
            f"{card.id} asks for a GPU, and this machine has none that Ray counts: it starts when a node "
            "with one joins; on this machine alone set MODEL_DEVICE to cpu or mps",
        )
    return _planned(card, machine, cards)


def _of_accelerator(card: ModelCard, accelerator: str, cards: Mapping[str, ModelCard]) -> Finding:
    """Of a model that runs on nodes with this GPU, which need not be this machine."""
    if accelerator not in ACCELERATORS:
        return Finding(
            Level.ok, f"{card.id} runs on nodes with {accelerator}; weft plan {card.id} says there how"
        )
    return _planned(card, known_machine(card, ACCELERATORS[accelerator]), cards)


def _planned(card: ModelCard, machine: Machine, cards: Mapping[str, ModelCard]) -> Finding:
    refiner = None if card.refiner is None else cards.get(card.refiner)
    plan = plan_of(with_needs(card), machine, [] if refiner is None else [refiner])
    if plan.refusal is not None:
        return Finding(Level.fail, plan.refusal.message)
    text = f"{card.id} on {machine.name}: {summary(plan)}"
    if slow := _slow_parts(plan):
        return Finding(
            Level.warn, f"{text}; weights of {slow} are copied again and again: a larger GPU is faster"
        )
    return Finding(Level.ok, text)


def _slow_parts(plan: Plan) -> str:
    return ", ".join(part.name for part in plan.parts if part.placement in SLOW)
