"""A module call: one parked forward of one module, with named arguments and its batch key."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deployments.engine.argument_roles import SCALAR_TYPES, ArgumentRole, role_of
from deployments.engine.batch_key import BatchKey, DigestCache, key_component
from deployments.engine.call_signature import KeyCache, signature_of
from deployments.protocol.request import Exactness


@dataclass(frozen=True, slots=True)
class StackedConstant:
    """A loop-invariant argument of a batch, stacked."""

    ids: list[int]  # of the calls' tensors, all of which are alive
    references: list[weakref.ref[Tensor]]  # their callbacks remove this object
    stacked: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Seam:
    """One interceptable function of a module: the forward of a transformer, the decode of a VAE.

    `batch_keys`, `digests`, `stacked_constants` and `roles` are caches.
    """

    name: str  # for logs and metrics, such as "FluxTransformer2DModel.forward"
    function: Callable[..., Any]  # the module's own bound function
    positions: tuple[str, ...]  # parameter names in order
    mergeable: bool = True  # False: stateful or unknown; its calls never share a forward
    optional: frozenset[str] = frozenset()  # parameters whose default is None: None equals a missing argument
    auxiliary: bool = False  # not part of a denoising step: runs on the auxiliary lane if there is one
    # frees what its module's forwards keep on the device for the next one; None: they keep nothing
    release: Callable[[], None] | None = None
    batch_keys: weakref.WeakValueDictionary[Hashable, BatchKey] = field(
        default_factory=weakref.WeakValueDictionary
    )
    digests: DigestCache = field(default_factory=DigestCache)  # of SHARED arguments that are alive
    # by (key, parameter name); an entry is removed when any tensor of its calls is freed
    stacked_constants: dict[Hashable, StackedConstant] = field(default_factory=dict)
    roles: dict[str, ArgumentRole] = field(default_factory=dict)

    @property
    def stacked_bytes(self) -> int:
        """Memory of the stacked constants. May be read from any thread."""
        return sum(constant.stacked.nbytes for constant in list(self.stacked_constants.values()))

    def role(self, argument: str) -> ArgumentRole:
        """The role of a parameter of this seam's function."""
        known = self.roles.get(argument)
        if known is None:
            known = self.roles[argument] = role_of(self.name.partition(".")[0], argument)
        return known

    def batch_size(self, arguments: Mapping[str, Any]) -> int:
        """B of the first batched argument, 0 if there is none."""
        for name, value in arguments.items():
            role = self.role(name)
            if role is ArgumentRole.BATCH and isinstance(value, Tensor) and value.ndim:
                return int(value.shape[0])
            if role is ArgumentRole.RAGGED and isinstance(value, list):
                return len(value)
        return 0


@dataclass(slots=True, eq=False)
class ModuleCall:
    """A call of a seam with named arguments. Not changed once it is parked. Compared by identity."""

    seam: Seam
    arguments: dict[str, Any]
    batch_size: int
    key: Hashable | None  # calls with equal keys may share a forward; None: with no other call
    lora_set: Hashable | None = None  # of its rows; see lora_rows.py
    exact: Exactness | None = None  # the policy of its request; None: the engine's

    def run(self) -> Any:
        """The module's own output for this call alone, bit for bit what the pipeline would get."""
        return self.seam.function(**self.arguments)


def make_call(seam: Seam, cache: KeyCache, args: Sequence[Any], kwargs: dict[str, Any]) -> ModuleCall:
    """The call with every argument named, and its batch key.

    cache: of the fiber that makes it. A call like one of the fiber's last two of this seam (with
    classifier-free guidance two alternate) has their key; only other calls have it computed.
    """
    arguments = {**dict(zip(seam.positions, args, strict=False)), **kwargs} if args else kwargs
    if not seam.mergeable:
        return ModuleCall(seam, arguments, 1, None)
    recent = cache.signatures.get(seam, ())
    for signature in recent:
        if signature.has_same_objects(arguments) and signature.matches_changing(arguments, seam.digests):
            return ModuleCall(seam, arguments, signature.batch_size, signature.key)
    for signature in recent:
        if signature.has_equal_objects(arguments) and signature.matches_changing(arguments, seam.digests):
            cache.signatures[seam] = (signature.with_objects(arguments), recent[0])
            return ModuleCall(seam, arguments, signature.batch_size, signature.key)
    batch_size = seam.batch_size(arguments)
    components = _key_components(seam, arguments, batch_size, seam.digests) if batch_size else None
    if components is None:
        return ModuleCall(seam, arguments, batch_size or 1, None)
    named = tuple((name, component) for name, component in components.items() if component is not None)
    key = seam.batch_keys.get(named)
    if key is None:
        key = seam.batch_keys[named] = BatchKey(named)
    signature = signature_of(arguments, seam.role, components, batch_size, key)
    cache.signatures[seam] = (signature, *recent[:1])
    return ModuleCall(seam, arguments, batch_size, key)


def _key_components(
    seam: Seam, arguments: Mapping[str, Any], batch_size: int, digests: DigestCache
) -> dict[str, Hashable | None] | None:
    """The component of every argument, None for one that has no effect on the key; or None instead of all
    if the call fits no batch."""
    if arguments.get("use_cache") is True:  # the caller needs the cache that a split output does not have
        return None
    components: dict[str, Hashable | None] = {}
    for name, value in arguments.items():
        if value is None:
            components[name] = None if name in seam.optional else ("None",)
        elif isinstance(value, SCALAR_TYPES):
            components[name] = (value,)
        else:
            component = components[name] = key_component(seam.role(name), value, batch_size, digests)
            if component is None:
                return None
    return components
