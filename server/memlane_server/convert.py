"""`memlane convert`: needs torch, so it is kept apart from the commands that do not."""

from __future__ import annotations

from memlane.checkpoints import convert as write


def convert(source: str, destination: str, rows: str | None, tokenizer: str | None, overwrite: bool) -> int:
    """Returns the exit status. Raises CheckpointError or ConfigError, and leaves nothing half-written."""
    path = write(source, destination, rows=rows, tokenizer=tokenizer, overwrite=overwrite, progress=True)
    print(f"wrote {path}")
    return 0
