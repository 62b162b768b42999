"""CRC32C as its definition has it, a byte at a time in plain Python: the twin of everything that computes checksums."""

from __future__ import annotations

import functools


@functools.cache
def _divided(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


def crc32c(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ _divided(register & 0xFF ^ byte)
    return register ^ 0xFFFFFFFF


def block_sums(data: bytes) -> list[int]:
    """Of each block of 4,096 bytes; the last may be shorter."""
    return [crc32c(data[at : at + 4096]) for at in range(0, len(data), 4096)]
