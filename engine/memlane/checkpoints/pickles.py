"""Reading pickles as data. Nothing a pickle names is ever imported or called: each allowed name stands for one of our own
inert values or constructors, and any other name is refused before anything is built from it."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memlane.errors import CheckpointError

__all__ = ["Names", "Record", "StateDict", "load_pickle", "record_class"]

Names = Mapping[tuple[str, str], Any]

# What CPython's unpickler raises on bytes that are not a pickle of the expected kind.
_MALFORMED = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
    MemoryError, OverflowError, RecursionError, struct.error,
)  # fmt: skip


class StateDict(dict[Any, Any]):
    """Stands in for collections.OrderedDict; attributes pickled with one (torch's `_metadata`) are dropped."""

    def __setstate__(self, state: object) -> None:
        pass


class Record:
    """An object of a foreign class, as the values it was built from: `args` and the `fields` of its state."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.fields: dict[str, Any] = {}

    def __new__(cls, *args: Any) -> Record:
        self = super().__new__(cls)
        self.args, self.fields = args, {}
        return self

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = {str(k): v for k, v in state.items()}
        else:
            self.args = state if isinstance(state, tuple) else (state,)


def record_class(name: str) -> type[Record]:
    """A fresh Record class standing for a foreign class of that name."""
    return type(name, (Record,), {})


def _check_memo(data: bytes) -> None:
    """Refuse memo indices and lengths that the data cannot fill: the unpickler would allocate gigabytes for them."""
    for opcode, argument, _ in pickletools.genops(data):  # checks lengths itself
        in_memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if in_memo and isinstance(argument, int) and not 0 <= argument <= len(data):
            raise ValueError(f"memo index {argument} in {len(data)} bytes")


class _Refused(Exception):
    """The pickle names something that is not allowed."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, names: Names, storage: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._names, self._storage = names, storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise _Refused("a persistent object")
        return self._storage(pid)


def load_pickle(path: Path, data: bytes, names: Names, storage: Callable[[Any], Any] | None = None) -> Any:
    """The value in the pickle `data`, which came from `path` (for errors). storage: resolves persistent ids.

    Raises CheckpointError if the pickle is malformed or names anything outside `names`.
    """
    try:
        _check_memo(data)
        return _Unpickler(data, names, storage).load()
    except _Refused as error:
        raise CheckpointError(
            path,
            f"refused: its pickle asks for {error}, which a checkpoint has no use for (nothing was executed)",
        ) from None
    except _MALFORMED as error:
        raise CheckpointError(path, f"corrupt pickle: {type(error).__name__}: {error}") from error
