"""From what the user names as a model to a model directory: foreign checkpoints are converted once and kept."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memlane.checkpoints.converter import convert
from memlane.checkpoints.directory import CONFIG
from memlane.checkpoints.forms import checkpoint_directory, detect
from memlane.errors import CheckpointError

__all__ = ["cache_directory", "cache_root", "resolve"]

_CONVERTER = "2"  # change when convert would write something else for the same source

logger = logging.getLogger(__name__)


def resolve(path: str | Path, *, tokenizer: str | Path | None = None, progress: bool = True) -> Path:
    """The model directory for `path`: itself if it is one, else its conversion in the cache directory, made if needed.

    A conversion is known by the path, sizes and times of the source's files, so that a changed source converts anew.
    tokenizer: for conversions only; a model directory is returned as it is.
    Several processes may ask at once: one converts, the others wait. Raises CheckpointError.
    """
    source = checkpoint_directory(path)
    if detect(source) == "memlane":
        return source
    root = cache_directory()
    name = source.resolve().name.strip(".") or "model"
    target = root / f"{name}-{_fingerprint(source, tokenizer)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{target.name}.lock"):
            if not (target / CONFIG).is_file():
                _remove_partial(target)
                logger.info("converting %s once into %s", source, target)
                convert(source, target, tokenizer=tokenizer, progress=progress)
    except OSError as error:
        raise CheckpointError(root, f"the cache directory cannot be used: {error.strerror}") from error
    return target


def _remove_partial(target: Path) -> None:
    """Remove what conversions that were killed left behind. Called with the lock held: none of them is still running."""
    for left in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def cache_root() -> Path:
    """$MEMLANE_CACHE, or ~/.cache/memlane: everything that can be made again."""
    return Path(os.environ.get("MEMLANE_CACHE") or "~/.cache/memlane").expanduser()


def cache_directory() -> Path:
    """Where converted models lie."""
    return cache_root() / "models"


def _fingerprint(source: Path, tokenizer: str | Path | None) -> str:
    digest = hashlib.sha256(f"{_CONVERTER}\0{source.resolve()}".encode())
    roots = [source] if tokenizer is None else [source, Path(tokenizer)]
    for root in roots:
        for file in sorted([root] if root.is_file() else root.rglob("*")):
            if file.is_file():
                stat = file.stat()
                digest.update(f"\0{file}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system drops it if this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
