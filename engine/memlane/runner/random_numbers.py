"""Random numbers as a function of (seed, position), with no state to keep, copy or restore."""

from __future__ import annotations

__all__ = ["derive_seed", "uniform"]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection on 64 bits that spreads every input bit."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive_seed(seed: int, index: int) -> int:
    """A seed for member `index` of a family; members do not overlap in practice."""
    return _mix((_mix(seed & _MASK) + (index + 1) * _GOLDEN) & _MASK)


def uniform(seed: int, position: int) -> float:
    """A number in the open interval (0, 1) with 52 random bits."""
    return (float(derive_seed(seed, position) >> 12) + 0.5) * 2.0**-52
