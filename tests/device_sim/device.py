"""The simulated CUDA device: shapes, dtypes, memory, streams and costs of every operator, no values.

A tensor on "cuda" is a FakeTensor (shape, dtype, device, storage, no data), a tensor on the CPU is real.
Every operator passes through SimulatedDevice, which counts its kernel, allocates its results, orders it on
the current stream, and answers where a pipeline reads values back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from tests.device_sim import sources, values
from tests.device_sim.blanks import Blanks
from tests.device_sim.clock import CUDA, current_stream, host
from tests.device_sim.costs import (
    Cost,
    GpuKind,
    attention_flops,
    flop_formula,
    flops_of,
    kernel_cost,
)
from tests.device_sim.host_memory import UNSTAGED_BYTES, HostMemory
from tests.device_sim.measurements import Measurements
from tests.device_sim.memory import DeviceMemory
from tests.device_sim.values import flat

aten = torch.ops.aten

EMPTY = {aten.empty.memory_format, aten.empty_strided.default}  # allocate, and launch nothing
# one kernel each, though torch can take them apart
FUSED = {aten.scaled_dot_product_attention.default, aten.linear.default}
RANDOM_FILLS = {
    aten.uniform_.default,
    aten.normal_.default,
    aten.bernoulli_.float,
    aten.random_.default,
    aten.exponential_.default,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
# operators whose result's shape depends on values
BY_VALUE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
}

Answer = Callable[[str], bool]  # what torch.equal finds, by the file that asks


class ThreadedFakeMode(FakeTensorMode):
    """FakeTensorMode for many threads: each knows for itself whether it is inside a kernel."""

    @property
    def in_kernel_invocation(self) -> bool:
        return bool(getattr(_thread, "in_kernel", False))

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, value: bool) -> None:
        _thread.in_kernel = value

    @property
    def avoid_device_init(self) -> bool:
        return True  # torch.cuda.is_available() says yes, and there is nothing to initialise


_thread = threading.local()


class SimulatedDevice(TorchDispatchMode):
    """One GPU. Enter `fake`, then the device, in every thread that uses it."""

    def __init__(self, kind: GpuKind) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = kind
        self.lock = threading.RLock()
        self.fake = ThreadedFakeMode(allow_non_fake_inputs=True)
        self.memory = DeviceMemory(self.lock, kind.memory_bytes)
        self.host_memory = HostMemory(self.lock, self.memory.hazards)
        self.blanks = Blanks()
        self.measurements = Measurements(self.memory, self.lock)
        self.equal: Answer = lambda _file: True  # of tensors without values

    def begin_part(self) -> None:
        """Begin a part of the run with measurements of its own, while nothing runs."""
        with self.lock:
            self.memory.begin_part()
            self.measurements.begin_part()

    def waited(self, kind: str) -> None:
        """The host waits for the current stream."""
        with self.lock:
            host.merge(current_stream().clock)
            self.measurements.waited(kind)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":
            return function(*args, **kwargs)
        leaves = flat(args, kwargs)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and is_traceable_wrapper_subclass(leaf):  # of quantised weights
                with self:  # which sees the operators that this one consists of
                    return type(leaf).__torch_dispatch__(function, types, args, kwargs)
        if any(isinstance(leaf, FakeTensor) for leaf in leaves) or _names_cuda(leaves):
            with self.lock:
                return self._run(function, args, kwargs)
        return self._run_on_host(function, args, kwargs, leaves)

    # ---- operators on the host ----

    def _run_on_host(self, function: Any, args: Any, kwargs: dict[str, Any], leaves: Sequence[Any]) -> Any:
        pinned = kwargs.pop("pin_memory", False) if "pin_memory" in kwargs else False
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                writes = function._schema.is_mutable and leaf is args[0]
                self.host_memory.check_use(leaf, writes=writes)
        if self.blanks.concern(function, args, kwargs):
            out = self.blanks.run(function, args, kwargs)
        else:
            out = values.real(function, args, kwargs)
        return self.host_memory.pin(out) if pinned else out

    # ---- operators on the device ----

    def _run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if function is aten._local_scalar_dense.default:
            return self._item(args[0])
        if function is aten.equal.default:
            return self._equal(*args)
        if function not in FUSED and flop_formula(function) is None and function._can_decompose():
            with self:
                made = function.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if function in RANDOM_FILLS:
            values.set_value(args[0], None)
            self._launch(function, 0, (), (args[0],))
            return args[0]
        if function.overloadpacket in (aten.randn, aten.rand, aten.normal) and _is_cuda(kwargs.get("device")):
            return self._made(function, _blank(args[0], kwargs.get("dtype") or torch.get_default_dtype()))
        if function is aten._to_copy.default and (copied := self._copied(args[0], kwargs)) is not None:
            return copied
        if function is aten.copy_.default and isinstance(args[1], Tensor):
            return self._copy_into(args[0], args[1], non_blocking=_flag(args, kwargs, 2, "non_blocking"))
        if function in INDEXING:
            return self._index(function, args, kwargs)
        if function in BY_VALUE:
            return self._by_value(function, args, kwargs)
        self._check_devices(function, args, kwargs)
        return self._compute(function, args, kwargs)

    def _compute(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator whose tensors are all on the device."""
        if function is aten.scaled_dot_product_attention.default:
            query, key, value = args[:3]
            out = _blank((*query.shape[:-1], value.shape[-1]), query.dtype)
            self._launch(function, attention_flops(query, key, value), _on_device(flat(args, kwargs)), (out,))
            return out
        if function is aten.linear.default:
            x, weight = args[:2]
            out = _blank((*x.shape[:-1], weight.shape[0]), x.dtype)
            return self._finished(function, args, kwargs, out, 2.0 * x.numel() * weight.shape[0])
        out = function(*args, **kwargs)
        return self._finished(function, args, kwargs, out, flops_of(function, args, kwargs, out))

    def _finished(self, function: Any, args: Any, kwargs: dict[str, Any], out: Any, flops: float) -> Any:
        """The operator's result, counted and held; a view launches nothing."""
        outs, ins = _on_device(flat((out,), {})), _on_device(flat(args, kwargs))
        if not outs and not ins:
            return out  # on "meta"
        if function in EMPTY or _is_view(function, ins, outs):
            for tensor in outs:
                self.memory.hold(tensor)
        else:
            self._launch(function, flops, ins, outs)
        values.follow(function, args, kwargs, out)
        return out

    def _launch(self, function: Any, flops: float, read: Sequence[Tensor], written: Sequence[Tensor]) -> Cost:
        """Queue one kernel on the current stream."""
        for tensor in written:
            self.memory.hold(tensor)
        cost = kernel_cost(self.kind, function, flops, read, written)
        current_stream().launch(cost.seconds)
        for tensor in read:
            self.memory.read(tensor)
        for tensor in written:
            self.memory.write(tensor)
        self.measurements.launched(cost)
        return cost

    def _made(self, function: Any, out: Tensor) -> Tensor:
        self._launch(function, 0, (), (out,))
        return out

    def _check_devices(self, function: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Raises RuntimeError as CUDA does where a tensor of the host is among the device's."""
        on_host = [
            leaf
            for leaf in flat(args, kwargs)
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and leaf.ndim
        ]
        if on_host:
            shapes = [tuple(tensor.shape) for tensor in on_host]
            self.measurements.mixing[f"{function} with {shapes} at {sources.innermost()}"] += 1
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"cpu! ({function})"
            )

    # ---- copies between host and device ----

    def _copied(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The result of a copy to the other device; None for one that stays on the device."""
        to, dtype = kwargs.get("device"), kwargs.get("dtype")
        non_blocking = kwargs.get("non_blocking", False)
        if not isinstance(source, FakeTensor):
            return self._uploaded(source, dtype, non_blocking=non_blocking)
        if to is not None and torch.device(to).type == "cpu":
            return self._downloaded(source, dtype, non_blocking=non_blocking)
        return None

    def _copy_into(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> Tensor:
        if isinstance(target, FakeTensor) and not isinstance(source, FakeTensor):
            self.host_memory.check_use(source, writes=False)
            with_value = not self.blanks.has(source) and (
                values.value_of(target) is not None or target.is_contiguous()
            )
            self._launch(aten.copy_.default, 0, (), (target,))
            self._copied_up(source, non_blocking=non_blocking)
            _overwrite(target, source if with_value else None)
            return target
        if isinstance(source, FakeTensor) and not isinstance(target, FakeTensor):
            host = self._downloaded(source, target.dtype, non_blocking=non_blocking, target=target)
            values.real(aten.copy_.default, (target, host), {})
            return target
        self._launch(aten.copy_.default, 0, (target, source), (target,))
        _overwrite(target, values.value_of(source))
        return target

    def _uploaded(self, source: Tensor, dtype: torch.dtype | None, *, non_blocking: bool) -> Tensor:
        self.host_memory.check_use(source, writes=False)
        is_blank = self.blanks.has(source)
        if dtype is None or dtype is source.dtype:
            cast = source
        else:
            cast = values.real(Tensor.to, (source, "meta" if is_blank else "cpu", dtype), {})
        out: Tensor = aten.empty_strided.default(
            list(cast.shape), list(cast.stride()), dtype=cast.dtype, device=CUDA
        )
        self._launch(None, 0, (), (out,))
        self._copied_up(source, non_blocking=non_blocking)
        if values.keeps(out) and not is_blank:
            values.set_value(out, values.real(Tensor.clone, (cast,), {}))
        return out

    def _copied_up(self, source: Tensor, *, non_blocking: bool) -> None:
        """Whether the host waits for a copy to the device that has just been launched."""
        if self.host_memory.is_pinned(source):
            self.host_memory.copied_from(source)
            if not non_blocking:
                self.waited("copy to the device")
        elif not non_blocking:
            self.waited("copy to the device")
        elif source.numel() * source.element_size() > UNSTAGED_BYTES:
            self.waited("copy to the device from pageable memory")

    def _downloaded(
        self,
        source: Tensor,
        dtype: torch.dtype | None,
        *,
        non_blocking: bool,
        target: Tensor | None = None,
    ) -> Tensor:
        """The values on the host, zeros where there are none. target: where they will be written."""
        self._launch(None, 0, (source,), ())
        value = values.value_of(source)
        if value is None:
            host: Tensor = values.real(torch.zeros, (source.shape,), {"dtype": dtype or source.dtype})
        else:
            host = values.real(Tensor.to, (value, dtype or value.dtype), {"copy": True})
        if target is None and non_blocking:
            target = self.host_memory.pin(host)  # torch copies to pinned memory there
        if non_blocking and target is not None and self.host_memory.is_pinned(target):
            self.host_memory.copied_to(target)
        else:
            self.waited("copy to the host")
        return host

    # ---- values that decide what is done next ----

    def _item(self, tensor: Tensor) -> Any:
        self.waited("item")
        value = values.value_of(tensor)
        if value is not None:
            return values.real(aten._local_scalar_dense.default, (value,), {})
        if tensor.dtype is torch.bool:
            return True  # "all finite", "all equal"
        return 0.5 if tensor.is_floating_point() else 1

    def _equal(self, left: Tensor, right: Tensor) -> bool:
        self.waited("equal")
        first, second = values.value_of(left), values.value_of(right)
        if first is None or second is None:
            return left.shape == right.shape and self.equal(sources.innermost_of_ours().file)
        return bool(values.real(aten.equal.default, (first, second), {}))

    def _index(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        table, indices, *rest = args
        if not isinstance(table, FakeTensor):  # a table on the host, an index on the device
            host = [
                self._downloaded(index, None, non_blocking=False) if isinstance(index, FakeTensor) else index
                for index in indices
            ]
            return values.real(function, (table, host, *rest), kwargs)
        moved = [
            self._uploaded(index, None, non_blocking=False)
            if isinstance(index, Tensor) and not isinstance(index, FakeTensor)
            else index
            for index in indices
        ]
        args = (table, moved, *rest)
        if any(isinstance(index, Tensor) and index.dtype is torch.bool for index in moved):
            return self._by_value(function, args, kwargs)
        return self._compute(function, args, kwargs)

    def _by_value(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator whose result's shape depends on values, which the host waits for."""
        self.waited(function.overloadpacket.__name__)
        given = values.on_host(args, kwargs)
        if given is None:
            raise RuntimeError(f"{function} needs values, and its tensors are too large to have some")
        out = values.real(function, *given)
        return tree_map(lambda leaf: self._shown(function, leaf) if isinstance(leaf, Tensor) else leaf, out)

    def _shown(self, function: Any, value: Tensor) -> Tensor:
        """The value as a tensor on the device."""
        out = _blank(value.shape, value.dtype)
        values.set_value(out, value)
        return self._made(function, out)


def _on_device(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, FakeTensor) and leaf.device.type == "cuda"]


def _names_cuda(leaves: Sequence[Any]) -> bool:
    return any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _flag(args: Any, kwargs: dict[str, Any], position: int, name: str) -> bool:
    return bool(args[position]) if len(args) > position else bool(kwargs.get(name, False))


def _blank(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the device; the fake mode, and not the device, sees this call."""
    out: Tensor = aten.empty.memory_format(list(shape), dtype=dtype, device=CUDA)
    return out


def _is_view(function: Any, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> bool:
    if not ins or not outs or function._schema.is_mutable:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in ins}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outs)


def _overwrite(target: Tensor, source: Tensor | None) -> None:
    """The values of `target` after a copy of `source` into it."""
    value = values.value_of(target)
    if source is None or not values.keeps(target):
        values.set_value(target, None)
    elif value is not None:
        values.real(aten.copy_.default, (value, source), {})
    else:
        expanded = values.real(Tensor.expand, (source, target.shape), {})
        values.set_value(target, values.real(Tensor.to, (expanded, target.dtype), {"copy": True}))
