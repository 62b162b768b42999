"""A GPU as a CPU can have it: tensors that say "cuda", torch.cuda's streams, events and graphs, and their rules.

Results are real: tensors keep their numbers on the CPU, kernels are launched by their launchers, and computed by their
twins. Refused is what a GPU would refuse, be wrong with, or silently wait for:

- an operation on tensors of both kinds of memory; a kernel that gets memory which the GPU cannot read
- within a step: a copy that the host waits for, a number asked for, an operation whose result has no fixed shape
- within a capture: these, pinned memory, and a kernel's first launch; a stream that is not joined; what was only captured
  has not been computed
- two uses of memory that no stream orders, and memory given back while another stream uses it: see simulated_streams
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from simulated_graphs import DEVICE, Capturing, Graph, Op, Refused, Stream, Uses
from simulated_streams import Line, Memory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["CudaTensor", "Simulation"]

_POOL = 32  # streams that torch makes of each priority; then it begins anew

# What waits for the device, or has a result whose shape depends on numbers.
_WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "masked_select", "bincount", "repeat_interleave",
}  # fmt: skip


class CudaTensor(Tensor):
    """host: the same numbers on the CPU. memory: what it is a view of."""

    host: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, host: Tensor, memory: Memory) -> CudaTensor:
        # C++ takes it for a tensor on "meta": in a build without CUDA it would look for a GPU to switch to.
        made: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=torch.device("meta"), requires_grad=False,
        )  # fmt: skip
        made.host, made.memory = host, memory
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Simulation.active is not None, "a tensor outlives its simulation"
        return Simulation.active.operate(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"cuda:{self.host!r}"


class Simulation(TorchDispatchMode):
    """One simulated GPU, the second of its machine. See `simulated`."""

    active: Simulation | None = None

    def __init__(self) -> None:
        super().__init__()
        self.strict = False  # within a step
        self.freed: list[str] = []  # memory that was given back too early
        self.host = Line("the processor")
        self.default = Stream(self, "the main stream")
        self._threads = threading.local()
        self._streams: dict[int, list[Stream]] = {}
        self._made: dict[int, int] = {}
        self._pinned: dict[int, tuple[weakref.ref[torch.UntypedStorage], Memory]] = {}
        self._registered: list[tuple[int, int]] = []
        self._launched: set[Any] = set()
        self.capture: Capturing | None = None
        self.launches = 0
        self.current_device = 0

    # --- streams

    @property
    def current(self) -> Stream:
        return getattr(self._threads, "stream", self.default)

    @property
    def capturing(self) -> bool:
        return self.current.capture is not None

    def now(self, stream: Stream) -> Line:
        """Where work goes that is given to it now: that comes after all that the processor has done or waited for."""
        line = stream.line if stream.capture is None else stream.capture.lines[stream]
        line.learn(self.host.known)
        return line

    def check_device(self, what: str, given: Any = None) -> None:
        """Where none is given, what is done is done to the current device."""
        index = (
            self.current_device
            if given is None or torch.device(given).index is None
            else torch.device(given).index
        )
        if index != DEVICE.index:
            raise Refused(f"{what}: on device {index}, not on the engine's")

    def stream(self, device: Any = None, priority: int = 0) -> Stream:
        self.check_device("a stream", device)
        pool, made = self._streams.setdefault(priority, []), self._made.get(priority, 0)
        self._made[priority] = made + 1
        if made < _POOL:
            pool.append(Stream(self, f"stream {priority}.{made}"))
        return pool[made % _POOL]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, device = self.current, self.current_device
        self._threads.stream, self.current_device = stream, DEVICE.index
        try:
            yield
        finally:
            self._threads.stream, self.current_device = before, device

    @contextmanager
    def graph(self, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "the heartbeat's thread copies counters meanwhile"
        self.check_device("a capture")
        self.synchronize()
        with self.on(stream):
            graph.capture = stream.capture = self.capture = Capturing(stream)
            try:
                yield
            finally:
                self.capture = None
                graph.capture.end()

    def synchronize(self, device: Any = None) -> None:
        self.check_device("waiting", device)
        if self.capturing:
            raise Refused("the device is waited for within a capture")
        for stream in [self.default, *(each for pool in self._streams.values() for each in pool)]:
            self.host.learn(stream.line.known)

    # --- memory

    def register(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 3, "portable and mapped"
        self._registered.append((address, nbytes))
        return 0

    def unregister(self, address: int) -> int:
        self._registered = [piece for piece in self._registered if piece[0] != address]
        return 0

    def pin(self, tensor: Tensor) -> Tensor:
        if self.capturing:
            raise Refused("pinned memory is taken within a capture")
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = weakref.ref(storage), Memory()
        tensor.pinned_storage = storage  # type: ignore[attr-defined]
        return tensor

    def pinned(self, tensor: Tensor) -> Memory | None:
        found = self._pinned.get(tensor.untyped_storage().data_ptr())
        return found[1] if found is not None and found[0]() is not None else None

    def readable(self, tensor: Tensor) -> bool:
        """Whether a kernel can read it."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if isinstance(tensor, CudaTensor) or tensor.nbytes == 0 or self.pinned(tensor) is not None:
            return True
        for address, nbytes in sorted(self._registered):
            if address <= begin < address + nbytes:
                begin = address + nbytes
        return begin >= end

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.operate(func, args, kwargs or {})

    def operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.split("::")[1]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in given if isinstance(tensor, CudaTensor)]
        to = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if name == "to":  # of which only inference mode lets us see anything
            with self:
                return func.decompose(*args, **kwargs)
        if not there and (to is None or to.type != "cuda"):
            return self._on_host(func, name, args, kwargs, given)
        if name in ("_to_copy", "copy_") and self._crosses(name, to, given):
            return self._cross(func, name, args, kwargs, given)
        if to is not None:
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
            kwargs = {k: v for k, v in kwargs.items() if k in {a.name for a in func._schema.arguments}}
        left = [tensor for tensor in given if not isinstance(tensor, CudaTensor) and tensor.dim() > 0]
        if left and not name.endswith("_like"):
            raise Refused(f"{name} of tensors on the GPU and on the CPU: {[list(t.shape) for t in left]}")
        masks = name.startswith("index") and any(
            t.dtype == torch.bool for t in tree_leaves(args[1:2]) if isinstance(t, Tensor)
        )
        if name in _WAITING or masks:
            self._wait(name)
            self.host.learn(self.current.line.known)
        return self._compute(func, name, args, kwargs, there)

    def launch(self, uses: Uses, again: Callable[[], None]) -> None:
        """A kernel: what it does, done by `again`."""
        self.launches += 1
        self.check_device(uses.what)
        self._use(uses, again, [tensor.host for tensor in uses.writes])

    def first_launch(self, key: Any) -> None:
        """Of a kernel with these constants and kinds of arguments: then it is compiled and loaded."""
        if self.capturing and key not in self._launched:
            raise Refused(f"the first launch of {key} is in a capture")
        self._launched.add(key)

    def wrap(self, host: Tensor, memory: Memory | None = None) -> CudaTensor:
        if memory is None:
            line = self.now(self.current)
            memory = Memory(line, self.freed)
            if self.capture is not None and self.capturing:
                self.capture.fresh.append(host)
                self.capture.inside.add(host.untyped_storage().data_ptr())
                self.capture.memories.append(weakref.ref(memory))
        with torch.inference_mode(
            False
        ):  # C++ makes views of one that is no inference tensor, and would fail
            return CudaTensor(host, memory)

    def _wait(self, what: str) -> None:
        if self.capturing:
            raise Refused(f"{what} is not permitted when a stream is capturing")
        if self.strict:
            raise Refused(f"{what} waits for the device within a step")

    def _on_host(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        pin = kwargs.get("pin_memory")
        if pin:
            kwargs = {**kwargs, "pin_memory": False}
        out = func(*args, **kwargs)
        if pin:
            return self.pin(out)
        touched = {id(memory): memory for t in given if (memory := self.pinned(t)) is not None}
        if touched and not _is_view(func):
            for memory in touched.values():
                memory.use(self.host, name, write=func._schema.is_mutable)
        return out

    def _crosses(self, name: str, to: torch.device | None, given: list[Tensor]) -> bool:
        kinds = {isinstance(tensor, CudaTensor) for tensor in given if tensor.dim() or name == "_to_copy"}
        return len(kinds) == 2 if name == "copy_" else to is not None and kinds != {to.type == "cuda"}

    def _cross(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """A copy from one kind of memory to the other."""
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        source = args[1] if name == "copy_" else args[0]
        host = next((t for t in given if not isinstance(t, CudaTensor)), None)
        memory = None if host is None else self.pinned(host)
        if source.numel() and (not non_blocking or memory is None):
            pinned = "pinned" if memory is not None else "pageable"
            self._wait(
                f"a copy of {list(source.shape)} to or from {pinned} memory, non_blocking={bool(non_blocking)},"
            )
        if self.capturing:
            raise Refused("a copy to or from the host is captured: its memory may be gone at the replay")
        line = self.now(self.current)
        if name == "_to_copy":
            clean = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
            if isinstance(source, CudaTensor):
                source.memory.use(line, "a copy to the host", write=False)
                self.host.learn(line.known)
                return source.host.clone().to(clean.get("dtype"))
            if memory is not None:
                memory.use(line, "a copy to the device", write=False)
            made = self.wrap(func(source.clone(), **clean))
            made.memory.use(line, "a copy to the device", write=True)
            return made
        target = args[0]
        if isinstance(target, CudaTensor):
            if memory is not None:
                memory.use(line, "a copy to the device", write=False)
            target.memory.use(line, "a copy to the device", write=True)
            target.host.copy_(source)
            return target
        source.memory.use(line, "a copy to the host", write=False)
        if memory is not None:
            memory.use(line, "a copy to the host", write=True)
        if not non_blocking or memory is None:
            self.host.learn(line.known)
        return target.copy_(source.host)

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any, there: list[CudaTensor]) -> Any:
        hosts = tree_map(lambda x: x.host if isinstance(x, CudaTensor) else x, (args, kwargs))
        written = _written(func, args, kwargs)
        if self.capture is not None and self.capturing:
            for tensor in written:
                self.capture.keep(tensor.host)
        if name == "_to_copy":
            hosts[1].pop("device", None)
        out = func(*hosts[0], **hosts[1])
        known = {t.host.untyped_storage().data_ptr(): t.memory for t in there}
        same = {id(t.host): t for t in there}
        made: list[CudaTensor] = []

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in same:
                return same[id(x)]
            memory = known.get(x.untyped_storage().data_ptr()) if x.numel() else Memory()
            found = self.wrap(x, memory)
            if memory is None:
                made.append(found)
            return found

        result = tree_map(wrapped, out)
        if _is_view(func) or not (made or written):
            return result  # a view touches nothing
        if name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"):
            return result
        kept = [tensor.host for tensor in made]

        def again() -> None:
            outs = [x for x in tree_leaves(func(*hosts[0], **hosts[1])) if isinstance(x, Tensor)]
            for old, new in zip(kept, [x for x in outs if id(x) not in same], strict=True):
                old.copy_(new)

        reads = [t for t in there if not any(t is w for w in written)]
        self._note(Uses(name, reads, [*written, *made]), again)
        return result

    def _use(self, uses: Uses, again: Callable[[], None], hosts: list[Tensor]) -> None:
        if self.capture is not None and self.capturing:
            for host in hosts:
                self.capture.keep(host)
        self._note(uses, again)
        if not self.capturing:
            again()

    def _note(self, uses: Uses, again: Callable[[], None]) -> None:
        """Puts down what memory is used; within a capture that of others is used at each replay."""
        stream = self.current
        line = self.now(stream)
        touched = {
            (id(t.memory), w): (t.memory, w) for w in (False, True) for t in (uses.reads, uses.writes)[w]
        }
        for memory, write in touched.values():
            if stream.capture is None or memory.owner in stream.capture.lines.values():
                memory.use(line, uses.what, write=write)
        rows = uses.rows
        if stream.capture is None:
            if rows is not None:
                for tensor, parts, write in rows():
                    tensor.memory.use(line, uses.what, write=write, parts=parts)
            return
        line.step(uses.what)

        def later() -> list[tuple[weakref.ref[Memory], Sequence[int], bool]]:
            return [(weakref.ref(t.memory), parts, write) for t, parts, write in rows()] if rows else []

        all_of_it = [(weakref.ref(memory), write) for memory, write in touched.values()]
        stream.capture.tape.append(Op(stream, again, uses.what, all_of_it, later if rows else None))


def _is_view(func: Any) -> bool:
    aliases = any(out.alias_info is not None for out in func._schema.returns)
    return func._schema.name in ("aten::detach", "aten::lift_fresh") or (
        aliases and not func._schema.is_mutable
    )


def _written(func: Any, args: Any, kwargs: Any) -> list[CudaTensor]:
    found = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, CudaTensor)]
    return found
