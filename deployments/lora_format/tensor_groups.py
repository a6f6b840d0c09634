"""The tensors of a LoRA file grouped by the module they change, and those that cannot be served.

By names alone; which layer of a model a module is, is decided in placement.py. Names and arithmetic of LoHa,
LoKr and Tucker factors: LyCORIS (github.com/KohakuBlueleaf/LyCORIS) and peft; of DoRA: arXiv 2402.09353.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from deployments.lora_format.classify import REMEDY, UNSUPPORTED, network_type

Network = Literal["lora", "loha", "lokr"]
Rescaling = Literal["peft", "lycoris"]  # DoRA: their weights of less than 1 mean different things

_FACTOR = re.compile(  # peft (with the adapter's name), kohya, diffusers of three ages, XLabs
    r"(?P<module>.+)\.lora_(?P<side>A|B|down|up)(?:\.(?!(?:weight|bias|(?:lora_)?alpha|scale\w*)$)[\w-]+)?"
    r"(?:\.weight)?"
    r"|(?P<old>.+?)(?:\.lora|\.lora_linear_layer|_lora|(?P<number>_lora[12]))\.(?P<old_side>down|up)\.weight"
)
_ALPHA = re.compile(
    r"(?P<module>.+?)(?:\.lora|_lora|\.lora_linear_layer|\.lora_(?:A|B|down|up))?"
    r"(?:\.default)?\.(?:alpha|lora_alpha)(?:\.default)?"
)
_MORE = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<mid>mid)(?:\.weight)?"
    r"|(?P<product>(?:lokr|hada)_(?:w[12](?:_[ab])?|t[12]))(?:\.default)?"
    r"|(?P<peft>lora_magnitude_vector)(?:\.default)?(?:\.weight)?|(?P<lycoris>dora_scale))"
)
_LORA = frozenset({"down", "up", "mid"})
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_LOHA_CORES = frozenset({"hada_t1", "hada_t2"})
_LOKR = tuple(  # a Kronecker factor is whole, or itself a product
    left | right
    for left in (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
    for right in (
        frozenset({"lokr_w2"}),
        frozenset({"lokr_w2_a", "lokr_w2_b"}),
        frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
    )
)
_COMPLETE: dict[frozenset[str], Network] = {
    frozenset({"down", "up"}): "lora",
    _LORA: "lora",
    _LOHA: "loha",
    _LOHA | _LOHA_CORES: "loha",
    **dict.fromkeys(_LOKR, "lokr"),
}
_FIRST = ("down", "up", "hada_w1_a", "lokr_w1", "lokr_w1_a")  # of a module's tensors, for messages
_BESIDE = ("alpha", "peft", "lycoris")  # roles that are no factors
_NEEDED: dict[Network, str] = {
    "lora": "lora_A and lora_B, or lora_down and lora_up",
    "loha": "hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b, and both or none of hada_t1 and hada_t2",
    "lokr": "lokr_w1, or lokr_w1_a and lokr_w1_b; and lokr_w2, or lokr_w2_a and lokr_w2_b",
}
_DIFFERENCE = re.compile(r".+\.(?:diff|diff_\w+|w_norm|b_norm|lora_(?:A|B|up|down)(?:\.\w+)?\.bias)")
_REPLACED = re.compile(r".+\.(?:set_weight|reshape_weight|weight|bias|scale)")  # 0 is a value like others


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """The tensors that change one module, by name: its weight W gets the product of its factors, times
    alpha / rank, added.

    lora: up @ down, with Tucker's core `mid` between them for a convolution. loha: the element-wise product
    of (hada_w1_a @ hada_w1_b) and (hada_w2_a @ hada_w2_b), each with a core where there are some. lokr: the
    Kronecker product of lokr_w1 and lokr_w2, each of them whole or as a product of two factors. With a
    magnitude, DoRA: every row or column of the changed weight is scaled to that length.
    """

    module: str  # as the file names it
    network: Network
    roles: Mapping[str, str]  # name of the tensor by role, factors alone
    alpha: str | None = None
    magnitude: str | None = None
    rescaling: Rescaling | None = None  # whose arithmetic the magnitude is for

    @property
    def first(self) -> str:
        """The tensor that messages name."""
        return next(self.roles[role] for role in _FIRST if role in self.roles)

    @property
    def factors(self) -> tuple[str, ...]:
        """The tensors that are multiplied: where one of them is zero, nothing is added."""
        return tuple(self.roles.values())


@dataclass(frozen=True, slots=True)
class Problem:
    """A tensor that cannot be used, and when that does not matter."""

    key: str
    reason: str  # a clause that begins with "it" or "its", or the quoted key
    unless_zero: tuple[str, ...] = ()  # tensors; where all values of one of them are 0, nothing is lost


@dataclass(frozen=True, slots=True)
class TensorGroups:
    """All tensors of a file: each name is in one of the modules, or is covered by a problem."""

    modules: tuple[ModuleTensors, ...]
    problems: tuple[Problem, ...]


def group_tensors(keys: Iterable[str]) -> TensorGroups:
    """The modules that a file changes, and a problem for every tensor that belongs to none."""
    found: dict[str, dict[str, list[str]]] = {}
    others: list[str] = []
    for key in keys:
        named = _role(key)
        if named is None:
            others.append(key)
        else:
            found.setdefault(named[0], {}).setdefault(named[1], []).append(key)
    modules: list[ModuleTensors] = []
    problems: list[Problem] = []
    for module, roles in found.items():
        whole, own = _of_module(module, roles)
        modules += whole
        problems += own
    return TensorGroups(tuple(modules), (*problems, *map(_other, others)))


def _of_module(module: str, roles: Mapping[str, list[str]]) -> tuple[list[ModuleTensors], list[Problem]]:
    """The tensors of one module: at most one network's are complete, and a problem for those of others."""
    beside = {role: names for role, names in roles.items() if role in _BESIDE}
    networks: dict[Network, dict[str, list[str]]] = {}
    for role, names in roles.items():
        if role not in _BESIDE:
            networks.setdefault(_network_of(role), {})[role] = names
    modules: list[ModuleTensors] = []
    problems: list[Problem] = []
    for factors in networks.values():
        whole = _whole(module, factors | beside)
        if whole is None:
            problems.append(_incomplete(factors, beside if len(networks) == 1 else {}))
        elif modules:
            one, other = modules[0].first, whole.first
            reason = f"{one!r} and {other!r} are different changes of one layer; save one of them"
            problems.append(Problem(other, reason, whole.factors))
        else:
            modules.append(whole)
    if not modules and not problems:
        problems.append(_incomplete({}, beside))
    return modules, problems


def _role(key: str) -> tuple[str, str] | None:
    """The module and the role of a tensor that LoRA, LoHa, LoKr or DoRA have."""
    match = _FACTOR.fullmatch(key)
    if match is not None:
        if match["old"] is not None:
            return match["old"] + (match["number"] or ""), match["old_side"]
        return match["module"], "down" if match["side"] in ("A", "down") else "up"
    match = _MORE.fullmatch(key)
    if match is not None:
        kinds = {"mid": match["mid"], "peft": match["peft"], "lycoris": match["lycoris"]}
        return match["module"], match["product"] or next(kind for kind, name in kinds.items() if name)
    match = _ALPHA.fullmatch(key)
    return None if match is None else (match["module"], "alpha")


def _whole(module: str, roles: Mapping[str, list[str]]) -> ModuleTensors | None:
    """These tensors, where they are one of each role and no factor is missing or too many."""
    network = _COMPLETE.get(frozenset(roles) - frozenset(_BESIDE))
    if (
        network is None
        or any(len(names) > 1 for names in roles.values())
        or {"peft", "lycoris"} <= set(roles)
    ):
        return None
    names = {role: names[0] for role, names in roles.items()}
    rescaling: Rescaling | None = "peft" if "peft" in names else "lycoris" if "lycoris" in names else None
    return ModuleTensors(
        module,
        network,
        {role: name for role, name in names.items() if role not in _BESIDE},
        names.get("alpha"),
        None if rescaling is None else names[rescaling],
        rescaling,
    )


def _incomplete(factors: Mapping[str, list[str]], beside: Mapping[str, list[str]]) -> Problem:
    """Of a module that has not exactly one tensor for each factor of a network. beside: its other tensors."""
    roles = {**factors, **beside}
    names = [name for own in (factors or beside).values() for name in own]
    twice = next((own for own in roles.values() if len(own) > 1), None)
    if twice is not None:
        return Problem(
            twice[1],
            f"{twice[0]!r} and {twice[1]!r} are for the same layer; save one adapter to a file",
            tuple(roles.get("up", roles.get("down", ()))) if len(roles.get("up", ())) == 1 else (),
        )
    needed = _NEEDED[_network_of(next(iter(factors), "down"))]
    return Problem(
        names[0],
        f"{names[0]!r} has no counterpart; all factors of a layer are needed ({needed}), so save the file "
        "again",
        () if {"peft", "lycoris"} & set(beside) else tuple(names),
    )


def _network_of(role: str) -> Network:
    return "loha" if role.startswith("hada") else "lokr" if role.startswith("lokr") else "lora"


def _other(key: str) -> Problem:
    """Of a tensor that is no factor."""
    network = network_type([key])
    if network in UNSUPPORTED:
        reason, zero_adds_nothing = f"{UNSUPPORTED[network]} ({key!r})", bool(_DIFFERENCE.fullmatch(key))
    else:
        reason = f"{key!r} is neither a factor of a LoRA nor its alpha"
        zero_adds_nothing = not _REPLACED.fullmatch(key)
    return Problem(key, f"{reason}; {REMEDY}", (key,) if zero_adds_nothing else ())
