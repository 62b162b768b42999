"""Value tables: matrices of rows that may lie in RAM or on disk, read through a cache of hot rows.

This package imports nothing of ours but `memlane.native` and is usable on its own.
"""

from memlane.tables.errors import RowReadError, TableError, TableFormatError
from memlane.tables.protocol import Table
from memlane.tables.reference import ReferenceTable

__all__ = ["ReferenceTable", "RowReadError", "Table", "TableError", "TableFormatError"]
