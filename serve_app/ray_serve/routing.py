"""Which cards are served, and by which deployment of which Serve application."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError

from deployments.protocol.card import ModelCard, load_cards
from deployments.protocol.errors import BadRequest, WeftError
from serve_app.ray_serve.args import ModelArgs, select_cards
from serve_app.settings import Settings

MODEL_BUILDER = "serve_app.app:build_model"
LORA_PREFIX = "lora-"  # of the deployment beside a model that serves its requests with LoRAs
SETTLED_STATES = ("RUNNING", "UNHEALTHY")  # states of an application that is as its args say

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """Where the requests for one card go."""

    card: ModelCard
    application: str
    deployment: str
    loras: str | None  # deployment that takes requests with LoRAs; None: it takes none
    routed_by_lora: bool  # whether Serve shall look for a replica of it that holds the LoRA


@dataclass(frozen=True, slots=True)
class ReplicaPool:
    """A deployment's replicas."""

    status: str = ""
    running: int = 0
    limit: int | None = None  # how many there may be; None: not known


@dataclass(frozen=True, slots=True)
class RunningApplication:
    """A Serve application, as far as it matters here."""

    import_path: str = ""  # empty: it is going away, or was not deployed from a config
    args: Mapping[str, Any] = field(default_factory=dict)
    status: str = ""
    deployed_at: float = 0.0  # Unix time
    deployments: Mapping[str, ReplicaPool] = field(default_factory=dict)


class RouteTable(Protocol):
    """What a service serves."""

    routes: Mapping[str, ModelRoute]  # by card id
    dynamic: bool  # whether `update` may change them

    def update(self, applications: Mapping[str, RunningApplication]) -> None:
        """Take in what runs now, by name."""


def deployment_groups(cards: Mapping[str, ModelCard]) -> dict[str, list[ModelCard]]:
    """Cards that share their replicas, by the name of their deployment."""
    found: dict[str, list[ModelCard]] = {}
    for card in cards.values():
        found.setdefault(card.serving.group or card.id, []).append(card)
    return found


def makes_videos(cards: list[ModelCard]) -> bool:
    return any(card.videos is not None for card in cards)


def routes_of(cards: Mapping[str, ModelCard], application: str) -> dict[str, ModelRoute]:
    """Where each of these cards is served, in their order. Raises BadRequest where two names clash."""
    shared = deployment_groups(cards)
    routes: dict[str, ModelRoute] = {}
    for name, members in shared.items():
        if name in cards and len(members) > 1 and cards[name].serving.group != name:
            raise BadRequest(f"the group {name!r} is called as another card; give it another name")
        loras = _lora_deployment(name, members)
        if loras != name and loras in shared:
            raise BadRequest(
                f"{loras!r} is the deployment for the LoRAs of {name!r}; give that card another id"
            )
        routed = loras is not None and not makes_videos(members)
        routes |= {card.id: ModelRoute(card, application, name, loras, routed) for card in members}
    return {card_id: routes[card_id] for card_id in cards}


def _lora_deployment(name: str, members: list[ModelCard]) -> str | None:
    match members[0].serving.lora:
        case "none":
            return None
        case "dedicated" if not makes_videos(members):  # video models take LoRAs like all other requests
            return f"{LORA_PREFIX}{name}"
        case _:
            return name


class SingleApplicationRoutes:
    """The models of our own application: the same until it is deployed anew."""

    dynamic = False

    def __init__(self, cards: Mapping[str, ModelCard], application: str) -> None:
        self.routes: Mapping[str, ModelRoute] = routes_of(cards, application)

    def update(self, applications: Mapping[str, RunningApplication]) -> None:
        """Nothing of it concerns us."""


class FleetRoutes:
    """The models of all applications that name `gateway` as theirs, as they come and go.

    While an application is being changed, what it served before and will serve after is served. Of two that
    serve the same card, the first by name does.
    """

    dynamic = True

    def __init__(self, gateway: str) -> None:
        self.routes: Mapping[str, ModelRoute] = {}
        self._gateway = gateway
        self._warned: set[str] = set()  # warnings, each once
        # by application: deployed at, routes
        self._wanted: dict[str, tuple[float, dict[str, ModelRoute]]] = {}
        self._known: dict[str, dict[str, ModelRoute]] = {}  # by application, as last seen

    def update(self, applications: Mapping[str, RunningApplication]) -> None:
        """Take in what runs now, by name."""
        ours = {name: app for name, app in sorted(applications.items()) if app.import_path == MODEL_BUILDER}
        self._wanted = {name: wanted for name, wanted in self._wanted.items() if name in ours}
        self._known = {name: self._routes_of(name, application) for name, application in ours.items()}
        routes: dict[str, ModelRoute] = {}
        for name, known in self._known.items():
            for model, route in known.items():
                if routes.setdefault(model, route) is not route:
                    self._warn(
                        f"{model} is served by {routes[model].application} and by {name}; the first does"
                    )
        self.routes = routes

    def _routes_of(self, name: str, application: RunningApplication) -> dict[str, ModelRoute]:
        known = self._known.get(name)
        try:
            wanted = self._read(name, application)
        except (ValidationError, WeftError) as error:  # Serve has refused it and keeps what ran
            self._warn(f"the args of the application {name} are not valid: {error}")
            return known or {}
        if application.status in SETTLED_STATES:
            return wanted
        if known:
            return {model: route for model, route in known.items() if model in wanted}
        there = application.deployments
        return {model: route for model, route in wanted.items() if route.deployment in there}

    def _read(self, name: str, application: RunningApplication) -> dict[str, ModelRoute]:
        """What its args ask for. Cards are read anew whenever it is deployed anew."""
        read = self._wanted.get(name)
        if read is not None and read[0] == application.deployed_at:
            return read[1]
        args = ModelArgs.model_validate(application.args)
        routes: dict[str, ModelRoute] = {}
        if args.gateway == self._gateway:
            cards_dir = Settings.load(**args.settings).cards_dir
            cards = select_cards(args.models, load_cards(cards_dir), cards_dir)
            routes = routes_of(cards, name)
        self._wanted[name] = application.deployed_at, routes
        return routes

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)


class ServedCards(Mapping[str, ModelCard]):
    """The cards that are served, by id, as they come and go."""

    def __init__(self, served: RouteTable) -> None:
        self._served = served

    def __getitem__(self, model: str) -> ModelCard:
        return self._served.routes[model].card

    def __iter__(self) -> Iterator[str]:
        return iter(self._served.routes)

    def __len__(self) -> int:
        return len(self._served.routes)
