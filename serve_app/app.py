"""The roof: binds both floors into one Serve application. `import_path: serve_app.app:build`."""

# no `from __future__ import annotations`: Serve reads the type of build()'s argument to validate it
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments.encoder import VideoEncoder
from deployments.image import ImageModel
from deployments.lora import LoraImageModel
from deployments.protocol.card import ModelCard, Serving, Weights, card_without_file, load_cards
from deployments.protocol.errors import BadRequest, NotFound
from deployments.video import VideoModel
from serve_app.adapter_files import AdapterFilesByHandle, AdaptersReplica
from serve_app.dispatcher import DispatcherReplica
from serve_app.ingress import Ingress
from serve_app.settings import Settings
from serve_app.stopping import on_stop

# what a CPU-only replica may see of the node's GPUs: nothing
LORA_PREFIX = "lora-"  # of the deployment beside a model that serves its requests with LoRAs
NO_GPU = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}


class ModelWithoutCard(BaseModel):
    """Weights served under a name of their own; only FLUX variants may lack a card (they run as schnell)."""

    model_config = ConfigDict(extra="forbid")

    id: str
    weights: Weights


class EncoderArgs(BaseModel):
    """The deployment that turns frames into video files; there is one when a model makes videos."""

    model_config = ConfigDict(extra="forbid")

    threads: int = Field(2, ge=1, description="Of one video's encoding.")
    num_cpus: float = Field(0, ge=0, description="That a replica claims of Ray. 0: it fits everywhere.")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)


class AppArgs(BaseModel):
    """`args` of the application in serve_config.yaml. An unknown key stops the deployment."""

    model_config = ConfigDict(extra="forbid")

    models: list[str | ModelWithoutCard] = Field(min_length=1, description="Card ids, or weights by name.")
    ingresses: int = Field(1, ge=1, description="Replicas that answer HTTP.")
    dispatchers: int = Field(1, ge=1, description="Replicas that carry jobs to models.")
    encoder: EncoderArgs = EncoderArgs()
    settings: dict[str, Any] = Field({}, description="Values of serve_app/settings.py; no secrets.")


def build(args: AppArgs) -> Application:
    """One graph: ingress and dispatcher over one ImageModel deployment per card, named as the card."""
    settings = Settings.load(**args.settings)
    known = load_cards(settings.cards_dir)
    cards = _chosen_cards(args, known, settings.cards_dir)
    adapters = _adapters(settings, cards)
    lora_files = {
        "fetch_adapter": AdapterFilesByHandle(cast("DeploymentHandle[Any]", adapters)),  # Serve puts it there
        "adapter_folder": str(settings.adapter_cache),
    }
    models = _models(cards, known, args.encoder, lora_files)
    loras = _loras(cards, known, models, lora_files)
    dispatcher = serve.deployment(
        name="Dispatcher",
        num_replicas=args.dispatchers,
        ray_actor_options={"num_cpus": 0, "runtime_env": NO_GPU},
        graceful_shutdown_timeout_s=20.0,
        graceful_shutdown_wait_loop_s=0.1,
    )(DispatcherReplica).bind(settings, cards, models, loras, args.dispatchers)
    return serve.deployment(
        name="Ingress",
        num_replicas=args.ingresses,
        max_ongoing_requests=1000,  # Serve's default is 5; most of ours wait for events
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0, "runtime_env": NO_GPU},
    )(Ingress).bind(settings, cards, models, loras, adapters, dispatcher)


def _chosen_cards(args: AppArgs, known: Mapping[str, ModelCard], cards_dir: Path) -> dict[str, ModelCard]:
    """The cards of `args.models`, by id. Raises NotFound naming the cards there are."""
    chosen: dict[str, ModelCard] = {}
    for model in args.models:
        if isinstance(model, ModelWithoutCard):
            card = card_without_file(model.id, model.weights)
        elif model in known:
            card = known[model]
        else:
            raise NotFound(f"there is no card {model!r} in {cards_dir}; there is {', '.join(known)}")
        chosen[card.id] = card
    return chosen


def _models(
    cards: Mapping[str, ModelCard],
    known: Mapping[str, ModelCard],
    encoder_args: EncoderArgs | None = None,
    lora_files: Mapping[str, Any] | None = None,
) -> dict[str, Application]:
    """One deployment per card, or per group of cards that share their replicas; by card id. Those that make
    videos share the encoder. lora_files: what tells an ImageModel where adapters come from."""
    encoder = _encoder(encoder_args or EncoderArgs())
    models: dict[str, Application] = {}
    for name, members in _groups(cards).items():
        if name in cards and len(members) > 1 and cards[name].serving.group != name:
            raise BadRequest(f"the group {name!r} is called as another card; give it another name")
        refiners = _refiners(members, known)
        deployment = _deployment(name, members[0].serving)
        lora = members[0].serving.lora
        if _makes_videos(members):
            model = deployment(VideoModel).bind(members, encoder, refiners, on_stop, **(lora_files or {}))
        elif lora == "shared":
            model = deployment(LoraImageModel).bind(members, refiners, on_stop, **(lora_files or {}))
        else:
            model = deployment(ImageModel).bind(members, refiners, on_stop)
        models |= dict.fromkeys([card.id for card in members], model)
    return models


def _loras(
    cards: Mapping[str, ModelCard],
    known: Mapping[str, ModelCard],
    models: Mapping[str, Application],
    lora_files: Mapping[str, Any],
) -> dict[str, Application]:
    """Where requests with LoRAs go, by card id: the model's own deployment, or one beside it whose replicas
    are routed to by the adapters they hold. Video models take them like all other requests."""
    loras: dict[str, Application] = {}
    for group, members in _groups(cards).items():
        lora, name = members[0].serving.lora, f"{LORA_PREFIX}{group}"
        if lora == "none" or _makes_videos(members):
            continue
        if lora == "shared":
            loras |= {card.id: models[card.id] for card in members}
            continue
        if name in _groups(cards):
            raise BadRequest(
                f"{name!r} is the deployment for the LoRAs of {group!r}; give that card another id"
            )
        bound = _deployment(name, members[0].serving)(LoraImageModel).bind(
            members, _refiners(members, known), on_stop, **lora_files
        )
        loras |= dict.fromkeys([card.id for card in members], bound)
    return loras


def _groups(cards: Mapping[str, ModelCard]) -> dict[str, list[ModelCard]]:
    """Cards that share their replicas, by the name of their deployment."""
    groups: dict[str, list[ModelCard]] = {}
    for card in cards.values():
        groups.setdefault(card.serving.group or card.id, []).append(card)
    return groups


def _makes_videos(cards: list[ModelCard]) -> bool:
    return any(card.videos is not None for card in cards)


def _refiners(cards: list[ModelCard], known: Mapping[str, ModelCard]) -> dict[str, ModelCard]:
    return {card.id: refiner for card in cards if (refiner := _refiner(card, known))}


def _refiner(card: ModelCard, known: Mapping[str, ModelCard]) -> ModelCard | None:
    """The card of the model that refines this one's pictures. Raises NotFound where there is none."""
    if card.refiner is None:
        return None
    if card.refiner not in known:
        raise NotFound(f"{card.id} names the refiner {card.refiner!r}, which has no card")
    return known[card.refiner]


def _encoder(args: EncoderArgs) -> Application:
    return serve.deployment(
        name="VideoEncoder",
        ray_actor_options={"num_cpus": args.num_cpus, "runtime_env": NO_GPU},
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": 2.0,  # segments: one is encoded, one is on its way
            "upscale_delay_s": 0.0,
        },
        max_ongoing_requests=4,
        health_check_period_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
    )(VideoEncoder).bind(args.threads)


def _adapters(settings: Settings, cards: Mapping[str, ModelCard]) -> Application:
    """Hands LoRA files to replicas. One replica: it also clears away what nobody needs."""
    named = sorted(
        {
            f"{LORA_PREFIX}{name}" if members[0].serving.lora == "dedicated" else name
            for name, members in _groups(cards).items()
            if members[0].serving.lora != "none" and not _makes_videos(members)
        }
    )
    return serve.deployment(
        name="Adapters",
        ray_actor_options={"num_cpus": 0, "runtime_env": NO_GPU},
        max_ongoing_requests=16,
        graceful_shutdown_wait_loop_s=0.1,
    )(AdaptersReplica).bind(settings, cards, named)


def _deployment(name: str, serving: Serving) -> Any:
    """A deployment of a model with these resources, still without its class. serve_config.yaml may override
    all of it under `name`."""
    resources: dict[str, Any] = {"num_cpus": serving.num_cpus, "num_gpus": serving.num_gpus}
    if serving.accelerator_type is not None:
        resources["accelerator_type"] = serving.accelerator_type
    if not serving.num_gpus:
        resources["runtime_env"] = NO_GPU
    return serve.deployment(
        name=name,
        ray_actor_options=resources,
        autoscaling_config={
            "min_replicas": serving.min_replicas,
            "max_replicas": serving.max_replicas,
            # Ray's defaults (2 per replica, 30 s up, 600 s down) answer a cold start with a crowd
            "target_ongoing_requests": max(1.0, 0.8 * serving.slots),
            "upscale_delay_s": 0.0,
        },
        # room for the surplus that the autoscaler shall see, and for handle calls of Ray jobs
        max_ongoing_requests=2 * serving.slots,
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=60.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
