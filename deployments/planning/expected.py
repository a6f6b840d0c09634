"""How a model would run before a replica of it has started, where its card says on which device."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.planning.file_needs import with_needs
from deployments.planning.gpus import ACCELERATORS, machine_of_replica
from deployments.planning.plan import plan_of
from deployments.planning.report import report
from deployments.protocol.card import ModelCard


def expected_plan(card: ModelCard, cards: Mapping[str, ModelCard]) -> dict[str, object] | None:
    """The report of the plan for the device that the card names; None: it names none.

    cards: by id; among them is its refiner, if there is one.
    """
    wanted = card.serving.accelerator_type
    if not card.serving.num_gpus:
        name = "cpu"
    elif wanted is not None and wanted in ACCELERATORS:
        name = ACCELERATORS[wanted]
    else:
        return None
    machine = machine_of_replica(card, name)
    refiner = None if card.refiner is None else cards.get(card.refiner)
    plan = plan_of(with_needs(card), machine, [] if refiner is None else [refiner])
    return report(plan, machine.name, loaded=False)
