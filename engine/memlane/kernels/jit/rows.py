"""Sums, inner products and copies of rows. What they compute, memlane.kernels.rows says, which launches them.

Slots come as 32-bit words, `slot_step` words apart: of a 64-bit slot the low word is read, which holds all of it.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class RowLayout(NamedTuple):
    """How rows lie, as one constant of a kernel. Offsets and strides count units: the numbers, or bytes of codes."""

    row_format: str
    units: int  # of a row: its numbers, or for int4, whose bytes hold two, half as many
    near_stride: int
    far_stride: int
    has_far: bool
    scale: str  # "none"; "half": can be loaded as fp16; "bytes": lies on an odd address


@triton.jit
def _row(near, far, slot, LAYOUT: tl.constexpr):
    """Where the row in slot `slot` begins. 64 bits: tables are larger than 4 GiB."""
    wide = slot.to(tl.int64)
    row = near + wide * LAYOUT.near_stride
    if LAYOUT.has_far:
        row = tl.where(wide >= 0, row, far + (-1 - wide) * LAYOUT.far_stride)
    return row


@triton.jit
def _scale(row, LAYOUT: tl.constexpr):
    """The scale of a row, fp32. The numbers of fp8 codes come out 256 times too small, which it makes up for."""
    if LAYOUT.scale == "half":
        scale = tl.load((row + LAYOUT.units).to(tl.pointer_type(tl.float16)))
    else:
        low = tl.load(row + LAYOUT.units).to(tl.uint16)
        high = tl.load(row + LAYOUT.units + 1).to(tl.uint16)
        scale = (low | (high << 8)).to(tl.float16, bitcast=True)
    if LAYOUT.row_format == "fp8":
        return scale.to(tl.float32) * 256.0
    else:
        return scale.to(tl.float32)


@triton.jit
def _numbers(codes, HIGH: tl.constexpr, LAYOUT: tl.constexpr):
    """Stored units to fp32, exactly. HIGH: of int4, the number in the high half of each byte.

    A small n >= 0 becomes a float as the last bits of 2^23 + n: conversion instructions run at a fraction of the rate.
    """
    if LAYOUT.row_format == "int8":
        biased = (codes ^ 0x80).to(tl.int32) | 0x4B000000
        return biased.to(tl.float32, bitcast=True) - 8388736.0  # 2^23 + 128
    elif LAYOUT.row_format == "int4":
        nibbles = codes.to(tl.int32)
        nibbles = (nibbles >> 4 if HIGH else nibbles & 15) | 0x4B000000
        return nibbles.to(tl.float32, bitcast=True) - 8388616.0  # 2^23 + 8
    elif LAYOUT.row_format == "fp8":  # the fp16 number with the code's bits is the code's number / 256
        bits = codes.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return codes.to(tl.float32)


@triton.jit
def _load_units(row, units, WHOLE: tl.constexpr, LAYOUT: tl.constexpr):
    """These units of a row, past the first-level cache: nothing is read twice there. The second level may keep hot rows."""
    if WHOLE:
        return tl.load(row + units, cache_modifier=".cg")
    else:
        return tl.load(row + units, units < LAYOUT.units, other=0, cache_modifier=".cg")


@triton.jit
def _load_scalars(base, first, COUNT: tl.constexpr, STEP: tl.constexpr):
    scalars = ()
    for j in tl.static_range(COUNT):
        scalars = scalars + (tl.load(base + (first + j) * STEP),)
    return scalars


@triton.jit
def _zero_sums(BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    if LAYOUT.row_format == "int4":
        return (tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32))
    else:
        return (tl.zeros([BLOCK], tl.float32),)


@triton.jit
def _add_row(sums, weight, codes, LAYOUT: tl.constexpr):
    low = tl.fma(weight, _numbers(codes, False, LAYOUT), sums[0])
    if LAYOUT.row_format == "int4":
        return (low, tl.fma(weight, _numbers(codes, True, LAYOUT), sums[1]))
    else:
        return (low,)


@triton.jit
def _add_rows(
    sums, near, far, slots, weights, units, COUNT: tl.constexpr, WHOLE: tl.constexpr, LAYOUT: tl.constexpr
):
    """Adds COUNT rows in their order. All are asked for before the first is used."""
    rows = ()
    for j in tl.static_range(COUNT):
        rows = rows + (_load_units(_row(near, far, slots[j], LAYOUT), units, WHOLE, LAYOUT),)
    scaled = ()
    for j in tl.static_range(COUNT):
        if LAYOUT.scale == "none":
            scaled = scaled + (weights[j],)
        else:
            scaled = scaled + (weights[j] * _scale(_row(near, far, slots[j], LAYOUT), LAYOUT),)
    for j in tl.static_range(COUNT):
        sums = _add_row(sums, scaled[j], rows[j], LAYOUT)
    return sums


@triton.jit
def _store_numbers(out, sums, units, LAYOUT: tl.constexpr):
    tl.store(out + units, sums[0], units < LAYOUT.units)
    if LAYOUT.row_format == "int4":
        tl.store(out + LAYOUT.units + units, sums[1], units < LAYOUT.units)


@triton.jit
def weighted_sum(
    near,
    far,
    slots,
    weights,
    out,
    LAYOUT: tl.constexpr,
    K: tl.constexpr,
    SLOT_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program p adds BLOCK units of the K rows of token p // BLOCKS, GROUP rows at a time; GROUP <= K.

    Slots and weights are read one group ahead, or every group would wait for two reads, one after the other.
    """
    BLOCKS: tl.constexpr = (LAYOUT.units + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = LAYOUT.units % BLOCK == 0
    WIDTH: tl.constexpr = LAYOUT.units * 2 if LAYOUT.row_format == "int4" else LAYOUT.units
    REST: tl.constexpr = K % GROUP
    program = tl.program_id(0)
    token = (program // BLOCKS).to(tl.int64)
    units = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    slots += token * (K * SLOT_STEP)
    weights += token * K
    sums = _zero_sums(BLOCK, LAYOUT)
    group_slots = _load_scalars(slots, 0, GROUP, SLOT_STEP)
    group_weights = _load_scalars(weights, 0, GROUP, 1)
    for following in range(GROUP, K - REST, GROUP):
        next_slots = _load_scalars(slots, following, GROUP, SLOT_STEP)
        next_weights = _load_scalars(weights, following, GROUP, 1)
        sums = _add_rows(sums, near, far, group_slots, group_weights, units, GROUP, WHOLE, LAYOUT)
        group_slots = next_slots
        group_weights = next_weights
    last_slots = _load_scalars(slots, K - REST, REST, SLOT_STEP)
    last_weights = _load_scalars(weights, K - REST, REST, 1)
    sums = _add_rows(sums, near, far, group_slots, group_weights, units, GROUP, WHOLE, LAYOUT)
    sums = _add_rows(sums, near, far, last_slots, last_weights, units, REST, WHOLE, LAYOUT)
    _store_numbers(out + token * WIDTH, sums, units, LAYOUT)


@triton.jit
def gather(
    near,
    far,
    slots,
    out,
    n,
    LAYOUT: tl.constexpr,
    SLOT_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program p copies BLOCK units of rows [g * GROUP, (g + 1) * GROUP) of n, with g = p // BLOCKS, as numbers."""
    BLOCKS: tl.constexpr = (LAYOUT.units + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = LAYOUT.units % BLOCK == 0
    WIDTH: tl.constexpr = LAYOUT.units * 2 if LAYOUT.row_format == "int4" else LAYOUT.units
    program = tl.program_id(0)
    first = (program // BLOCKS).to(tl.int64) * GROUP
    units = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    # The last group repeats the last row where rows are missing: the same bytes are then written more than once.
    index = ()
    rows = ()
    for j in tl.static_range(GROUP):
        index = index + (tl.minimum(first + j, n - 1),)
        row = _row(near, far, tl.load(slots + index[j] * SLOT_STEP), LAYOUT)
        rows = rows + ((row, _load_units(row, units, WHOLE, LAYOUT)),)
    for j in tl.static_range(GROUP):
        weight = 1.0 if LAYOUT.scale == "none" else _scale(rows[j][0], LAYOUT)
        sums = _add_row(_zero_sums(BLOCK, LAYOUT), weight, rows[j][1], LAYOUT)
        _store_numbers(out + index[j] * WIDTH, sums, units, LAYOUT)


@triton.jit
def _dot_steps(
    sums,
    row,
    x,
    first,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Adds COUNT * 16 columns from `first` on to the 16 partial sums of each row. WHOLE: none is beyond COLUMNS."""
    lane = tl.arange(0, 16)[None, :]
    codes = ()
    for j in tl.static_range(COUNT):
        columns = first + 16 * j + lane
        units = columns
        if PART == "both":
            units = tl.where(columns < LAYOUT.units, columns, columns - LAYOUT.units)
        if WHOLE:
            codes = codes + (tl.load(row + units, cache_modifier=".cg"),)
        else:
            codes = codes + (tl.load(row + units, columns < COLUMNS, other=0, cache_modifier=".cg"),)
    for j in tl.static_range(COUNT):
        columns = first + 16 * j + lane
        numbers = _numbers(codes[j], PART == "high", LAYOUT)
        if PART == "both":
            numbers = tl.where(columns < LAYOUT.units, numbers, _numbers(codes[j], True, LAYOUT))
        if WHOLE:
            sums = tl.fma(numbers, tl.load(x + columns), sums)
        else:  # as the processor's kernel: beyond the last column, zeros times zeros
            numbers = tl.where(columns < COLUMNS, numbers, 0.0)
            sums = tl.fma(numbers, tl.load(x + columns, columns < COLUMNS, other=0.0), sums)
    return sums


@triton.jit
def _dot_columns(
    sums, row, x, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, LAYOUT: tl.constexpr
):
    STEPS: tl.constexpr = COLUMNS // 16
    REST: tl.constexpr = STEPS % GROUP
    for first in range(0, (STEPS - REST) * 16, GROUP * 16):
        sums = _dot_steps(sums, row, x, first, GROUP, True, COLUMNS, PART, LAYOUT)
    sums = _dot_steps(sums, row, x, (STEPS - REST) * 16, REST, True, COLUMNS, PART, LAYOUT)
    if COLUMNS % 16:
        sums = _dot_steps(sums, row, x, STEPS * 16, 1, False, COLUMNS, PART, LAYOUT)
    return sums


@triton.jit
def dot(
    near,
    far,
    slots,
    x,
    weights,
    out,
    LAYOUT: tl.constexpr,
    K: tl.constexpr,
    SLOT_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATE: tl.constexpr,
):
    """Program p multiplies rows [b * ROWS, (b + 1) * ROWS) of token p // BLOCKS with its x, b = p % BLOCKS.

    As on the processor: column c belongs to partial sum c % 16, and these are added in a tree. So a warp reads a step of
    32 bytes (a sector) of each of 16 bf16 rows at once, and all of a row passes through two threads.
    ACTIVATE: gelu(product) * weight instead of the product.
    """
    BLOCKS: tl.constexpr = (K + ROWS - 1) // ROWS
    INT4: tl.constexpr = LAYOUT.row_format == "int4"
    WIDTH: tl.constexpr = LAYOUT.units * 2 if INT4 else LAYOUT.units
    program = tl.program_id(0)
    token = (program // BLOCKS).to(tl.int64)
    place = (program % BLOCKS) * ROWS + tl.arange(0, ROWS)
    at = token * K + tl.minimum(place, K - 1)  # the last row again where there are none
    row = _row(near, far, tl.load(slots + at * SLOT_STEP), LAYOUT)
    x += token * WIDTH
    sums = tl.zeros([ROWS, 16], tl.float32)
    if INT4 and LAYOUT.units % 16 == 0:  # bytes are read twice, the second time from the cache
        sums = _dot_columns(sums, row[:, None], x, LAYOUT.units, GROUP, "low", LAYOUT)
        sums = _dot_columns(sums, row[:, None], x + LAYOUT.units, LAYOUT.units, GROUP, "high", LAYOUT)
    elif INT4:  # some step holds the last low and the first high numbers
        sums = _dot_columns(sums, row[:, None], x, WIDTH, GROUP, "both", LAYOUT)
    else:
        sums = _dot_columns(sums, row[:, None], x, WIDTH, GROUP, "low", LAYOUT)
    for level in tl.static_range(4):  # partial sum l + partial sum l + 8, then 4, 2, 1
        low, high = tl.split(tl.trans(tl.reshape(sums, [ROWS, 2, 8 >> level]), 0, 2, 1))
        sums = low + high
    product = tl.reshape(sums, [ROWS])
    if LAYOUT.scale != "none":
        product = product * _scale(row, LAYOUT)
    if ACTIVATE:
        product = 0.5 * product * (1.0 + tl.erf(product * 0.7071067811865476)) * tl.load(weights + at)
    tl.store(out + token * K + place, product, place < K)
