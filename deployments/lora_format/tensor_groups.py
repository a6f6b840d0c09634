"""The tensors of a LoRA file grouped by the module they change, and those that cannot be served.

By names alone; which layer of a model a module is, is decided in placement.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from deployments.lora_format.classify import REMEDY, UNSUPPORTED, network_type

_FACTOR = re.compile(  # peft (with the adapter's name), kohya, diffusers of three ages, XLabs
    r"(?P<module>.+)\.lora_(?P<side>A|B|down|up)(?:\.(?!(?:weight|bias|(?:lora_)?alpha|scale\w*)$)[\w-]+)?"
    r"(?:\.weight)?"
    r"|(?P<old>.+?)(?:\.lora|\.lora_linear_layer|_lora|(?P<number>_lora[12]))\.(?P<old_side>down|up)\.weight"
)
_ALPHA = re.compile(
    r"(?P<module>.+?)(?:\.lora|_lora|\.lora_linear_layer|\.lora_(?:A|B|down|up))?"
    r"(?:\.default)?\.(?:alpha|lora_alpha)(?:\.default)?"
)
_PRODUCT = re.compile(
    r"(?P<module>.+)\.(?:(?P<kind>lokr|hada)_(?:w[12](?:_[ab])?|t[12])|lora_mid(?:\.weight)?)"
)
_TUCKER = "lora_mid"
_DIFFERENCE = re.compile(r".+\.(?:diff|diff_\w+|w_norm|b_norm|lora_(?:A|B|up|down)(?:\.\w+)?\.bias)")
_REPLACED = re.compile(r".+\.(?:set_weight|reshape_weight|weight|bias|scale)")  # 0 is a value like others


@dataclass(frozen=True, slots=True)
class FactorPair:
    """The tensors of one module, by name: up @ down times alpha / rank is added to its weight."""

    module: str  # as the file names it
    down: str
    up: str
    alpha: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A tensor that cannot be used, and when that does not matter."""

    key: str
    reason: str  # a clause that begins with "it" or "its", or the quoted key
    unless_zero: tuple[str, ...] = ()  # tensors; where all values of one of them are 0, nothing is lost


@dataclass(frozen=True, slots=True)
class TensorGroups:
    """All tensors of a file: each name is in one of the pairs, or is covered by a problem."""

    pairs: tuple[FactorPair, ...]
    problems: tuple[Problem, ...]


def group_tensors(keys: Iterable[str]) -> TensorGroups:
    """The pairs of factors in a file, and a problem for every tensor that is in none."""
    factors: dict[str, dict[str, list[str]]] = {}
    products: dict[tuple[str, str], list[str]] = {}  # by module and kind
    others: list[str] = []
    for key in keys:
        named = _factor(key)
        if named is not None:
            factors.setdefault(named[0], {}).setdefault(named[1], []).append(key)
        elif (product := _PRODUCT.fullmatch(key)) is not None:
            products.setdefault((product["module"], product["kind"] or _TUCKER), []).append(key)
        else:
            others.append(key)
    pairs, problems = [], []
    for (module, kind), names in products.items():
        roles: dict[str, list[str]] = {}
        if kind == _TUCKER or set(factors.get(module, ())) == {"alpha"}:  # they are of this product
            roles = factors.pop(module, {})
        zero = (*names, *roles.get("down", ()), *roles.get("up", ()))
        problems.append(replace(_other(names[0]), unless_zero=zero))
    for module, roles in factors.items():
        if set(roles) >= {"down", "up"} and all(len(names) == 1 for names in roles.values()):
            alpha = roles.get("alpha", [None])[0]
            pairs.append(FactorPair(module, roles["down"][0], roles["up"][0], alpha))
        else:
            problems.append(_incomplete(roles))
    return TensorGroups(tuple(pairs), (*problems, *map(_other, others)))


def _factor(key: str) -> tuple[str, str] | None:
    """The module and the role ("down", "up", "alpha") of a tensor of a plain LoRA."""
    match = _FACTOR.fullmatch(key)
    if match is not None:
        if match["old"] is not None:
            return match["old"] + (match["number"] or ""), match["old_side"]
        return match["module"], "down" if match["side"] in ("A", "down") else "up"
    match = _ALPHA.fullmatch(key)
    return None if match is None else (match["module"], "alpha")


def _incomplete(roles: dict[str, list[str]]) -> Problem:
    """Of a module that has not exactly one factor of each side and at most one alpha."""
    names = [name for role in ("down", "up", "alpha") for name in roles.get(role, ())]
    twice = next((names for names in roles.values() if len(names) > 1), None)
    if twice is not None:
        return Problem(
            twice[1],
            f"{twice[0]!r} and {twice[1]!r} are for the same layer; save one adapter to a file",
            tuple(roles.get("up", roles.get("down", ()))) if len(roles.get("up", ())) == 1 else (),
        )
    return Problem(
        names[0],
        f"{names[0]!r} has no counterpart; both factors of a layer are needed (lora_A and lora_B, or "
        "lora_down and lora_up), so save the file again",
        (names[0],),
    )


def _other(key: str) -> Problem:
    """Of a tensor that is no factor."""
    network = network_type([key])
    if network in UNSUPPORTED:
        reason, zero_adds_nothing = f"{UNSUPPORTED[network]} ({key!r})", bool(_DIFFERENCE.fullmatch(key))
    else:
        reason = f"{key!r} is neither a factor of a LoRA nor its alpha"
        zero_adds_nothing = not _REPLACED.fullmatch(key)
    return Problem(key, f"{reason}; {REMEDY}", (key,) if zero_adds_nothing else ())
