"""Value tables: matrices of rows that may lie in RAM or on disk, read through a cache of hot rows.

This package imports nothing of ours but `memlane.native` and is usable on its own.
"""

from memlane.tables.errors import RowReadError, TableError, TableFormatError
from memlane.tables.gpu_table import GpuTable
from memlane.tables.layout import RowFormat, TableLayout
from memlane.tables.protocol import Lookup, Table
from memlane.tables.quantize import decode_rows, encode_rows
from memlane.tables.reference import ReferenceTable
from memlane.tables.stats import TableStats
from memlane.tables.table import Placement, ValueTable
from memlane.tables.writer import write_table

ServedTable = ValueTable | GpuTable  # what an engine serves from, and a model looks rows up in

__all__ = [
    "GpuTable",
    "Lookup",
    "Placement",
    "ReferenceTable",
    "RowFormat",
    "RowReadError",
    "ServedTable",
    "Table",
    "TableError",
    "TableFormatError",
    "TableLayout",
    "TableStats",
    "ValueTable",
    "decode_rows",
    "encode_rows",
    "write_table",
]
