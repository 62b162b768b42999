"""`memlane check`: what the checker found, in sentences or as one JSON object. Needs torch, so it is kept apart."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from memlane.checkpoints import ModelReport
from memlane.checkpoints import check as examine
from memlane.checkpoints.checker import RowSpan, TableComparison, TableReport


def check(model: str, against: str | None, as_json: bool) -> int:
    """Prints the report and returns the exit status. Raises CheckpointError or ConfigError where nothing was checked."""
    report = examine(model, against=against, progress=True)
    if as_json:
        # infinities (a row that is not finite) become null: JSON has none
        found = {
            "clean": report.clean,
            "bytes_per_second": _speed(report),
            **msgspec.to_builtins(report, enc_hook=str),
        }
        print(msgspec.json.encode(found).decode())
    else:
        for line in _sentences(report, against):
            print(line)
    return 0 if report.clean else 1


def _sentences(report: ModelReport, against: str | None) -> Iterator[str]:
    for file in report.files:
        yield f"{file.name}: {file.defect or 'ok (SHA-256)'}"
    for table in report.tables:
        yield from _about_table(table, against)
    speed = f"{report.nbytes / 1e9:.2f} GB read in {report.seconds:.1f} s, {_speed(report) / 1e9:.2f} GB/s"
    yield f"{report.directory}: {'no damage found' if report.clean else 'DAMAGED'} ({speed})"
    if not report.has_checksum_file:
        yield "There is no memlane-checksums.json: files other than tables were only opened."
    for table in report.tables:
        if table.scan is not None and table.verified_by == "size":
            yield f"Table {table.name} has no checksums: only its size was checked. `memlane convert` writes them."


def _about_table(table: TableReport, against: str | None) -> Iterator[str]:
    title = f"table {table.name} ({table.file})"
    if table.defect is not None:
        yield f"{title}: {table.defect}"
    if table.scan is None:
        return
    how = {"blocks": "every block verified", "sha256": "SHA-256 of the file verified", "size": "size checked"}
    if table.clean:
        yield f"{title}: ok, {table.rows:,} {table.row_format} rows, {how[table.verified_by]}"
    for bad in table.scan.bad_blocks:
        blocks = f"block {bad.first}" if bad.first == bad.last else f"blocks {bad.first}-{bad.last}"
        yield f"{title}: {_rows(bad.rows)}: {blocks} {bad.defect}"
    for span in table.scan.bad_scales:
        yield f"{title}: {_rows(span)}: scale is not a finite number"
    if table.comparison is not None:
        yield f"{title}: against {against}: {_error(table.comparison)}"
    elif against is not None:
        yield f"{title}: not compared with {against}: the model is damaged"


def _rows(span: RowSpan) -> str:
    return f"row {span.first}" if span.first == span.last else f"rows {span.first}-{span.last}"


def _error(comparison: TableComparison) -> str:
    return (
        f"RMS error {comparison.rms_error:.3g} of the rows' RMS, largest error of a row "
        f"{comparison.worst_error:.3g} of its length (row {comparison.worst_row}), "
        f"mean cosine {comparison.mean_cosine:.6f}"
    )


def _speed(report: ModelReport) -> float:
    """Bytes a second."""
    return report.nbytes / max(report.seconds, 1e-9)
