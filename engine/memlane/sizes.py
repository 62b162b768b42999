"""Bytes as people read them."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["format_size", "format_size_that_holds"]


class _Unit(NamedTuple):
    name: str
    bytes: int


_UNITS = (_Unit("GiB", 1 << 30), _Unit("MiB", 1 << 20), _Unit("KiB", 1 << 10))


def format_size(count: int) -> str:
    """`3.2 GiB`, with one decimal."""
    return f"{count / _unit(count).bytes:.1f} {_unit(count).name}"


def format_size_that_holds(count: int) -> str:
    """`format_size` rounded up: taken as advice, it must suffice."""
    unit = _unit(count)
    return f"{math.ceil(10 * count / unit.bytes) / 10:.1f} {unit.name}"


def _unit(count: int) -> _Unit:
    return next((unit for unit in _UNITS if abs(count) >= unit.bytes), _UNITS[-1])
