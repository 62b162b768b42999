"""Reads a whole model directory once and compares it with its checksums. Changes nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from tqdm import tqdm

from memlane.checkpoints.comparison import TableComparison, compare_tables, tables_to_compare
from memlane.checkpoints.directory import CHECKSUMS, open_directory, read_config, read_json, table_file_name
from memlane.checkpoints.forms import checkpoint_directory, detect, open_checkpoint
from memlane.checkpoints.source import Checkpoint
from memlane.errors import CheckpointError, ConfigError
from memlane.models.config import ModelConfig
from memlane.tables import RowFormat, TableError, TableLayout
from memlane.tables.scan import RowSpan, TableScan, read_through, scan_table

__all__ = ["FileReport", "ModelReport", "RowSpan", "TableComparison", "TableReport", "check"]


@dataclass(frozen=True)
class FileReport:
    """One file that was compared with its SHA-256 or whose content is read at start. defect: None if it is sound."""

    name: str
    defect: str | None


@dataclass(frozen=True)
class TableReport:
    """One table. defect: why it could not be scanned at all; then `scan` is None.

    verified_by: "blocks" (a checksum for each), "sha256" (of the whole file) or "size" (nothing better is there).
    """

    name: str
    file: str
    defect: str | None = None
    rows: int = 0
    row_format: str = ""
    nbytes: int = 0
    verified_by: Literal["blocks", "sha256", "size"] = "size"
    scan: TableScan | None = None
    comparison: TableComparison | None = None

    @property
    def clean(self) -> bool:
        return self.scan is not None and not (self.defect or self.scan.bad_blocks or self.scan.bad_scales)


@dataclass(frozen=True)
class ModelReport:
    """Everything `check` found. nbytes, seconds: what was read and how long that took, comparison apart."""

    directory: Path
    tables: tuple[TableReport, ...]
    files: tuple[FileReport, ...]
    has_checksum_file: bool
    nbytes: int
    seconds: float

    @property
    def clean(self) -> bool:
        return all(table.clean for table in self.tables) and all(file.defect is None for file in self.files)


def check(path: str | Path, *, against: str | Path | None = None, progress: bool = True) -> ModelReport:
    """Verify a model directory: table blocks, scales, and the SHA-256 of the other files it has one for.

    against: another checkpoint of the same model, of any form; each table is then compared with its namesake.
    Damage is reported, not raised. CheckpointError: no model there, its config cannot be read, or `against` does not
    fit it. ConfigError: a checkpoint of a foreign form.
    """
    form, directory = detect(path), checkpoint_directory(path)
    if form != "memlane":
        raise ConfigError(
            f"{path} is a {form} checkpoint without checksums: convert it, then check the result"
        )
    config = read_config(directory)
    other = None if against is None else open_checkpoint(against)
    if other is not None:
        tables_to_compare(config, other)  # a wrong path is noticed before a long scan, not after
    return _Check(directory, config).run(other, progress)


class _Check:
    """One check in progress."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.directory = directory
        self.config = config
        self.has_checksum_file = (directory / CHECKSUMS).exists()
        self.layouts: dict[str, TableLayout] = {}
        self.defects: dict[str, str] = {}  # file name -> what is wrong with it
        self.sums: Mapping[str, str] = self._checksum_file()

    def run(self, other: Checkpoint | None, progress: bool) -> ModelReport:
        names = self.config.table_names()
        for name in names:
            self._open(name)
        whole = self._structure()
        # where blocks have checksums, the file's own would only read everything twice
        blocks = {layout.path.name for layout in self.layouts.values() if layout.checksum_offset is not None}
        hashed = [name for name in self.sums if name not in blocks and (self.directory / name).is_file()]
        total = sum(layout.nbytes for layout in self.layouts.values())
        total += sum((self.directory / name).stat().st_size for name in hashed)
        started = time.perf_counter()
        with tqdm(total=total, unit="B", unit_scale=True, desc="checking", disable=not progress) as bar:
            for name in self.sums:
                if name in hashed:
                    self._hash(name, bar)
                elif name not in blocks:
                    self.defects.setdefault(name, f"is missing, {CHECKSUMS} lists it")
            tables = [self._scan(name, bar) for name in names]
        seconds = time.perf_counter() - started
        if other is not None and whole is not None:
            tables = self._compare(tables, whole, other, progress)
        own = {table.file for table in tables}
        listed = [name for name in dict.fromkeys([*self.sums, *self.defects]) if name not in own]
        files = tuple(FileReport(name, self.defects.get(name)) for name in listed)
        return ModelReport(self.directory, tuple(tables), files, self.has_checksum_file, total, seconds)

    def _checksum_file(self) -> Mapping[str, str]:
        if not self.has_checksum_file:
            return {}
        try:
            listed = read_json(self.directory / CHECKSUMS)
        except CheckpointError as error:
            self.defects[CHECKSUMS] = error.defect
            return {}
        return {Path(name).name: str(digest) for name, digest in listed.items()}

    def _open(self, name: str) -> None:
        memory = self.config.memory
        assert memory is not None
        path = self.directory / table_file_name(name)
        try:
            self.layouts[name] = TableLayout.from_safetensors(
                path, name, RowFormat(memory.row_format), memory.value_dim
            )
        except TableError as error:
            self.defects[path.name] = str(error).removeprefix(f"{path}: ")
        except OSError as error:
            self.defects[path.name] = f"cannot be read: {error.strerror}"

    def _structure(self) -> Checkpoint | None:
        """The model as it is opened to be served; None where it could not be."""
        try:
            return open_directory(self.directory)
        except CheckpointError as error:
            self.defects.setdefault(Path(error.path).name, error.defect)
            return None

    def _hash(self, name: str, bar: tqdm[NoReturn]) -> None:
        path, digest = self.directory / name, hashlib.sha256()
        try:
            for piece in read_through(path, 0, path.stat().st_size):
                for defect in piece.unreadable.values():
                    self.defects.setdefault(name, defect)
                digest.update(piece.data.data)
                bar.update(len(piece.data))
        except OSError as error:
            self.defects.setdefault(name, f"cannot be read: {error.strerror}")
            return
        if digest.hexdigest() != self.sums[name]:
            self.defects.setdefault(name, f"corrupt: its sha256 is not the one in {CHECKSUMS}")

    def _scan(self, name: str, bar: tqdm[NoReturn]) -> TableReport:
        file = table_file_name(name)
        layout = self.layouts.get(name)
        if layout is None:
            return TableReport(name, file, self.defects.get(file))
        scan = None
        try:
            scan = scan_table(layout, bar.update)
        except TableError as error:  # it was sound a moment ago: somebody is writing to it
            self.defects.setdefault(file, str(error))
        except OSError as error:
            self.defects.setdefault(file, f"cannot be read: {error.strerror}")
        return TableReport(
            name,
            file,
            self.defects.get(file),
            layout.rows,
            layout.dtype.value,
            layout.nbytes,
            "blocks" if layout.checksum_offset is not None else "sha256" if file in self.sums else "size",
            scan,
        )

    def _compare(
        self, tables: list[TableReport], whole: Checkpoint, other: Checkpoint, progress: bool
    ) -> list[TableReport]:
        theirs, ours = tables_to_compare(self.config, other), {table.name: table for table in whole.tables}
        total = sum(table.rows for table in tables)
        compared = []
        with tqdm(total=total, unit="row", unit_scale=True, desc="comparing", disable=not progress) as bar:
            for table in tables:
                if table.scan is not None and not table.scan.bad_blocks:  # others may not even be readable
                    comparison = compare_tables(ours[table.name], theirs[table.name], bar.update)
                    table = dataclasses.replace(table, comparison=comparison)
                compared.append(table)
        return compared
