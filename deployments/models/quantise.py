"""Weights in 8 or 4 bits, as a plan says: a module's Linear layers one after the other, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from diffusers import ModelMixin
from diffusers.quantizers.gguf.utils import GGUFLinear
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    PerRow,
    quantize_,
)

from deployments.models.layerwise_casting import cast_layers, module_names
from deployments.planning.plan import DENOISERS, PartPlan, Plan
from deployments.protocol.card import Quantisation
from deployments.protocol.errors import ModelFailed

# of a weight, with its share of the scales; those per row are left out
WEIGHT_BITS: dict[Quantisation, float] = {
    "int8": 8,
    "fp8": 8,
    "fp8_dynamic": 8,
    "fp8_cast": 8,
    "nf4": 4 + 32 / 64,
}
# on the device for each weight of the layer that is quantised, its old form included: in a dtype of 16 bits,
# and of 32. The most that torchao 0.18 and bitsandbytes 0.49 took on a CPU; a float32 copy, or several, are
# most of it. fp8_cast is done before the weights are on the device
QUANTISING_BYTES: dict[Quantisation, tuple[int, int]] = {
    "int8": (12, 16),
    "fp8": (17, 17),
    "fp8_dynamic": (17, 17),
    "fp8_cast": (0, 0),
    "nf4": (8, 12),
}
LEAST_ACTIVATION = 1e-12  # rows whose largest value is less are scaled as if it were this
FP8_PRODUCTS = (8, 9)  # capability of NVIDIA's GPUs that multiply float8: Ada, Hopper and later ones
WITHOUT_APPLE = ("fp8", "fp8_dynamic", "fp8_cast", "nf4")  # forms that Apple's GPUs have no kernels for


def quantise(module: nn.Module, plan: PartPlan, device: torch.device | None = None) -> None:
    """Bring the module's weights into the form that the plan names; without one nothing changes.

    One layer at a time, so that beside the module there is one layer in its old form. device: where layers
    are quantised and stay; None: where they are.
    """
    kind = plan.quantisation
    if kind is None:
        return
    if kind == "fp8_cast":
        cast_layers(module, getattr(torch, plan.dtype))
        return
    for parent, name, layer in list(quantisable_layers(module)):
        if device is not None:
            layer.to(device)
        if kind == "nf4":
            setattr(parent, name, _in_nf4(layer))
        else:
            _quantise_by_torchao(layer, kind)


def quantising_bytes(kind: Quantisation, dtype: torch.dtype, weights: int) -> int:
    """What quantising a layer of so many weights takes beside its new form, at most."""
    narrow, wide = QUANTISING_BYTES[kind]
    return weights * (narrow if dtype.itemsize == 2 else wide)


def quantisable_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The Linear layers that are quantised, each with its parent and its name there.

    Not those that share a weight, with an embedding for example, and not those that diffusers keeps in
    float32. Others that are not plain compute in ways of their own.
    """
    kept = frozenset(module_names(module, "_keep_in_fp32_modules") if isinstance(module, ModelMixin) else ())
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for path, layer in module.named_modules():
        if type(layer) is not nn.Linear or uses[id(layer.weight)] > 1 or kept.intersection(path.split(".")):
            continue
        if type(layer.weight) is nn.Parameter and layer.weight.is_floating_point():
            parent, _, name = path.rpartition(".")
            yield module.get_submodule(parent), name, layer


def saved_bytes(module: nn.Module, plan: PartPlan) -> int:
    """By how much the plan's form makes the module smaller than its dtype would; small layers count, too."""
    itemsize = getattr(torch, plan.dtype).itemsize
    if plan.gguf is not None:
        own = (layer for layer in module.modules() if isinstance(layer, GGUFLinear))
        return sum(layer.in_features * layer.out_features * itemsize - layer.weight.nbytes for layer in own)
    if plan.quantisation is None:
        return 0
    each = itemsize - WEIGHT_BITS[plan.quantisation] / 8
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return int(each * sum(layer.in_features * layer.out_features for layer in layers))


class StoredFiles(Protocol):
    """The files of a module."""

    @property
    def stored_form(self) -> str | None:
        """The library that has quantised them; None where they are plain."""


def check_quantisation(plan: Plan, parts: Mapping[str, StoredFiles], device: torch.device) -> None:
    """Raise ModelFailed for a form that the device does not compute, for a part that is not there, and for
    one whose files are quantised.

    parts: the pipeline's modules by name.
    """
    names = set(parts)
    wanted = {part.name: part.quantisation for part in plan.parts if part.quantisation is not None}
    denoisers = {wanted[name] for name in names.intersection(DENOISERS) if name in wanted}
    for name, kind in wanted.items():
        if name not in names and not (name in DENOISERS and kind in denoisers):
            raise ModelFailed(
                f"serving.quantisation names {name}, which the model does not have; "
                f"it has {', '.join(sorted(names))}"
            )
        if name in names:
            _check_device(kind, device)
            library = parts[name].stored_form
            if library is not None:
                cure = f"leave {name} out of serving.quantisation"
                raise ModelFailed(f"the files of {name} are quantised by {library}; {cure}")


def _check_device(kind: Quantisation, device: torch.device) -> None:
    if device.type == "mps" and kind in WITHOUT_APPLE:
        raise ModelFailed(f"{kind} weights do not run on Apple's GPUs; write quantisation: int8 or none")
    if kind != "fp8_dynamic":
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if torch.version.hip is not None and capability is not None:
        return  # torchao checks AMD's
    if capability is None or capability < FP8_PRODUCTS:
        has = f"has {capability[0]}.{capability[1]}" if capability else "is none"
        raise ModelFailed(
            "fp8_dynamic weights need a GPU that multiplies float8 (compute capability 8.9: L4, RTX 40, "
            f"H100); this device {has}; write quantisation: fp8 or int8"
        )


def _quantise_by_torchao(layer: nn.Linear, kind: Quantisation) -> None:
    """Replace the layer's weight by torchao's. Its outer shape and dtype stay."""
    # torchao would otherwise set options of inductor, and the precision of float32 products, for all models
    own: dict[str, Any] = {"set_inductor_config": False}
    if kind == "int8":
        # with one scale per row, torchao multiplies activations by the integers and scales after it, which
        # overflows in float16; with two it multiplies by the scaled weight
        halves = layer.weight.dtype is torch.float16 and layer.in_features % 2 == 0
        granularity = PerGroup(layer.in_features // 2) if halves else PerRow()
        config: Any = Int8WeightOnlyConfig(granularity=granularity, **own)
    elif kind == "fp8":
        config = Float8WeightOnlyConfig(**own)
    else:  # scales per row: those of a tensor would depend on its other rows
        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=LEAST_ACTIVATION, **own
        )
    zeros = (layer.weight == 0).all(dim=1, keepdim=True)
    any_zeros = kind != "int8" and bool(zeros.any())
    if any_zeros:  # torchao divides each row by its largest value
        layer.weight = nn.Parameter(layer.weight.masked_fill(zeros, 1.0), requires_grad=False)
    quantize_(layer, config)
    quantised: Any = layer.weight
    if any_zeros and type(quantised) is not nn.Parameter:
        quantised.qdata.view(torch.uint8).masked_fill_(zeros, 0)
    elif any_zeros:  # torchao leaves layers of some sizes as they are
        layer.weight = nn.Parameter(quantised.masked_fill(zeros, 0.0), requires_grad=False)


def _in_nf4(layer: nn.Linear) -> nn.Module:
    """bitsandbytes' layer with the weights of this one: 4 bits, and a float32 scale for 64 of them.

    The bytes are stored as values of the layer's dtype, which some models ask a weight for.
    """
    dtype, device = layer.weight.dtype, layer.weight.device
    made: Any = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        compress_statistics=False,
        quant_type="nf4",
        quant_storage=dtype,
        device="meta",
    )
    made.compute_type_is_set = True  # otherwise the first input decides
    # on some CPUs its first forward would bring the weights into another form, and fail for small layers
    made.support_avx512bf16_for_cpu = False
    made.weight = Params4bit(
        layer.weight.data,
        requires_grad=False,
        compress_statistics=False,
        quant_type="nf4",
        quant_storage=dtype,
        module=made,
    )
    made.bias = layer.bias
    made.to(device)  # quantises
    return made.requires_grad_(requires_grad=False).train(layer.training)  # type: ignore[no-any-return]
