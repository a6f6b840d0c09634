"""The shape of what the tensors of a module add to its weight, and whether they fit each other.

By shapes and types alone. A 1x1 convolution's factor may be for a Linear layer, and the factors of a
convolution may have its kernel flattened into their inputs, so only products of sizes count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from deployments.lora_format.header import FACTOR_DTYPES, TensorEntry
from deployments.lora_format.tensor_groups import ModuleTensors

Shapes = Mapping[str, tuple[int, ...]]  # of the factors, by role


@dataclass(frozen=True, slots=True)
class ChangeShape:
    """What a module's tensors add to: a weight of `outputs` rows with `inputs` values each."""

    outputs: int
    inputs: int  # of a convolution with its kernel: in * kh * kw
    rank: int  # of the factors that are multiplied; of a LoKr of whole factors, the smaller side of lokr_w2
    alpha_rank: int | None  # that alpha is divided by; None: alpha does not count
    sum_rank: int  # that its product takes as one of low rank: of a LoHa, the square


def change_shape(module: ModuleTensors, entries: Mapping[str, TensorEntry]) -> ChangeShape | str:
    """The shape of the change, or what is wrong with these tensors whatever the model is, as a clause."""
    for key in module.factors:
        if entries[key].dtype not in FACTOR_DTYPES:
            return f"{key!r} is of type {entries[key].dtype}; save it as one of {', '.join(FACTOR_DTYPES)}"
        if len(entries[key].shape) < 2 or 0 in entries[key].shape:
            return (
                f"{key!r} is of shape {text(entries[key].shape)}, which is no factor's; save the file again"
            )
    if module.alpha is not None and math.prod(entries[module.alpha].shape) != 1:
        return f"{module.alpha!r} is of shape {text(entries[module.alpha].shape)}; an alpha is one number"
    shapes = {role: entries[key].shape for role, key in module.roles.items()}
    shape = {"lora": _lora, "loha": _loha, "lokr": _lokr}[module.network](shapes)
    if shape is None:
        listed = ", ".join(f"{key!r} {text(entries[key].shape)}" for key in module.factors)
        return f"the shapes of its factors do not fit each other ({listed}); save the file again"
    return _magnitude_mismatch(module, entries, shape) or shape


def rescales_inputs(module: ModuleTensors, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether the magnitude has a value for each input of the layer, not for each output."""
    assert module.magnitude is not None, "asked of a DoRA"
    shape = entries[module.magnitude].shape
    return module.rescaling == "lycoris" and shape[:1] == (1,) and math.prod(shape) > 1


def text(shape: tuple[object, ...]) -> str:
    """A shape for a message."""
    return f"({', '.join(map(str, shape))})"


def _lora(shapes: Shapes) -> ChangeShape | None:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    rank = down[0]
    if mid is None:
        if math.prod(up[1:]) != rank:
            return None
        return ChangeShape(up[0], math.prod(down[1:]), rank, rank, rank)
    if len(mid) != 4 or mid[1] != rank or math.prod(up[1:]) != mid[0] or math.prod(down[2:]) != 1:
        return None
    return ChangeShape(up[0], down[1] * mid[2] * mid[3], rank, rank, mid[0])


def _loha(shapes: Shapes) -> ChangeShape | None:
    first, second = (_product(shapes, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
    if first is None or second is None or first[:2] != second[:2]:
        return None
    outputs, inputs, rank = first
    return ChangeShape(outputs, inputs, max(rank, second[2]), shapes["hada_w1_b"][0], rank * second[2])


def _lokr(shapes: Shapes) -> ChangeShape | None:
    left, right = (_kronecker_factor(shapes, n) for n in (1, 2))
    if left is None or right is None:
        return None
    product = next((role for role in ("lokr_w1_b", "lokr_w2_b") if role in shapes), None)
    return ChangeShape(
        left[0] * right[0],
        left[1] * right[1],
        right[2],
        None if product is None else shapes[product][0],
        right[2],
    )


def _kronecker_factor(shapes: Shapes, number: int) -> tuple[int, int, int] | None:
    """Rows, columns and rank."""
    whole = shapes.get(f"lokr_w{number}")
    if whole is not None:
        return whole[0], math.prod(whole[1:]), min(whole[0], math.prod(whole[1:]))
    return _product(shapes, f"lokr_w{number}_a", f"lokr_w{number}_b", f"lokr_t{number}")


def _product(shapes: Shapes, a: str, b: str, core: str) -> tuple[int, int, int] | None:
    """Rows, columns and rank of a @ b; with a core (r, r, kh, kw) both have their rank first."""
    if core not in shapes:
        if len(shapes[a]) != 2 or shapes[a][1] != shapes[b][0]:
            return None
        return shapes[a][0], math.prod(shapes[b][1:]), shapes[a][1]
    if len(shapes[core]) != 4 or shapes[core][:2] != (shapes[a][0], shapes[b][0]):
        return None
    if len(shapes[a]) != 2 or len(shapes[b]) != 2:
        return None
    return shapes[a][1], shapes[b][1] * math.prod(shapes[core][2:]), shapes[a][0]


def _magnitude_mismatch(
    module: ModuleTensors, entries: Mapping[str, TensorEntry], shape: ChangeShape
) -> str | None:
    """Why the lengths of a DoRA are not those of this change's rows or columns."""
    if module.magnitude is None:
        return None
    entry = entries[module.magnitude]
    if entry.dtype not in FACTOR_DTYPES:
        return f"{module.magnitude!r} is of type {entry.dtype}; save it as one of {', '.join(FACTOR_DTYPES)}"
    size = math.prod(entry.shape)
    fits = shape.inputs % size == 0 if rescales_inputs(module, entries) else size == shape.outputs
    if not fits or (module.rescaling == "peft" and size != shape.outputs):
        return (
            f"{module.magnitude!r} is of shape {text(entry.shape)}, and its layer has {shape.outputs} "
            f"outputs and {shape.inputs} inputs; save the file again"
        )
    return None
