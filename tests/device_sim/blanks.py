"""Tensors of the host without values: weights that are read there before they go to the device.

A blank is a real tensor, so that code which asks for its type, its storage or its views finds what it would
find with weights. Its memory is never written, and so takes none. An operator with a blank computes shapes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only

from tests.device_sim.values import flat, real

aten = torch.ops.aten

LEAST = 2**14  # elements of a blank; smaller tensors keep their values
ALLOCATES = {aten.empty.memory_format, aten.empty_strided.default}
READS_VALUES = {aten._local_scalar_dense.default, aten.equal.default}  # zeros, as untouched memory has


class Blanks:
    """The storages of the host that have no values."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._storages: dict[int, StorageWeakRef] = {}
        self._most = 1024  # storages, until those that are gone are forgotten
        self._local = threading.local()

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """In the block this thread's new tensors of the host are blanks, unless they are small."""
        before, self._local.making = getattr(self._local, "making", False), True
        try:
            yield
        finally:
            self._local.making = before

    def has(self, tensor: Tensor) -> bool:
        """Whether its storage is blank."""
        if not self._storages or tensor.device.type != "cpu":
            return False
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def concern(self, function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether `run` is to be asked for this operator."""
        if function in ALLOCATES and getattr(self._local, "making", False):
            return True
        return bool(self._storages) and any(
            isinstance(leaf, Tensor) and self.has(leaf) for leaf in flat(args, kwargs)
        )

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operator gives: views of blanks, new blanks, or what it wrote to, which is blank then."""
        if function in ALLOCATES:
            out = real(function, args, kwargs)
            return self.mark(out) if out.numel() >= LEAST else out
        if function in READS_VALUES or function.is_view:
            return real(function, args, kwargs)
        if function._schema.is_mutable:
            return self.mark(args[0])
        shapes = tree_map_only(Tensor, lambda tensor: real(Tensor.to, (tensor, "meta"), {}), (args, kwargs))
        out = real(function, shapes[0], shapes[1] | ({"device": "meta"} if "device" in kwargs else {}))
        return tree_map_only(Tensor, self._like, out)

    def mark(self, tensor: Tensor) -> Tensor:
        """Count the tensor's storage as one without values."""
        storage = tensor.untyped_storage()
        with self._lock:
            if len(self._storages) > self._most:
                self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
                self._most = 2 * len(self._storages) + 1024
            self._storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def _like(self, shape: Tensor) -> Tensor:
        arguments = (list(shape.shape), list(shape.stride()))
        return self.mark(real(aten.empty_strided.default, arguments, {"dtype": shape.dtype}))
