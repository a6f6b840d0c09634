"""Routes: which deployment of which Serve application serves a card."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, WeftError
from serve_app.card_settings import known_cards
from serve_app.ray_serve.args import ModelArgs, select_cards
from serve_app.settings import Settings

MODEL_BUILDER = "serve_app.app:build_model"
LAST_LINES = 3
NOT_SCHEDULED = "to be scheduled"  # in what Serve says of a deployment whose replicas no node can take
LORA_PREFIX = "lora-"  # starts the name of the deployment that serves a model's requests with LoRAs
RUNNING_STATE = "RUNNING"  # of an application, as Serve names it
SETTLED_STATES = (RUNNING_STATE, "UNHEALTHY")  # of an application that was deployed as its args say

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """The deployment that serves the requests for one card."""

    card: ModelCard
    application: str
    deployment: str
    loras: str | None  # deployment for requests with LoRAs; None: the card accepts none
    routed_by_lora: bool  # whether Serve prefers a replica that holds the LoRA


@dataclass(frozen=True, slots=True)
class ReplicaPool:
    """The replicas of a deployment."""

    status: str = ""  # of the deployment, as Serve names it
    running: int = 0
    limit: int | None = None  # maximum number of replicas; None: not known
    message: str = ""  # what Serve says of the deployment, such as why no replica starts

    @property
    def state(self) -> str:
        """ready, loading, idle (scaled to zero) or error."""
        if self.running:
            return "ready"
        if self.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            return "error"
        return "idle" if self.status == "HEALTHY" else "loading"

    @property
    def lacks_resources(self) -> bool:
        """Whether no node has had what a replica needs for half a minute; one may still come."""
        return self.state == "loading" and NOT_SCHEDULED in self.message


@dataclass(frozen=True, slots=True)
class RunningApplication:
    """What a route table reads of a Serve application."""

    import_path: str = ""  # of its builder; empty: it is being deleted, or was not deployed from a config
    args: Mapping[str, Any] = field(default_factory=dict)
    status: str = ""
    deployed_at: float = 0.0  # unix seconds
    deployments: Mapping[str, ReplicaPool] = field(default_factory=dict)


def last_lines(message: str) -> str:
    """The end of what Serve says of a deployment, which is that of a traceback, on one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[-LAST_LINES:]) or "Serve does not say why"


class RouteTable(Protocol):
    """The routes of all served cards."""

    routes: Mapping[str, ModelRoute]  # by card id
    dynamic: bool  # whether `update` may change them

    def update(self, applications: Mapping[str, RunningApplication]) -> None:
        """Update `routes` from the running applications, by name."""


def deployment_groups(cards: Mapping[str, ModelCard]) -> dict[str, list[ModelCard]]:
    """By deployment name, the cards that share its replicas."""
    found: dict[str, list[ModelCard]] = {}
    for card in cards.values():
        found.setdefault(card.serving.group or card.id, []).append(card)
    return found


def makes_videos(cards: list[ModelCard]) -> bool:
    return any(card.videos is not None for card in cards)


def routes_of(cards: Mapping[str, ModelCard], application: str) -> dict[str, ModelRoute]:
    """By card id, in the order of `cards`, the route of each. Raises BadRequest when two names clash."""
    shared = deployment_groups(cards)
    routes: dict[str, ModelRoute] = {}
    for name, members in shared.items():
        if name in cards and len(members) > 1 and cards[name].serving.group != name:
            raise BadRequest(f"the group {name!r} has the name of another card; give it another name")
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
        case "dedicated" if not makes_videos(
            members
        ):  # the replicas of video models serve requests with LoRAs themselves
            return f"{LORA_PREFIX}{name}"
        case _:
            return name


class SingleApplicationRoutes:
    """The models of our own application; they never change while it runs."""

    dynamic = False

    def __init__(self, cards: Mapping[str, ModelCard], application: str) -> None:
        self.routes: Mapping[str, ModelRoute] = routes_of(cards, application)

    def update(self, _applications: Mapping[str, RunningApplication]) -> None:
        """Does nothing."""


class FleetRoutes:
    """The models of all applications whose args name `gateway`, as they come and go.

    While an application is being redeployed, only the cards in both its old and its new args are served.
    When two applications serve the same card, the first by name is used.
    """

    dynamic = True

    def __init__(self, gateway: str) -> None:
        self.routes: Mapping[str, ModelRoute] = {}
        self._gateway = gateway
        self._warned: set[str] = set()  # texts that were logged
        # by application: time of its deployment, routes that its args ask for
        self._wanted: dict[str, tuple[float, dict[str, ModelRoute]]] = {}
        self._known: dict[str, dict[str, ModelRoute]] = {}  # by application, as of the last update

    def update(self, applications: Mapping[str, RunningApplication]) -> None:
        """Update `routes` from the running applications, by name."""
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
        except (ValidationError, WeftError) as error:
            # Serve has refused these args too, and keeps the application running with the earlier ones
            self._warn(f"the args of the application {name} are not valid: {error}")
            return known or {}
        if application.status in SETTLED_STATES:
            return wanted
        if known:
            return {model: route for model, route in known.items() if model in wanted}
        running = application.deployments
        return {model: route for model, route in wanted.items() if route.deployment in running}

    def _read(self, name: str, application: RunningApplication) -> dict[str, ModelRoute]:
        """The routes that its args ask for. Cards are read again whenever it is redeployed."""
        read = self._wanted.get(name)
        if read is not None and read[0] == application.deployed_at:
            return read[1]
        args = ModelArgs.model_validate(application.args)
        routes: dict[str, ModelRoute] = {}
        if args.gateway == self._gateway:
            settings = Settings.load(**args.settings)
            cards = select_cards(args.models, known_cards(settings), settings, one_application=False)
            routes = routes_of(cards, name)
        self._wanted[name] = application.deployed_at, routes
        return routes

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)


class ServedCards(Mapping[str, ModelCard]):
    """A live view of the served cards, by id."""

    def __init__(self, served: RouteTable) -> None:
        self._served = served

    def __getitem__(self, model: str) -> ModelCard:
        return self._served.routes[model].card

    def __iter__(self) -> Iterator[str]:
        return iter(self._served.routes)

    def __len__(self) -> int:
        return len(self._served.routes)
