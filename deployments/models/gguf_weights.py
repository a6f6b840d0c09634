"""Weights of a component from a GGUF file: compared with the component by the header, then read into it.

Blocks of Linear layers stay as they are in the file, and diffusers' GGUFLinear brings them into floats
whenever the layer computes. Other tensors are brought into the part's dtype once, one at a time, so that
beside the component no more than one of them is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor
from torch import Tensor, nn

from deployments.gguf_format.header import GgufHeader, GgufTensor, refusal
from deployments.models.gguf_names import T5, expected_names, fits, is_readable, named_as_in

PLAIN = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64, "BF16": torch.bfloat16}
MAX_NAMES = 3  # in a message
CURE = "use a file of the model that weights of the card name"


@dataclass(frozen=True, slots=True)
class GgufWeights:
    """The file from which one module is read, found to have its tensors."""

    kind: Any  # class of the module
    folder: Path  # with its config.json
    header: GgufHeader
    sizes: Mapping[
        str, tuple[int, int | None]
    ]  # by name in the module: values, and bytes of what stays in blocks
    variant: str | None = None  # of the file's name: there is none

    def bytes_as(self, dtype: torch.dtype, in_float32: Collection[str] = ()) -> int:
        """Bytes of the module in memory. in_float32: names of layers that are cast to float32."""
        return sum(
            (4 if _is_in(name, in_float32) else dtype.itemsize) * values if stored is None else stored
            for name, (values, stored) in self.sizes.items()
        )

    def read(self, dtype: torch.dtype, in_float32: Collection[str], device: torch.device) -> nn.Module:
        """The module on this device; on a CPU what has its final dtype is the mapped file itself."""
        with _explained(self.header, self.kind):
            module = _empty(self.kind, self.folder)
            tensors = named_as_in(module, dict(_mapped(self.header, dtype)))
        while tensors:
            name, tensor = tensors.popitem()
            if name not in self.sizes:
                continue
            own = torch.float32 if _is_in(name, in_float32) else dtype
            if self.sizes[name][1] is not None:
                _set_blocks(module, name, tensor, own, device)
            else:
                _set_values(module, name, tensor, own, device)
        if type(module).__name__ in T5:
            module.tie_weights()  # type: ignore[operator]
        return module.to(device).eval().requires_grad_(requires_grad=False)


def find_gguf(kind: Any, folder: Path, header: GgufHeader) -> GgufWeights:
    """The weights of a module of this class, whose configuration is in the folder.

    Reads no tensor. Raises ModelFailed for a file of another model, naming what differs.
    """
    if not is_readable(kind):
        raise refusal(
            header.path,
            f"it is named for a {kind.__name__}, which is not read from GGUF files",
            f"name files for denoisers and for {' or '.join(T5)} only",
        )
    if not fits(header.architecture, kind):
        cause = f"it is of the architecture {header.architecture!r}, not a {kind.__name__}"
        raise refusal(header.path, cause, CURE)
    with _explained(header, kind):
        module = _empty(kind, folder)
        tensors = named_as_in(module, {name: _outline(one) for name, one in header.tensors.items()})
    return GgufWeights(kind, folder, header, _compared(header, module, tensors))


def _compared(
    header: GgufHeader, module: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, int | None]]:
    """The sizes of what the module gets. Raises ModelFailed where it lacks a tensor or has one too many."""
    about, expected = f"{type(module).__name__} of the card's weights", expected_names(module)
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    others = sorted(tensors.keys() - expected)
    others = [name for name in others if not any(re.search(one, name) for one in ignored)]
    if missing := sorted(expected - tensors.keys()):
        raise refusal(header.path, f"it lacks {_some(missing)} of the {about}", CURE)
    if others:
        raise refusal(header.path, f"it has {_some(others)}, for which the {about} has no place", CURE)
    sizes: dict[str, tuple[int, int | None]] = {}
    # diffusers asks the weights of layers that it keeps in float32 for their dtype
    kept = getattr(module, "_keep_in_fp32_modules", None) or () if isinstance(module, ModelMixin) else ()
    wanted = module.state_dict()
    for name in expected:
        tensor, shape = tensors[name], wanted[name].shape
        found = torch.Size(vars(tensor).get("quant_shape", tensor.shape))  # of one in blocks
        if found != shape:
            cause = f"its {name} has the shape {tuple(found)}, and the {about} {tuple(shape)}"
            raise refusal(header.path, cause, CURE)
        stays = isinstance(tensor, GGUFParameter) and _is_of_linear(module, name) and not _is_in(name, kept)
        sizes[name] = shape.numel(), tensor.nbytes if stays else None
    return sizes


def _empty(kind: Any, folder: Path) -> nn.Module:
    """The module of the configuration in this folder, without weights."""
    with init_empty_weights():
        if issubclass(kind, ModelMixin):
            module: nn.Module = kind.from_config(kind.load_config(folder))
        else:
            module = kind(kind.config_class.from_pretrained(folder))
    return module


def _outline(tensor: GgufTensor) -> Tensor:
    """A tensor without values that stands for one of the file."""
    if tensor.original_shape is not None:
        return torch.empty(tensor.original_shape, device="meta")
    if tensor.type.is_plain:
        return torch.empty(tensor.shape, dtype=PLAIN[tensor.type.name], device="meta")
    return _in_blocks(torch.empty(_block_shape(tensor), dtype=torch.uint8, device="meta"), tensor)


def _mapped(header: GgufHeader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All tensors by name, over a mapping of the file."""
    size = header.path.stat().st_size
    file = torch.from_file(str(header.path), shared=False, size=size, dtype=torch.uint8)
    for name, tensor in header.tensors.items():
        stored = file[tensor.start : tensor.start + tensor.nbytes]
        if tensor.type.is_plain:
            plain = stored.view(PLAIN[tensor.type.name])
            yield name, plain.view(tensor.original_shape or tensor.shape)
            continue
        blocks = _in_blocks(stored.view(_block_shape(tensor)), tensor)
        if tensor.original_shape is None:
            yield name, blocks
        else:
            yield name, dequantize_gguf_tensor(blocks).to(dtype).view(tensor.original_shape)


def _in_blocks(stored: Tensor, tensor: GgufTensor) -> Tensor:
    made: Tensor = GGUFParameter(stored, quant_type=tensor.number)
    return made


def _block_shape(tensor: GgufTensor) -> tuple[int, ...]:
    """Its shape in bytes."""
    return (*tensor.shape[:-1], tensor.shape[-1] // tensor.type.block * tensor.type.block_bytes)


def _set_values(
    module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """Give the module this parameter or buffer, in floats."""
    path, _, kind = name.rpartition(".")
    owner = module.get_submodule(path)
    tensor = dequantize_gguf_tensor(tensor)
    is_parameter = kind in dict(owner.named_parameters(recurse=False))
    value = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    setattr(owner, kind, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def _set_blocks(
    module: nn.Module, weight: str, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """Have a layer that keeps this weight in blocks in place of the Linear that has it."""
    path = weight.rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    linear: Any = module.get_submodule(path)
    casts = isinstance(module, ModelMixin) or dtype is not torch.float32
    with torch.device("meta"):
        layer: Any = (GGUFLinear if casts else _FloatLinear)(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype
        )
    number = tensor.quant_type  # type: ignore[attr-defined]
    stored = Tensor._make_subclass(Tensor, tensor).to(device)  # noqa: SLF001  the way of diffusers
    # T5 casts activations to the dtype of a weight unless that is int8
    stored = stored if isinstance(module, ModelMixin) else stored.view(torch.int8)
    layer.weight = GGUFParameter(stored, quant_type=number)
    layer.bias = linear.bias
    setattr(module.get_submodule(parent), name, layer)


class _FloatLinear(GGUFLinear):
    """A layer that computes in float32 whatever its input is, as those of T5 that overflow in float16."""

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = super().forward(inputs.float())
        return result


def _is_of_linear(module: nn.Module, name: str) -> bool:
    """Whether it is the weight of a Linear layer that computes by itself."""
    path, _, kind = name.rpartition(".")
    return kind == "weight" and type(module.get_submodule(path)) is nn.Linear


def _is_in(name: str, layers: Collection[str]) -> bool:
    return not set(layers).isdisjoint(name.split("."))


def _some(names: list[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _explained(header: GgufHeader, kind: Any) -> Iterator[None]:
    """In the block diffusers converts tensors; what it raises for others than it knows is explained."""
    try:
        yield
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        stated = f" of the architecture {header.architecture!r}" if header.architecture else ""
        raise refusal(
            header.path,
            f"its tensors{stated} do not have the names and shapes of a {kind.__name__} "
            f"({type(error).__name__}: {error})",
            CURE,
        ) from error
