"""A checkpoint in one file becomes the folder of a pipeline, which is then loaded like any other.

diffusers converts the names of the tensors; what is not in the file is taken from the folder of a pipeline of
the same kind. Each part is written before the next one is read.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, get_class_obj_and_candidates
from safetensors.torch import load_file
from torch import Tensor, nn

from deployments.checkpoint_format.contents import (
    DENOISER,
    MAX_NAMES,
    V_PREDICTION,
    ZERO_SNR,
    check_readable,
    has_denoiser,
    has_text_encoders,
    has_vae,
    strange_names,
)
from deployments.checkpoint_format.header import CheckpointHeader, read_header, refusal
from deployments.models.thread_dtype import thread_default_dtype
from deployments.models.weight_files import STEMS
from deployments.protocol.card import Dtype
from deployments.protocol.errors import ModelFailed

INDEX = "model_index.json"
NOT_SERVED = ("safety_checker", "image_encoder")  # optional parts that are neither in such files nor used
DENOISERS = ("unet", "transformer")
READ_ERRORS = (LookupError, ValueError, RuntimeError, TypeError, AttributeError)  # of diffusers' conversions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of a checkpoint."""

    pipeline_class: str
    from_file: tuple[str, ...]  # names of the parts that were in it
    from_source: tuple[str, ...]  # of those that the other folder gave
    notes: list[str] = field(default_factory=list)  # sentences for the operator


def default_source(header: CheckpointHeader) -> str:
    """The hub repository whose pipeline has the configuration of such a checkpoint, by names and shapes.

    Raises ModelFailed for a file that is no model.
    """
    check_readable(header)
    outline = {name: torch.empty(one.shape, device="meta") for name, one in header.tensors.items()}
    found: Mapping[str, str] = single_file_utils.fetch_diffusers_config(outline)
    known = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS["v1"]
    if found == known and single_file_utils.CHECKPOINT_KEY_NAMES["v1"] not in outline:
        raise refusal(
            header.path,
            "its tensors are those of no model that diffusers reads from one file",
            "name the folder or repository of its pipeline with --config, or use a folder of diffusers",
        )
    return found["pretrained_model_name_or_path"]


def needed_from_source(header: CheckpointHeader, index: Mapping[str, Any]) -> list[str]:
    """Names of the parts whose files the source has to give. index: its model_index.json."""
    return [name for name, entry in _components(index).items() if not _may_be_in(header, name, entry[0])]


def import_checkpoint(path: Path, source: Path, target: Path, dtype: Dtype) -> Imported:
    """Write the folder of a pipeline with the weights of the file to `target`, which is not there yet.

    source: the folder of a pipeline of the same kind, at least its configuration. dtype: of the weights.
    Raises ModelFailed for a file that cannot be used, for one of another kind than the source, and for parts
    that neither has, naming them. Nothing is left of a failed import.
    """
    header = read_header(path)
    check_readable(header)
    index = _index_of(source)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir(parents=True)
    try:
        imported = _write_parts(header, source, index, partial, getattr(torch, dtype))
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return imported


def _write_parts(
    header: CheckpointHeader, source: Path, index: Mapping[str, Any], target: Path, dtype: torch.dtype
) -> Imported:
    converted, copied, notes = [], [], list[str]()
    tensors = load_file(header.path)  # mapped: pages are read as they are needed
    for name, (library, class_name) in _components(index).items():
        if library in ("diffusers", "transformers"):
            kind = _class_of(name, library, class_name, source)
            if issubclass(kind, nn.Module) and _may_be_in(header, name, library):
                module: Any = _convert(kind, name, tensors, source, dtype, header)
                if module is not None:
                    module.save_pretrained(target / name, safe_serialization=True)
                    converted.append(name)
                    continue
            if issubclass(kind, nn.Module):
                _check_has_weights(header, source, name, class_name)
                copied.append(name)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
    if not set(converted).intersection(DENOISERS):
        raise refusal(header.path, "it has no UNet or transformer", "name the file of a whole model")
    empty = {name: [None, None] for name in NOT_SERVED if isinstance(index.get(name), list)}
    (target / INDEX).write_text(json.dumps({**index, **empty}, indent=2))
    _set_prediction(header, target, notes)
    if strange := sorted(strange_names(header.tensors)):
        notes.append(
            f"warning: {len(strange)} tensors belong to no part of the pipeline and are left out: "
            f"{', '.join(strange[:MAX_NAMES])}"
        )
    return Imported(str(index["_class_name"]), tuple(converted), tuple(copied), notes)


def _components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """By name, library and class of the parts that are used."""
    return {
        name: (str(entry[0]), str(entry[1]))
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] is not None and name not in NOT_SERVED
    }


def _may_be_in(header: CheckpointHeader, name: str, library: str) -> bool:
    """Whether the file seems to have the weights of the part of this name."""
    if name in DENOISERS:
        return has_denoiser(header.tensors)
    if name == "vae":
        return has_vae(header.tensors)
    return library == "transformers" and name.startswith("text_encoder") and has_text_encoders(header.tensors)


def _class_of(name: str, library: str, class_name: str, folder: Path) -> Any:
    kind, _ = get_class_obj_and_candidates(
        library, class_name, ALL_IMPORTABLE_CLASSES, diffusers.pipelines, False, name, str(folder)
    )
    return kind


def _convert(
    kind: Any,
    name: str,
    tensors: Mapping[str, Tensor],
    source: Path,
    dtype: torch.dtype,
    header: CheckpointHeader,
) -> nn.Module | None:
    """The part with the weights of the file; None for a text encoder that is not in it."""
    if issubclass(kind, ModelMixin) and not issubclass(kind, FromOriginalModelMixin):
        cure = "use a folder of diffusers"
        raise refusal(header.path, f"diffusers does not read {kind.__name__} from one file", cure)
    given = _with_prefix(tensors) if name == "unet" else dict(tensors)
    try:
        with thread_default_dtype():
            if issubclass(kind, ModelMixin):
                module: nn.Module = kind.from_single_file(
                    given,
                    config=str(source),
                    subfolder=name,
                    torch_dtype=dtype,
                    local_files_only=True,
                )
            elif not _text_encoder_is_in(kind, tensors):
                return None
            else:
                module = load_single_file_sub_model(
                    "transformers",
                    kind.__name__,
                    name,
                    dict(tensors),
                    diffusers.pipelines,
                    is_pipeline_module=False,
                    cached_model_config_path=str(source),
                    local_files_only=True,
                    torch_dtype=dtype,
                )
    except (*READ_ERRORS, single_file_utils.SingleFileComponentError) as error:
        cause = f"its tensors do not fit the {name} of {source} ({type(error).__name__}: {error})"
        raise refusal(header.path, cause, "name a pipeline of the same kind with --config") from error
    _check_complete(module, name, source, header)
    return module.to(dtype)


def _with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a UNet that is alone in its file under the names that it has in a whole model."""
    bare = any(name.startswith("input_blocks.") for name in tensors)
    return {f"{DENOISER}{name}" if bare else name: one for name, one in tensors.items()}


def _text_encoder_is_in(kind: Any, tensors: Mapping[str, Tensor]) -> bool:
    found: bool = single_file_utils.is_clip_model_in_single_file(
        kind, tensors
    ) or single_file_utils.is_t5_in_single_file(tensors)
    return found


def _check_complete(module: nn.Module, name: str, source: Path, header: CheckpointHeader) -> None:
    """Raises ModelFailed for a part some of whose weights were not in the file."""
    missing = [own for own, tensor in module.state_dict().items() if tensor.is_meta]
    if missing:
        cause = f"it lacks {', '.join(missing[:MAX_NAMES])} of the {name} of {source}"
        raise refusal(header.path, cause, "name a pipeline of the same kind with --config")


def _check_has_weights(header: CheckpointHeader, source: Path, name: str, class_name: str) -> None:
    """Raises ModelFailed where the source has no weights of a part that is not in the file either."""
    if any((source / name).glob(f"{stem}*.safetensors") for stem in STEMS if _any(source / name, stem)):
        return
    raise refusal(
        header.path,
        f"it has no {name} ({class_name}), and {source} has no weights of one",
        "name with --config the folder or repository of a whole pipeline of this kind",
    )


def _any(folder: Path, stem: str) -> bool:
    return any(folder.glob(f"{stem}*.safetensors"))


def _set_prediction(header: CheckpointHeader, target: Path, notes: list[str]) -> None:
    """Have the noise scheduler predict what the model was trained for, where the file says it."""
    if V_PREDICTION not in header.tensors:
        return
    file = target / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config["prediction_type"] = "v_prediction"
    if ZERO_SNR in header.tensors:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(config, indent=2))
    notes.append("it predicts velocity (v_pred), and its noise scheduler is set so")


def _index_of(source: Path) -> Mapping[str, Any]:
    try:
        index: Mapping[str, Any] = json.loads((source / INDEX).read_bytes())
    except (OSError, ValueError):
        raise ModelFailed(
            f"{source} is no folder of a diffusers pipeline: it has no {INDEX}; correct --config"
        ) from None
    return index
