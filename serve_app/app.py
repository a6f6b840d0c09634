"""The roof: binds both floors. `build` makes one Serve application of everything; `build_gateway` and
`build_model` make one of the front floor and one for each model, which come and go by themselves."""

# no `from __future__ import annotations`: Serve reads the type of a builder's argument to validate it
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.encoder import VideoEncoder
from deployments.lora import LoraReplica
from deployments.protocol.card import ModelCard, Serving, load_cards
from deployments.protocol.errors import BadRequest, NotFound
from deployments.replica import ModelReplica
from deployments.video import VideoReplica
from deployments.weights_prefetcher import WeightsPrefetcher
from serve_app.ray_serve.args import (
    AppArgs,
    EncoderArgs,
    GatewayArgs,
    GatewayScaling,
    ModelArgs,
    WeightsArgs,
    select_cards,
)
from serve_app.ray_serve.autoscaling import autoscaling_policy
from serve_app.ray_serve.dispatcher import DispatcherReplica
from serve_app.ray_serve.ingress import Ingress
from serve_app.ray_serve.lora_files import LORA_FILES, LoraFileClient, LoraFilesReplica
from serve_app.ray_serve.routing import deployment_groups, makes_videos, routes_of
from serve_app.ray_serve.shutdown_hook import on_stop
from serve_app.settings import Settings

# what a CPU-only replica may see of the node's GPUs: nothing
NO_GPU = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}


def build(args: AppArgs) -> Application:
    """Everything in one application: a deployment per card or group, named as it."""
    settings = Settings.load(**args.settings)
    known = load_cards(settings.cards_dir)
    cards = select_cards(args.models, known, settings.cards_dir)
    models = _models(cards, known, args.encoder, _lora_source(settings))
    bound = list({id(model): model for model in models.values()}.values())
    return _gateway(settings, args, cards, [*bound, *_fetchers(cards, known)])


def build_gateway(args: GatewayArgs) -> Application:
    """Ingress, dispatchers and LoRA files. Its models are the applications of `build_model` that name it."""
    return _gateway(Settings.load(**args.settings), args, None, [])


def build_model(args: ModelArgs) -> Application:
    """One model, or one group of models that share their replicas, for a gateway.

    Raises BadRequest for several: changing one would restart the others.
    """
    settings = Settings.load(**args.settings)
    known = load_cards(settings.cards_dir)
    cards = select_cards(args.models, known, settings.cards_dir)
    if len(names := list(deployment_groups(cards))) > 1:
        raise BadRequest(
            f"{', '.join(names)} do not share their replicas: give each an application of its own, "
            "or their cards one serving.group"
        )
    models = _models(cards, known, args.encoder, _lora_source(settings, args.gateway))
    return next(iter(models.values()))


def build_weights(args: WeightsArgs) -> Application:
    """For fleets, whose models are applications of their own: brings the weights of all these to GPU nodes.

    Raises BadRequest when all of them are near already.
    """
    settings = Settings.load(**args.settings)
    known = load_cards(settings.cards_dir)
    fetchers = _fetchers(select_cards(args.models, known, settings.cards_dir), known)
    if not fetchers:
        raise BadRequest("the weights of these models are all folders on the nodes: nothing is to be fetched")
    return fetchers[0]


def _gateway(
    settings: Settings,
    args: GatewayScaling,
    cards: Mapping[str, ModelCard] | None,
    models: Sequence[Application],
) -> Application:
    """The front floor over `models`, which serve `cards`; None: over whatever applications there are."""
    adapters = serve.deployment(
        name=LORA_FILES,  # one replica: it also clears away what nobody needs
        ray_actor_options={"num_cpus": 0, "runtime_env": NO_GPU},
        max_ongoing_requests=16,
        graceful_shutdown_wait_loop_s=0.1,
    )(LoraFilesReplica).bind(settings, cards)
    dispatcher = serve.deployment(
        name="Dispatcher",
        num_replicas=args.dispatchers,
        ray_actor_options={"num_cpus": 0, "runtime_env": NO_GPU},
        graceful_shutdown_timeout_s=20.0,
        graceful_shutdown_wait_loop_s=0.1,
    )(DispatcherReplica).bind(settings, cards, args.dispatchers)
    return serve.deployment(
        name="Ingress",
        num_replicas=args.ingresses,
        max_ongoing_requests=1000,  # Serve's default is 5; most of ours wait for events
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0, "runtime_env": NO_GPU},
    )(Ingress).bind(settings, cards, [adapters, dispatcher, *models])


def _lora_source(settings: Settings, gateway: str | None = None) -> dict[str, Any]:
    """What tells a ModelReplica where LoRAs come from. gateway: the application; None: the model's own."""
    return {
        "fetch_adapter": LoraFileClient(gateway),
        "adapter_folder": str(settings.adapter_cache),
    }


def _models(
    cards: Mapping[str, ModelCard],
    known: Mapping[str, ModelCard],
    encoder_args: EncoderArgs | None = None,
    lora_files: Mapping[str, Any] | None = None,
) -> dict[str, Application]:
    """One deployment per card, or per group of cards that share their replicas; by card id. Those that make
    videos share the encoder; one for requests with LoRAs may stand beside. lora_files: see _lora_files."""
    encoder = _encoder(encoder_args or EncoderArgs())
    routes = routes_of(cards, "")
    files = lora_files or {}
    models: dict[str, Application] = {}
    for name, members in deployment_groups(cards).items():
        refiners, serving = _refiners(members, known), members[0].serving
        loras = routes[members[0].id].loras
        deployment = _deployment(name, serving)
        if makes_videos(members):
            model = deployment(VideoReplica).bind(members, encoder, refiners, on_stop, **files)
        elif loras is None:
            model = deployment(ModelReplica).bind(members, refiners, on_stop)
        elif loras == name:
            model = deployment(LoraReplica).bind(members, refiners, on_stop, **files)
        else:
            pool = _deployment(loras, _lora_pool_serving(serving))(LoraReplica).bind(
                members, refiners, on_stop, **files
            )
            model = deployment(ModelReplica).bind(members, refiners, on_stop, lora_pool=pool)
        models |= dict.fromkeys([card.id for card in members], model)
    return models


def _lora_pool_serving(serving: Serving) -> Serving:
    """Of the deployment for requests with LoRAs."""
    minimum = serving.lora_min_replicas
    return serving if minimum is None else serving.model_copy(update={"min_replicas": minimum})


def _fetchers(cards: Mapping[str, ModelCard], known: Mapping[str, ModelCard]) -> list[Application]:
    """What has far weights brought to the nodes; none where all weights are near."""
    wanted = [card for card in cards.values() if card.serving.prefetch]
    wanted += _refiners(wanted, known).values()
    if not any(weights.is_remote for card in wanted for weights in card.all_weights):
        return []
    fetcher = serve.deployment(
        name="WeightsFetcher",
        ray_actor_options={"num_cpus": 0, "runtime_env": NO_GPU},
        graceful_shutdown_wait_loop_s=0.1,
    )(WeightsPrefetcher)
    return [fetcher.bind(wanted)]


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


def _deployment(name: str, serving: Serving) -> Any:
    """A deployment of a model with these resources, still without its class. serve_config.yaml may override
    all of it under `name`."""
    resources: dict[str, Any] = {"num_cpus": serving.num_cpus, "num_gpus": serving.num_gpus}
    if serving.accelerator_type is not None:
        resources["accelerator_type"] = serving.accelerator_type
    if not serving.num_gpus:
        resources["runtime_env"] = NO_GPU
    try:
        policy = autoscaling_policy(serving.autoscaling)
    except ValueError as error:
        raise BadRequest(f"serving.autoscaling of {name!r}: {error}") from None
    return serve.deployment(
        name=name,
        ray_actor_options=resources,
        autoscaling_config={
            "min_replicas": serving.min_replicas,
            "max_replicas": serving.max_replicas,
            # for a config file that puts Ray's own policy back: its 2 answer a cold start with a crowd
            "target_ongoing_requests": max(1.0, 0.8 * serving.slots),
            # the policy waits where waiting is good
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "policy": policy,
        },
        # room for the surplus that the autoscaler shall see, and for handle calls of Ray jobs
        max_ongoing_requests=2 * serving.slots,
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=60.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
