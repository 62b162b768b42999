"""Stored rows against scalar arithmetic and against the published 4-bit table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from memlane.tables import RowFormat, TableFormatError, decode_rows, encode_rows
from memlane.tables.quantize import pack_int4, unpack_int4


def int4_row(row: np.ndarray) -> tuple[list[int], float]:
    """The 4-bit form of one row, number by number."""
    largest = row[np.argmax(np.abs(row))]
    scale = np.float16(np.float32(largest) / np.float32(-8))
    if scale == 0:
        scale = np.float16(1)
    codes = [int(np.clip(np.round(np.float32(x) / np.float32(scale)), -8, 7)) for x in row]
    return codes, float(scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_rows_are_the_numbers_themselves(dtype: torch.dtype) -> None:
    values = torch.randn(7, 5).to(dtype)
    row_format = RowFormat(str(dtype).removeprefix("torch."))
    stored = encode_rows(values, row_format)
    assert stored.shape == (7, row_format.stride(5))
    assert torch.equal(decode_rows(stored, row_format, 5), values.float())


def test_int4_follows_the_scalar_twin() -> None:
    values = torch.randn(200, 10)
    values[0] = 0
    values[1] = values[1].abs()
    values[2] = -values[2].abs()
    values[3] = 1e-9
    values[4, 2], values[4, 7] = -9.0, 9.0  # equal magnitude: the first decides the sign
    stored = encode_rows(values, RowFormat.INT4)
    decoded = decode_rows(stored, RowFormat.INT4, 10)
    for row in range(200):
        codes, scale = int4_row(values[row].numpy())
        assert (unpack_int4(stored[row : row + 1, :-2])[0].int() - 8).tolist() == codes
        assert decoded[row].tolist() == pytest.approx([code * scale for code in codes], abs=0)


def test_int4_matches_the_published_form(data: Path) -> None:
    golden = load_file(data / "smlm" / "bf16_kernels" / "expected.safetensors")
    packed, scales = golden["packed_q4"], golden["scales_q4"]
    stored = torch.cat([packed, scales[:, None].view(torch.uint8)], dim=1)
    decoded = decode_rows(stored, RowFormat.INT4, 32)
    low, high = (packed & 15).int() - 8, (packed >> 4).int() - 8
    assert torch.equal(decoded, torch.cat([low, high], dim=1) * scales.float()[:, None])
    assert (scales < 0).any()
    # Quantising the decoded rows again gives the same bytes wherever the row's largest entry decides its scale.
    again = encode_rows(decoded, RowFormat.INT4)
    same = (again == stored).all(dim=1)
    assert same.float().mean() > 0.9


def test_int8_error_is_half_a_step() -> None:
    values = torch.randn(300, 33) * torch.logspace(-3, 3, 300)[:, None]
    decoded = decode_rows(encode_rows(values, RowFormat.INT8), RowFormat.INT8, 33)
    step = values.abs().amax(dim=1, keepdim=True) / 127
    assert ((decoded - values).abs() <= 0.56 * step).all()  # half a step, and the scale's own fp16 rounding


def e4m3_numbers() -> np.ndarray:
    """The 127 numbers of e4m3 that are not negative, by their definition; index = code."""
    numbers = [m / 8 * 2.0**-6 for m in range(8)]  # subnormal
    numbers += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array(numbers[:127])


def fp8_row(row: np.ndarray) -> tuple[list[float], float]:
    """The fp8 form of one row, number by number: the nearest number of e4m3, on ties the one of even code."""
    numbers = e4m3_numbers()
    scale = np.float16(np.float32(np.abs(row).max()) / np.float32(448))
    if scale == 0:
        scale = np.float16(1)
    stored = []
    for x in row:
        far = np.abs(numbers - min(float(np.float32(abs(x)) / np.float32(scale)), 448.0))
        nearest = np.flatnonzero(far == far.min())
        code = nearest[0] if nearest[0] % 2 == 0 else nearest[-1]
        stored.append(float(np.copysign(numbers[code], x)))
    return stored, float(scale)


def test_fp8_follows_the_scalar_twin() -> None:
    values = torch.randn(60, 10)
    values[0] = 0
    values[1] = 1e-9  # below fp16's range even as a scale
    values[2] *= 1e-4  # a scale that fp16 holds with few bits, so that the largest code is clamped
    values[3] *= 1e4
    values[4] = torch.tensor([448, 17, 19, -17, 2**-9, 3 * 2**-10, 2**-10, -(2**-11), 0.0, -448.0])  # ties
    decoded = decode_rows(encode_rows(values, RowFormat.FP8), RowFormat.FP8, 10)
    for row in range(60):
        numbers, scale = fp8_row(values[row].numpy())
        assert decoded[row].tolist() == [number * scale for number in numbers]


def test_every_fp8_code_is_read_as_its_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    stored = torch.cat([codes, torch.tensor([[0.375]], dtype=torch.float16).view(torch.uint8)], dim=1)
    numbers = np.append(e4m3_numbers(), 480.0)  # 0x7F, which nobody writes
    expected = np.concatenate([numbers, -numbers]) * 0.375
    np.testing.assert_array_equal(decode_rows(stored, RowFormat.FP8, 256)[0].numpy(), expected)


def test_fp8_never_writes_a_nan() -> None:
    values = torch.randn(400, 33) * torch.logspace(-8, 6, 400)[:, None]
    codes = encode_rows(values, RowFormat.FP8)[:, :-2]
    assert not ((codes & 0x7F) == 0x7F).any()
    assert ((codes & 0x7F) == 0x7E).any()


def test_nibbles_come_back() -> None:
    nibbles = torch.randint(0, 16, (9, 14), dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(nibbles)), nibbles)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("row_format", [RowFormat.INT8, RowFormat.INT4, RowFormat.FP8])
def test_refuses_what_a_scale_cannot_hold(bad: float, row_format: RowFormat) -> None:
    values = torch.ones(3, 4)
    values[1, 2] = bad
    with pytest.raises(TableFormatError):
        encode_rows(values, row_format)
