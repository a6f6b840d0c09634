"""A LoRA's safetensors file judged by its header alone: what it is, or why it is refused. Loads no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.protocol.errors import BadRequest, TooLarge

MAX_HEADER_BYTES = 2**20  # a 63 MB header with a million empty tensors opens in 10 s and takes 421 MiB
HEAD_BYTES = 8 + MAX_HEADER_BYTES
MAX_FILE_BYTES = 512 * 2**20
MAX_TENSORS = 4096
MAX_RANK = 128
MAX_BLOCK_DIGITS = 4  # converters count up to the largest block number in the keys
MAX_DIMENSIONS = 5
DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}

LoraNetwork = Literal[
    "lora", "dora", "lokr", "loha", "glora", "oft", "ia3", "vera", "hra", "fourier", "tucker", "full", "norm",
    "bias", "embedding", "control", "other",
]  # fmt: skip
KeyStyle = Literal["diffusers", "peft", "kohya", "xlabs", "bfl", "other"]
LoraFamily = Literal["flux", "sdxl", "sd", "wan", "hunyuan_video", "ltx", "unknown"]

# the part of a key that tells what kind of network it belongs to ("$": its end); the first that occurs counts
_NETWORKS: dict[LoraNetwork, tuple[str, ...]] = {
    "dora": ("dora_scale", "lora_magnitude_vector"),
    "lokr": (".lokr_", "lokr_w"),
    "loha": (".hada_",),
    "glora": (".a1.weight$", ".b1.weight$"),
    "oft": (".oft_R", ".oft_blocks", ".oft_diag", ".boft_"),
    "ia3": (".ia3_l", ".on_input$"),
    "vera": (".vera_lambda_",),
    "hra": (".hra_u",),
    "fourier": (".fourierft_",),
    "tucker": (".lora_mid.",),
    "norm": (".w_norm$", ".b_norm$"),
    "full": (".diff$",),
    "bias": (".diff_b$", ".lora_B.bias$", ".lora_up.bias$"),
    "embedding": ("bundle_emb.", "lora_embedding_"),
    "control": ("query_norm.scale", "norm_added_q", "lora_controlnet"),
    "lora": (".lora_A", ".lora_B", "lora_down", "lora_up", "_lora.down", ".lora.down", "_lora1.", "_lora2.",
             "_lora.up", "lora_linear_layer", "_lora.weight"),
}  # fmt: skip
_DOWN = (".lora_A.weight", ".lora_down.weight", "lora.down.weight", "lora1.down.weight", "lora2.down.weight",
         "lora_linear_layer.down.weight")  # fmt: skip
_INSTEAD = "train or extract it as a plain LoRA"
_UNSERVED: dict[LoraNetwork, str] = {
    "dora": f"it is a DoRA, which rescales whole layers; {_INSTEAD}",
    "lokr": f"it is a LoKr (Kronecker factors); {_INSTEAD}",
    "loha": f"it is a LoHa (Hadamard factors); {_INSTEAD}",
    "glora": f"it is a GLoRA, which multiplies the weights themselves; {_INSTEAD}",
    "oft": f"it is an OFT or BOFT, which turns the weights themselves; {_INSTEAD}",
    "ia3": f"it is an IA3, which rescales activations; {_INSTEAD}",
    "vera": f"it is a VeRA, whose factors are not all in the file; {_INSTEAD}",
    "hra": f"it is an HRA, which reflects the weights themselves; {_INSTEAD}",
    "fourier": f"it is a FourierFT, whose change of a layer has no low rank; {_INSTEAD}",
    "tucker": f"its convolutions have a third factor (Tucker, lora_mid); {_INSTEAD} without it",
    "norm": f"it changes norms (w_norm, b_norm) too; {_INSTEAD} without them",
    "full": f"it holds whole differences of layers (.diff); {_INSTEAD}",
    "bias": f"it changes biases too; {_INSTEAD} without them",
    "embedding": f"it brings text embeddings along; {_INSTEAD} without them",
    "control": "it is a Control LoRA, which changes the model's input and norms; use a ControlNet",
}
_ARCHITECTURES: tuple[tuple[str, LoraFamily], ...] = (
    ("flux", "flux"),
    ("hunyuan", "hunyuan_video"),
    ("wan", "wan"),
    ("ltx", "ltx"),
    ("xl", "sdxl"),
    ("stable-diffusion-v1", "sd"),
    ("sd_v1", "sd"),
)
_KEPT_METADATA = 64  # entries, of 2,000 characters at most: what a page may want to show
_KEPT_CHARACTERS = 2_000


@dataclass(frozen=True, slots=True)
class LoraFileInfo:
    """What the header of an accepted file says. Whether it fits a model shows when it is loaded."""

    rank: int  # the largest
    tensors: int
    dtype: str  # "F16", "BF16" or "F32"; the most frequent
    size_bytes: int
    style: KeyStyle
    family: LoraFamily  # a guess
    network: LoraNetwork
    name: str = ""  # by its own metadata
    trigger_words: tuple[str, ...] = ()  # by its own metadata, the most frequent first
    metadata: Mapping[str, str] = field(default_factory=dict)  # as in the file, shortened


def inspect(file: bytes) -> LoraFileInfo:
    """The facts of a LoRA.

    Raises BadRequest (TooLarge over 512 MiB) with the reason: no safetensors, truncated, forged, not a
    LoRA, of a kind that is not served (DoRA, LoKr, LoHa and others), or over a limit. Takes milliseconds
    whatever the bytes; reads no tensor.
    """
    if len(file) > MAX_FILE_BYTES:
        raise TooLarge(f"the LoRA has {len(file)} bytes; at most {MAX_FILE_BYTES}", param="loras")
    header = _header(file)
    metadata = _metadata(header.pop("__metadata__", None))
    if not header:
        raise _refused("it holds no tensors")
    if len(header) > MAX_TENSORS:
        raise _refused(f"it holds {len(header)} tensors; at most {MAX_TENSORS}")
    entries = {key: _entry(key, value) for key, value in header.items()}
    _check_offsets(entries, len(file) - 8 - int.from_bytes(file[:8], "little"))
    return _facts(entries, metadata, len(file))


def raw_metadata(file: bytes) -> dict[str, str]:
    """The whole metadata of a file that `inspect` accepted."""
    return _metadata(_header(file).get("__metadata__"))


def shapes(head: bytes) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by key. head: the first HEAD_BYTES, or all, of a file that `inspect` accepted."""
    header = _header(head)
    return {key: tuple(value["shape"]) for key, value in header.items() if key != "__metadata__"}


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _refused(reason: str) -> BadRequest:
    return BadRequest(f"the LoRA is refused: {reason}", param="loras")


def _header(file: bytes) -> dict[str, Any]:
    """The header's table, read only after its size is known to be small."""
    if file[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise _refused("it is a pickle (.pt, .bin, .ckpt), which may run code; convert it to safetensors")
    if len(file) < 8:
        raise _refused("it is no safetensors file; it ends before its header")
    size = int.from_bytes(file[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise _refused(f"it is no safetensors file, or its header is over {MAX_HEADER_BYTES} bytes")
    if 8 + size > len(file):
        raise _refused("it is truncated; its header says more than there is")
    try:
        header = json.loads(file[8 : 8 + size].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise _refused(f"its header is not readable ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise _refused("its header is no table of tensors")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name comes twice")
    return table


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _refused("its metadata is not a table of texts")
    return value


def _entry(key: str, value: object) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refused(f"its entry for {_short(key)} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _refused(f"{_short(key)} is of type {_short(str(dtype))}; use F16, BF16 or F32")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise _refused(f"{_short(key)} has no proper shape and offsets")
    if not key.isprintable() or re.search(rf"\d{{{MAX_BLOCK_DIGITS + 1}}}", key):
        raise _refused(f"{_short(key)} is no name of a layer")
    entry = _Entry(dtype, tuple(shape), offsets[0], offsets[1])
    if entry.end - entry.start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _refused(f"{_short(key)} has another size than its shape says")
    return entry


def _are_sizes(value: object) -> bool:
    """Whether this is a list of plain numbers from 0 to 2^40."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= 2**40 for item in value)


def _check_offsets(entries: Mapping[str, _Entry], size: int) -> None:
    """Tensors lie one after another, without gap or overlap, to the end of the file; size: of them all."""
    at = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise _refused(f"{_short(key)} overlaps its neighbour or leaves a gap")
        at = entry.end
    if at > size:
        raise _refused("it is truncated; its tensors end after the file does")
    if at < size:
        raise _refused("there is something behind its last tensor")


def _facts(entries: Mapping[str, _Entry], metadata: Mapping[str, str], size: int) -> LoraFileInfo:
    network = _network(entries)
    ranks = [entry.shape[0] for key, entry in entries.items() if key.endswith(_DOWN) and entry.shape]
    if network == "other":
        raise _refused(f"its keys are not those of a LoRA (the first is {_short(next(iter(entries)))})")
    rank = max(ranks, default=0)
    if network in _UNSERVED:
        raise _refused(_UNSERVED[network])
    if rank > MAX_RANK:
        raise _refused(f"its rank is {rank}; at most {MAX_RANK}")
    if not rank:
        raise _refused("it has no layer with a rank")
    dtypes = [entry.dtype for entry in entries.values()]
    return LoraFileInfo(
        rank=rank,
        tensors=len(entries),
        dtype=max(DTYPE_BYTES, key=dtypes.count),
        size_bytes=size,
        style=_style(entries),
        family=_family(entries, metadata),
        network=network,
        name=(metadata.get("modelspec.title") or metadata.get("ss_output_name") or "")[:200],
        trigger_words=_trigger_words(metadata),
        metadata={k[:200]: v[:_KEPT_CHARACTERS] for k, v in list(metadata.items())[:_KEPT_METADATA]},
    )


def _network(keys: Mapping[str, _Entry]) -> LoraNetwork:
    for network, parts in _NETWORKS.items():
        if any(part in f"{key}$" for key in keys for part in parts):
            return network
    return "other"


def _style(keys: Mapping[str, _Entry]) -> KeyStyle:
    def have(*parts: str) -> bool:
        return any(part in key for key in keys for part in parts)

    if have("processor.qkv_lora", "processor.proj_lora"):
        return "xlabs"
    if any(key.startswith(("lora_unet_", "lora_te")) for key in keys):
        return "kohya"
    if have("double_blocks.", "diffusion_model."):
        return "bfl"
    if any(key.startswith("base_model.model.") for key in keys):
        return "peft"
    if have(".lora_A", ".lora.down", "_lora.down", "lora_linear_layer"):
        return "diffusers"
    return "other"


def _family(keys: Mapping[str, _Entry], metadata: Mapping[str, str]) -> LoraFamily:
    """A guess, by what the trainer wrote down, else by the names of the layers."""
    told = " ".join(metadata.get(name, "") for name in ("modelspec.architecture", "ss_base_model_version"))
    for part, family in _ARCHITECTURES:
        if part in told.lower():
            return family
    text = " ".join(keys)
    if re.search(r"\.img_attn_qkv|token_refiner", text):
        return "hunyuan_video"
    if re.search(r"single_transformer_blocks|double_blocks|single_blocks", text):
        return "flux"
    if re.search(r"(^|[ .]|lora_unet_)blocks[._]\d+[._](self_attn|cross_attn|attn1|attn2|ffn)", text):
        return "wan"
    if re.search(r"(^|[ ]|transformer\.|model\.)transformer_blocks\.\d+\.attn[12]\.", text):
        return "ltx"
    deep = r"attentions[._]\d+[._]transformer_blocks[._][1-9]"  # a UNet's, of which SD's have but one each
    if re.search(rf"lora_te2_|text_encoder_2\.|{deep}|lora_unet_(in|out)put_blocks", text):
        return "sdxl"
    if re.search(r"unet[._]|(down|up)_blocks", text):
        return "sd"
    return "unknown"


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """As the file says, at most eight: modelspec's phrase, else the most frequent tags of the training."""
    told = metadata.get("modelspec.trigger_phrase") or metadata.get("ss_trigger_words")
    if told:
        words = [word.strip()[:100] for word in told[:_KEPT_CHARACTERS].split(",")]
        return tuple([word for word in words if word][:8])
    try:
        folders = json.loads(metadata.get("ss_tag_frequency") or "{}")
    except (ValueError, RecursionError):
        return ()
    counts: dict[str, float] = {}
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()[:100]] = counts.get(tag.strip()[:100], 0) + count
    return tuple(sorted(counts, key=lambda tag: -counts[tag])[:3])


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
