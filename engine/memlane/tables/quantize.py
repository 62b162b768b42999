"""Rows as floats <-> rows as stored bytes, for every row format. Works on chunks; holds no table.

int8  scale = fp16(max |w| / 127); code = round half to even(w / scale), clamped to [-127, 127]
int4  m = the entry of largest |w|, with its sign (the first on ties); scale = fp16(m / -8), so that m is exactly
      representable (code -8) and the opposite sign saturates at 7; code = round half to even(w / scale), clamped to
      [-8, 7]; stored nibble = code + 8. This is sparse-memory-lm's form: the scale is negative where m > 0.
fp8   scale = fp16(max |w| / 448); code = e4m3(w / scale), round to nearest even, clamped to [-448, 448]. The codes
      0x7F and 0xFF, NaN in e4m3, are never written; reading takes them for what their bits go on to: 480 and -480.
A scale of 0 (an all-zero row, or one below fp16's range) becomes 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from memlane.tables.errors import TableFormatError
from memlane.tables.layout import RowFormat

__all__ = ["decode_rows", "encode_rows", "pack_int4", "requantize", "unpack_int4"]

_PLAIN = {
    RowFormat.FLOAT32: torch.float32,
    RowFormat.BFLOAT16: torch.bfloat16,
    RowFormat.FLOAT16: torch.float16,
}

_LARGEST_E4M3 = 448


def encode_rows(values: Tensor, row_format: RowFormat) -> Tensor:
    """Float rows [n, width] of any float dtype -> stored bytes, uint8 [n, stride].

    TableFormatError where a quantised row holds infinities or NaNs, or is too large for an fp16 scale.
    """
    values = values.detach().cpu()
    row_format.stride(values.shape[1])  # refuses odd int4 widths
    if row_format in _PLAIN:
        return values.to(_PLAIN[row_format]).contiguous().view(torch.uint8).reshape(len(values), -1)
    floats = values.to(torch.float32)
    if row_format is RowFormat.INT8:
        largest = floats.abs().amax(dim=1, keepdim=True)
        scale = _scale(largest / 127)
        codes = torch.round(floats / scale.float()).clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    elif row_format is RowFormat.FP8:
        scale = _scale(floats.abs().amax(dim=1, keepdim=True) / _LARGEST_E4M3)
        codes = (floats / scale.float()).clamp_(-_LARGEST_E4M3, _LARGEST_E4M3)  # beyond it torch writes NaN
        codes = codes.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        at = floats.abs().argmax(dim=1, keepdim=True)
        scale = _scale(floats.gather(1, at) / -8)
        codes = pack_int4(torch.round(floats / scale.float()).clamp_(-8, 7).to(torch.int8) + 8)
    return torch.cat([codes, scale.contiguous().view(torch.uint8)], dim=1)


def decode_rows(stored: Tensor, row_format: RowFormat, width: int) -> Tensor:
    """Stored bytes, uint8 [n, stride] -> fp32 rows [n, width], as the kernels see them."""
    if stored.dtype != torch.uint8 or stored.shape[1] != row_format.stride(width):
        raise TableFormatError(
            f"{row_format.value} rows of width {width} are not {list(stored.shape)} {stored.dtype}"
        )
    if row_format in _PLAIN:
        return stored.contiguous().view(_PLAIN[row_format]).to(torch.float32)
    scale = stored[:, -2:].contiguous().view(torch.float16).float()
    if row_format is RowFormat.INT8:
        return stored[:, :-2].contiguous().view(torch.int8).float() * scale
    if row_format is RowFormat.FP8:
        codes = stored[:, :-2].contiguous()
        numbers = codes.view(torch.float8_e4m3fn).float()
        numbers[codes == 0x7F], numbers[codes == 0xFF] = 480.0, -480.0
        return numbers * scale
    return (unpack_int4(stored[:, :-2]).float() - 8) * scale


def requantize(chunks: Iterable[Tensor], row_format: RowFormat) -> Iterator[Tensor]:
    """Encodes a stream of float chunks [n, width]; memory is one chunk's."""
    for chunk in chunks:
        yield encode_rows(chunk, row_format)


def pack_int4(nibbles: Tensor) -> Tensor:
    """0..15 [n, width] -> uint8 [n, width/2]: low nibble = column k, high nibble = column k + width/2."""
    half = nibbles.shape[1] // 2
    nibbles = nibbles.to(torch.uint8)
    return nibbles[:, :half] | (nibbles[:, half:] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [n, width/2] -> 0..15 as uint8 [n, width]."""
    return torch.cat([packed & 15, packed >> 4], dim=1)


def _scale(exact: Tensor) -> Tensor:
    scale = exact.to(torch.float16)
    if not torch.isfinite(scale).all():
        raise TableFormatError("a row holds values that an fp16 scale cannot express")
    return torch.where(scale == 0, torch.ones_like(scale), scale)
