"""Triton's interpreter runs programs one after the other. Here they run at once, switching at random at every access to
memory, so that races come up without a GPU; even words of one load are read at different times.
"""

from __future__ import annotations

import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl  # noqa: F401 - the interpreter looks for it among the globals of what it runs
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, interpreter_builder

_ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw")


class _Programs:
    """The programs of one launch, one thread each, of which one runs at a time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.waiting: list[tuple[tuple[int, ...], Callable[[], None]]] = []
        self.turns: dict[int, threading.Event] = {}
        self.indices: dict[int, tuple[int, ...]] = {}
        self.done = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        self.done.clear()
        threads = []
        for number, (index, program) in enumerate(self.waiting):
            self.turns[number], self.indices[number] = threading.Event(), index
            threads.append(threading.Thread(target=self._run_one, args=(number, program), name=str(number)))
        self.waiting = []
        for thread in threads:
            thread.start()
        self._next()
        self.done.wait()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def pause(self) -> None:
        """Lets a random program go on, perhaps the one that asks."""
        name = threading.current_thread().name
        if not (name.isdigit() and int(name) in self.turns):
            return  # a launch that is not interleaved
        self.turns[int(name)].clear()
        self._next()
        self._wait(int(name))

    def _wait(self, number: int) -> None:
        self.turns[number].wait()
        interpreter_builder.set_grid_idx(*self.indices[number])

    def _next(self) -> None:
        if self.turns:
            self.turns[self.rng.choice(list(self.turns))].set()
        else:
            self.done.set()

    def _run_one(self, number: int, program: Callable[[], None]) -> None:
        self._wait(number)
        try:
            program()
        except BaseException as error:  # noqa: BLE001 - handed on to the launching thread
            self.failure = error
        del self.turns[number]
        self._next()


def _in_pieces(
    load: Callable[..., Any], programs: _Programs, ptrs: Any, mask: Any, other: Any, *rest: Any
) -> Any:
    """A load of a matrix column by column, in random order, others running in between."""
    columns = ptrs.data.shape[1]
    cuts = sorted(programs.rng.sample(range(1, columns), 3))
    pieces = np.split(np.arange(columns), cuts)
    programs.rng.shuffle(pieces)
    result = None
    for piece in pieces:
        programs.pause()
        part = [
            None if handle is None else TensorHandle(handle.data[:, piece], handle.dtype)
            for handle in (ptrs, mask, other)
        ]
        loaded = load(*part, *rest)
        if result is None:
            result = TensorHandle(np.empty(ptrs.data.shape, loaded.data.dtype), loaded.dtype)
        result.data[:, piece] = loaded.data
    return result


@contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """Within it, the programs of every launch run at once, in an order that depends on the seed."""
    programs = _Programs(random.Random(seed))

    class Executor(interpreter.GridExecutor):
        def __init__(self, fn: Any, arg_names: Any, grid: Any, *rest: Any) -> None:
            @functools.wraps(fn)
            def collect(**arguments: Any) -> None:
                programs.waiting.append((interpreter_builder.grid_idx, functools.partial(fn, **arguments)))
                if len(programs.waiting) == int(np.prod(grid)):
                    programs.run()

            collect.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
            super().__init__(collect, arg_names, grid, *rest)

    def switching(access: Callable[..., Any]) -> Callable[..., Any]:
        def switched(*arguments: Any) -> Any:
            if access.__name__ == "create_masked_load" and np.ndim(arguments[0].data) == 2:
                return _in_pieces(access, programs, *arguments)
            programs.pause()
            return access(*arguments)

        return switched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "GridExecutor", Executor)
        for name in _ACCESSES:
            patch.setattr(interpreter_builder, name, switching(getattr(interpreter_builder, name)))
        yield
