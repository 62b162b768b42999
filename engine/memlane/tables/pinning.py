"""Host memory that a GPU reads in place: registered with CUDA piece by piece, so that it can say how far it has come."""

from __future__ import annotations

import logging
import mmap
import resource
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from memlane.native import Arena
from memlane.tables.errors import TableError
from memlane.tables.progress import Progress, in_words

__all__ = ["PIECE_BYTES", "PinnedRange", "Register", "Unregister"]

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 30  # registered at once: some tenths of a second

Register = Callable[[int, int], int]  # address, bytes -> CUDA's error code, 0 for success
Unregister = Callable[[int], int]  # address -> likewise

_PAGE = mmap.PAGESIZE
_FLAGS = (
    1 | 2
)  # cudaHostRegisterPortable: for every CUDA context; cudaHostRegisterMapped: readable by kernels
_MEANINGS = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    712: "cudaErrorHostMemoryAlreadyRegistered",
    713: "cudaErrorHostMemoryNotRegistered",
    801: "cudaErrorNotSupported",
}


class PinnedRange:
    """Memory from a page's beginning on that GPUs read at its own address, until closed. A context manager.

    Whoever closes it has waited for the kernels that read it. One thread.
    """

    def __init__(
        self,
        address: int,
        nbytes: int,
        *,
        what: str = "memory",
        device: torch.device | str | int | None = None,
        register: Register | None = None,
        unregister: Unregister | None = None,
        piece_bytes: int = PIECE_BYTES,
        keep: object = None,
    ) -> None:
        """Pins all of it now, whole pages at both ends. address: on a page's beginning. what: for messages.

        device: whose CUDA context is used; all of them may read. register, unregister: CUDA's own unless given.
        keep: what owns the memory, kept while it is pinned. TableError, with nothing left pinned, where the driver
        refuses: it names the limit to raise.
        """
        if address % _PAGE or piece_bytes % _PAGE or piece_bytes <= 0:
            raise ValueError(
                f"address {address:#x} and pieces of {piece_bytes} bytes must be multiples of {_PAGE}"
            )
        self.address, self.nbytes = address, nbytes
        register = register or _cuda_register(device)
        self._unregister = unregister or _cuda_unregister(device)
        self._what = what
        self._pieces: list[int] = []
        # The process's end takes the driver with it: nothing to be done there.
        self._close = weakref.finalize(self, _unregister_all, self._pieces, self._unregister, what, keep)
        self._close.atexit = False
        size = -(-nbytes // _PAGE) * _PAGE
        progress = Progress(what, "pinned for the GPU", size)
        for begin in range(0, size, piece_bytes):
            count = min(piece_bytes, size - begin)
            code = register(address + begin, count)
            if code:
                self._close()
                raise _refused(what, code, begin, count, size)
            self._pieces.append(address + begin)
            progress.advance(count)
        progress.finish()

    @classmethod
    def of_arena(
        cls,
        arena: Arena,
        *,
        what: str = "memory",
        device: torch.device | str | int | None = None,
        register: Register | None = None,
        unregister: Unregister | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> PinnedRange:
        """The memory of the native core: a whole table, or the slots of a row cache. All of it becomes resident."""
        address = int(arena.array().ctypes.data) if arena.nbytes else 0
        return cls(
            address,
            arena.nbytes,
            what=what,
            device=device,
            register=register,
            unregister=unregister,
            piece_bytes=piece_bytes,
            keep=arena,
        )

    @property
    def pieces(self) -> int:
        """How many pieces are registered; 0 once closed."""
        return len(self._pieces)

    def close(self) -> None:
        """Unpins it. Idempotent."""
        self._close()

    def __enter__(self) -> PinnedRange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _cuda_register(device: torch.device | str | int | None) -> Register:
    def register(address: int, nbytes: int) -> int:
        with torch.cuda.device(device):
            return int(_cudart().cudaHostRegister(address, nbytes, _FLAGS))

    return register


def _cuda_unregister(device: torch.device | str | int | None) -> Unregister:
    def unregister(address: int) -> int:
        with torch.cuda.device(device):
            return int(_cudart().cudaHostUnregister(address))

    return unregister


def _unregister_all(pieces: list[int], unregister: Unregister, what: str, keep: object) -> None:
    """keep: only held until then."""
    while pieces:
        address = pieces.pop()
        code = unregister(address)
        if code:
            logger.warning("%s: memory at %#x could not be unpinned: %s", what, address, _meaning(code))


def _refused(what: str, code: int, begin: int, count: int, size: int) -> TableError:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limits = f"ulimit -l {_limit(soft)}, at most {_limit(hard)}"
    if soft != resource.RLIM_INFINITY and soft < size:
        advice = (
            f"a process may lock too little memory ({limits}): raise that with `ulimit -l unlimited`, docker run "
            "--ulimit memlock=-1, LimitMEMLOCK=infinity of the service that starts it, or, on Kubernetes, of the "
            "node's container runtime"
        )
    else:
        advice = (
            f"the limit on locked memory is not in the way ({limits}); the machine's free memory or its control "
            "group's memory limit may be"
        )
    return TableError(
        f"{what}: CUDA refused to pin {in_words(count)} after {in_words(begin)} of {in_words(size)}: "
        f"{_meaning(code)}; {advice}"
    )


def _limit(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else in_words(limit)


def _meaning(code: int) -> str:
    return f"{_MEANINGS.get(code, 'CUDA error')} ({code})"
