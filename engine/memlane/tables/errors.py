"""What can go wrong with a value table. Imports nothing of ours, so that tables stay usable on their own."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["RowReadError", "TableError", "TableFormatError"]


class TableError(Exception):
    """Base of everything this package raises about a table (bad ids raise IndexError, bad shapes ValueError)."""


class TableFormatError(TableError):
    """The file does not hold the table it should: bad header, wrong shape or dtype, wrong size."""


class RowReadError(TableError):
    """Some rows could not be read. The table stays usable; rows that were read are intact.

    table: name of the table.
    rows: ids of the rows that failed, ascending.
    reason: the failure of the first bad row in words, with errno where there is one.
    tokens: indices of the batch's tokens that needed a bad row, ascending (empty where there is no batch).
    """

    def __init__(self, table: str, rows: Sequence[int], reason: str, tokens: Sequence[int] = ()) -> None:
        self.table = table
        self.rows = list(rows)
        self.reason = reason
        self.tokens = list(tokens)
        shown = ", ".join(map(str, self.rows[:8])) + (", ..." if len(self.rows) > 8 else "")
        super().__init__(f"table {table!r}: {len(self.rows)} row(s) could not be read ({shown}): {reason}")
