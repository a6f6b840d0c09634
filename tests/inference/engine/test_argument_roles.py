"""Every tensor that a denoiser of the installed diffusers takes has a role, or a reason why it has none."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

from diffusers import ModelMixin

from deployments.engine.argument_roles import _MODULE_ROLES, listed_role

HOLDS_TENSORS = re.compile("tensor|list|dict|tuple|cache|any|_empty", re.IGNORECASE)
PACKAGES = ("transformers", "unets", "controlnets")
# by class and parameter: why calls with it are left alone
WITHOUT_ROLE = {
    # the keys and values of one request; a forward for several would need one for each
    ("AnyFlowFARTransformer3DModel", "kv_cache"): "a cache of one request",
    ("AnyFlowFARTransformer3DModel", "kv_cache_flag"): "comes with kv_cache",
    ("Flux2Transformer2DModel", "kv_cache"): "a cache of one request",
    ("QwenImage21Transformer2DModel", "kv_cache"): "a cache of one request",
    ("SanaWMLTX2RefinerTransformer3DModel", "kv_cache"): "a cache of one request",
    ("WanAnimate2Transformer3DModel", "kv_cache"): "a cache of one request",
    ("WanAnimate2Transformer3DModel", "condition_latents"): "comes with kv_cache",
    ("WanAnimate2Transformer3DModel", "offset_grid_sizes"): "comes with kv_cache",
    ("WanAnimate2Transformer3DModel", "reference_grid_sizes"): "comes with kv_cache",
    ("WanAnimate2Transformer3DModel", "origin_area"): "comes with kv_cache",
    # all parts of one request packed into one sequence, with no dimension for others
    **{
        ("Cosmos3OmniTransformer", name): "one packed sequence"
        for name in """
            text_indexes position_ids vision_tokens vision_token_shapes vision_sequence_indexes
            vision_mse_loss_indexes vision_timesteps vision_noisy_frame_indexes sound_tokens
            sound_token_shapes sound_sequence_indexes sound_mse_loss_indexes sound_timesteps
            sound_noisy_frame_indexes action_tokens action_token_shapes action_sequence_indexes
            action_mse_loss_indexes action_timesteps action_noisy_frame_indexes action_domain_ids
        """.split()
    },
    # pictures of all rows in one list, and places in it by the row's number, which another batch changes
    ("OmniGenTransformer2DModel", "input_img_latents"): "numbered by row",
    ("OmniGenTransformer2DModel", "input_image_sizes"): "numbered by row",
    # its pipeline gives texts for every frame, which is another number of rows than that of the videos
    ("SparseControlNetModel", "conditioning_mask"): "rows by frame",
    # no pipeline gives them, and the module fails for more than one row of them
    ("StableCascadeUNet", "sca"): "not given",
    ("StableCascadeUNet", "crp"): "not given",
    # neither pictures nor videos: notes and proteins
    ("T5FilmDecoder", "encodings_and_masks"): "sound",
    ("T5FilmDecoder", "decoder_input_tokens"): "sound",
    ("T5FilmDecoder", "decoder_noise_time"): "sound",
    **{
        ("RFD4ProteinaTransformer", name): "proteins"
        for name in """
            bb_ca local_latents bb_ca_time local_latents_time token_type atom37_mask conditioning
        """.split()
    },
}


def test_every_tensor_argument_of_a_denoiser_has_a_role_or_a_reason() -> None:
    arguments = set(_tensor_arguments())

    unknown = {(kind, name) for kind, name in arguments if listed_role(kind, name) is None}

    assert unknown == set(WITHOUT_ROLE)
    assert len({kind for kind, _ in arguments}) > 100


def test_no_exception_is_about_a_parameter_that_does_not_exist() -> None:
    classes = {kind.__name__: kind for kind in _denoisers()}

    places = [*_MODULE_ROLES, *WITHOUT_ROLE]

    assert [
        (k, name) for k, name in places if name not in inspect.signature(classes[k].forward).parameters
    ] == []


def _denoisers() -> Iterator[type[Any]]:
    for package in PACKAGES:
        module = importlib.import_module(f"diffusers.models.{package}")
        for info in pkgutil.iter_modules(module.__path__, f"{module.__name__}."):
            for kind in vars(importlib.import_module(info.name)).values():
                if isinstance(kind, type) and issubclass(kind, ModelMixin) and kind.__module__ == info.name:
                    yield kind


def _tensor_arguments() -> Iterator[tuple[str, str]]:
    """Class and parameter names of what is annotated as a tensor, a container or a cache, or not at all."""
    for kind in _denoisers():
        for parameter in list(inspect.signature(kind.forward).parameters.values())[1:]:
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if not variadic and HOLDS_TENSORS.search(str(parameter.annotation)):
                yield kind.__name__, parameter.name
