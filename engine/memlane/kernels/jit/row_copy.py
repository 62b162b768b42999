"""Rows from one memory into slots of another, as many as a number on the device says. Grid: `kernels.row_copy`."""

import triton
import triton.language as tl


@triton.jit
def copy_rows(
    source, source_rows, dest, dest_slots, count,
    SOURCE_STRIDE: tl.constexpr,  # this and what follows in units of so many bytes as an element has
    DEST_STRIDE: tl.constexpr,
    LENGTH: tl.constexpr,  # of a row, what is copied
    VECTOR: tl.constexpr,  # 16 bytes
    SHIFTED: tl.constexpr,  # rows of the source do not all start on a whole vector
    PIECES: tl.constexpr,  # of a row
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,  # of which a program has pieces in flight
):  # fmt: skip
    """Programs take turns at pieces [ROWS, PIECE] until all rows are done.

    Whole vectors are read, always: over a link a request costs more than its bytes. A row that starts within a vector is
    read from the start of that vector to the end of its last one, and stored shifted, in small units: stores are cheap.
    What is read too much lies within one aligned vector with bytes of the row, so never on another page.
    """
    listed = tl.load(count)
    column = tl.arange(0, PIECE)
    items = tl.cdiv(listed, ROWS) * PIECES
    item = tl.program_id(0)
    while item < items:
        at = (item // PIECES) * ROWS + tl.arange(0, ROWS)
        wanted = at < listed
        row = tl.load(source_rows + at, mask=wanted, other=0).to(tl.int64)
        slot = tl.load(dest_slots + at, mask=wanted, other=0).to(tl.int64)
        position = ((item % PIECES) * PIECE + column).to(tl.int32)
        if SHIFTED:
            start = row * SOURCE_STRIDE
            lead = (start % VECTOR).to(tl.int32)
            end = (lead + LENGTH + VECTOR - 1) // VECTOR * VECTOR
            at_vector = start // VECTOR * VECTOR
            value = tl.load(
                source + at_vector[:, None] + position[None, :],
                mask=wanted[:, None] & (position[None, :] < end[:, None]),
                eviction_policy="evict_first",
            )
            to = position[None, :] - lead[:, None]
            within = wanted[:, None] & (to >= 0) & (to < LENGTH)
            tl.store(dest + (slot * DEST_STRIDE)[:, None] + to, value, mask=within)
        else:
            within = wanted[:, None] & (position < LENGTH)[None, :]
            value = tl.load(
                source + (row * SOURCE_STRIDE)[:, None] + position[None, :],
                mask=within,
                eviction_policy="evict_first",
            )
            tl.store(dest + (slot * DEST_STRIDE)[:, None] + position[None, :], value, mask=within)
        item += tl.num_programs(0)
