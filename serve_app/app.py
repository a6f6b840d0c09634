"""The composition root: binds the serving layer and the models into Serve applications.

`build` makes one application of everything. `build_gateway` and `build_model` make one of the serving layer
and one for each model, so that models can be added and removed one at a time.
"""

# no `from __future__ import annotations`: Serve reads the type of a builder's argument to validate it
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.encoder import VideoEncoder
from deployments.protocol.card import ModelCard, Serving
from deployments.protocol.errors import BadRequest, NotFound
from deployments.protocol.installation import AS_THE_NODE_SAYS, Installation
from deployments.replica import ModelReplica
from deployments.weights_prefetcher import WeightsPrefetcher
from serve_app.card_settings import card_notices, known_cards
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
from serve_app.ray_serve.served_models import others_run
from serve_app.ray_serve.shutdown_hook import on_stop
from serve_app.ray_serve.spot_nodes import drain_this_node
from serve_app.setting_values import ignored_variables
from serve_app.settings import Settings
from serve_app.signing import TEST_NOTICE, signing_identity

logger = logging.getLogger(__name__)

ANSWER_S = 10.0  # for the answer to a call that has waited as long as it may

# hides the GPUs of the node from a replica that runs on the CPU only
NO_GPU = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}


def build(args: AppArgs) -> Application:
    """Everything in one application, with one deployment per card or group, under its name."""
    settings = Settings.load(**args.settings)
    known = known_cards(settings)
    cards = select_cards(args.models, known, settings, one_application=True)
    _log_notices(cards, known, settings)
    models = _models(cards, known, args.encoder, _lora_source(settings), _signed(settings))
    bound = list({id(model): model for model in models.values()}.values())
    fetchers = _fetchers(cards, known, settings.installation)
    return _gateway(settings, args, cards, [*bound, *fetchers])


def build_gateway(args: GatewayArgs) -> Application:
    """Ingress, dispatchers and LoRA files; it serves the applications of `build_model` whose args name it."""
    return _gateway(Settings.load(**args.settings), args, None, [])


def build_model(args: ModelArgs) -> Application:
    """One model, or one group of models that share their replicas, for a gateway.

    Raises BadRequest for more than one group: a change of one would restart the others.
    """
    settings = Settings.load(**args.settings)
    known = known_cards(settings)
    cards = select_cards(args.models, known, settings, one_application=False)
    if len(names := list(deployment_groups(cards))) > 1:
        raise BadRequest(
            f"{', '.join(names)} do not share their replicas: give each an application of its own, "
            "or their cards one serving.group"
        )
    _log_notices(cards, known, settings)
    source = _lora_source(settings, args.gateway)
    models = _models(cards, known, args.encoder, source, _signed(settings))
    return next(iter(models.values()))


def build_weights(args: WeightsArgs) -> Application:
    """Downloads the weights of these models to the GPU nodes, for a gateway whose models are applications.

    Raises BadRequest when all weights are local folders.
    """
    settings = Settings.load(**args.settings)
    known = known_cards(settings)
    cards = select_cards(args.models, known, settings, one_application=False)
    fetchers = _fetchers(cards, known, settings.installation)
    if not fetchers:
        raise BadRequest(
            "the weights of these models are all folders on the nodes: there is nothing to fetch"
        )
    return fetchers[0]


def _signed(settings: Settings) -> Installation:
    """The installation with who signs its files. Raises BadRequest for certificates that cannot be read."""
    identity = signing_identity(settings)
    if identity is not None and identity.is_test:
        logger.warning("%s", TEST_NOTICE)
    return replace(settings.installation, signing=identity)


def _log_notices(cards: Mapping[str, ModelCard], known: Mapping[str, ModelCard], settings: Settings) -> None:
    """Log what `weft serve` says at its start."""
    refiners = {card.id: card for card in _refiners(list(cards.values()), known).values()}
    for notice in (*ignored_variables(Settings.model_fields), *card_notices({**cards, **refiners}, settings)):
        logger.warning("%s", notice)


def _gateway(
    settings: Settings,
    args: GatewayScaling,
    cards: Mapping[str, ModelCard] | None,
    models: Sequence[Application],
) -> Application:
    """The serving layer for `models`, which serve `cards`; None: for all applications that name it."""
    lora_files = serve.deployment(
        name=LORA_FILES,  # one replica, because it also removes unused files
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
        max_ongoing_requests=1000,  # Serve's default is 5; most of our requests wait for events
        graceful_shutdown_timeout_s=settings.sync_wait_s + ANSWER_S,  # calls that wait for a job are answered
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0, "runtime_env": NO_GPU},
    )(Ingress).bind(settings, cards, [lora_files, dispatcher, *models])


def _lora_source(settings: Settings, gateway: str | None = None) -> dict[str, Any]:
    """Arguments of a replica with LoRAs. gateway: the application with their files; None: the model's."""
    return {
        "lora_files": LoraFileClient(gateway),
        "lora_folder": str(settings.adapter_cache),
    }


def _models(
    cards: Mapping[str, ModelCard],
    known: Mapping[str, ModelCard],
    encoder_args: EncoderArgs | None = None,
    lora_files: Mapping[str, Any] | None = None,
    installation: Installation = AS_THE_NODE_SAYS,
) -> dict[str, Application]:
    """By card id, the deployment that serves it; cards of one group have the same.

    Deployments of video models share one encoder. A deployment with `serving.lora: dedicated` gets a second
    one for its requests with LoRAs.  lora_files: see _lora_source.
    """
    encoder = _encoder(encoder_args or EncoderArgs())
    routes = routes_of(cards, "")
    files = lora_files or {}
    common = {
        "others_serve": others_run,
        "installation": installation,
        "drain_node": drain_this_node,
    }
    models: dict[str, Application] = {}
    for name, members in deployment_groups(cards).items():
        refiners, serving = _refiners(members, known), members[0].serving
        loras = routes[members[0].id].loras
        deployment = _deployment(name, serving)
        if makes_videos(members):
            model = deployment(ModelReplica).bind(
                members, refiners, on_stop, encoder=encoder, **common, **files
            )
        elif loras is None:
            model = deployment(ModelReplica).bind(members, refiners, on_stop, **common)
        elif loras == name:
            model = deployment(ModelReplica).bind(members, refiners, on_stop, **common, **files)
        else:
            pool = _deployment(loras, _lora_pool_serving(serving))(ModelReplica).bind(
                members, refiners, on_stop, **common, **files
            )
            model = deployment(ModelReplica).bind(members, refiners, on_stop, lora_pool=pool, **common)
        models |= dict.fromkeys([card.id for card in members], model)
    return models


def _lora_pool_serving(serving: Serving) -> Serving:
    """The values of `serving` for the deployment that serves a model's requests with LoRAs."""
    minimum = serving.lora_min_replicas
    return serving if minimum is None else serving.model_copy(update={"min_replicas": minimum})


def _fetchers(
    cards: Mapping[str, ModelCard],
    known: Mapping[str, ModelCard],
    installation: Installation = AS_THE_NODE_SAYS,
) -> list[Application]:
    """The deployment that downloads remote weights to the nodes; none when all weights are local."""
    wanted = [card for card in cards.values() if card.serving.prefetch]
    wanted += _refiners(wanted, known).values()
    if not any(weights.needs_fetch for card in wanted for weights in card.all_weights):
        return []
    fetcher = serve.deployment(
        name="WeightsFetcher",
        ray_actor_options={"num_cpus": 0, "runtime_env": NO_GPU},
        graceful_shutdown_wait_loop_s=0.1,
    )(WeightsPrefetcher)
    return [fetcher.bind(wanted, installation)]


def _refiners(cards: list[ModelCard], known: Mapping[str, ModelCard]) -> dict[str, ModelCard]:
    return {card.id: refiner for card in cards if (refiner := _refiner(card, known))}


def _refiner(card: ModelCard, known: Mapping[str, ModelCard]) -> ModelCard | None:
    """The card of the model that refines the images of this one; None for none. Raises NotFound."""
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
            "target_ongoing_requests": 2.0,  # segments: one is encoded while the next arrives
            "upscale_delay_s": 0.0,
        },
        max_ongoing_requests=4,
        health_check_period_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
    )(VideoEncoder).bind(args.threads)


def _deployment(name: str, serving: Serving) -> Any:
    """A deployment with these resources, to be called with its class.

    A Serve config file may override all of it under `name`.
    """
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
            # for config files that select Ray's own policy: its default of 2 starts too many replicas at once
            "target_ongoing_requests": max(1.0, 0.8 * serving.slots),
            # the policy itself decides when to wait
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "policy": policy,
        },
        # includes the surplus that autoscaling counts, and handle calls of Ray jobs
        max_ongoing_requests=2 * serving.slots,
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=60.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
