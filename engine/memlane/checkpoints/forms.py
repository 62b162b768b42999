"""Which form a checkpoint has, told by the names of its files alone."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from memlane.checkpoints.dcp import METADATA
from memlane.checkpoints.directory import CONFIG, DENSE, open_directory
from memlane.checkpoints.lingua import CONSOLIDATED, PARAMS, open_consolidated, open_dcp
from memlane.checkpoints.smlm import REST, open_smlm
from memlane.checkpoints.source import Checkpoint
from memlane.checkpoints.tokenizers import fit, given_tokenizer
from memlane.errors import CheckpointError

__all__ = ["checkpoint_directory", "detect", "open_checkpoint"]

logger = logging.getLogger(__name__)


def detect(path: str | Path) -> str:
    """ "memlane", "lingua", "lingua-dcp" or "smlm". Raises CheckpointError if the folder holds none of them."""
    directory = checkpoint_directory(path)
    if (directory / CONFIG).is_file():
        return "memlane"
    if (directory / REST).is_file():
        return "smlm"
    if _consolidated(directory) is not None:
        return "lingua"
    if (directory / METADATA).is_file():
        return "lingua-dcp"
    if (directory / DENSE).is_file():
        raise CheckpointError(directory, f"holds {DENSE} but no {CONFIG}: an unfinished model directory")
    raise CheckpointError(
        directory,
        f"holds no checkpoint: none of {CONFIG}, {REST}, {CONSOLIDATED} (with {PARAMS}), {METADATA}",
    )


def open_checkpoint(
    path: str | Path, tokenizer: str | Path | None = None, *, verify: bool = True
) -> Checkpoint:
    """The checkpoint in a folder of any known form. tokenizer: a tokenizer file or folder that replaces its own.

    verify: check files against the checksums they come with; some forms have them in a place that makes this read all.
    """
    form, directory = detect(path), checkpoint_directory(path)
    checkpoint = open_smlm(directory, verify=verify) if form == "smlm" else _READERS[form](directory)
    if tokenizer is not None:
        files = given_tokenizer(Path(tokenizer))
        config = fit(Path(tokenizer), checkpoint.config, files)
        checkpoint = dataclasses.replace(checkpoint, config=config, write_tokenizer=files.write)
    if checkpoint.write_tokenizer is None:
        logger.warning("%s comes without a tokenizer: prompts must be token ids", path)
    return checkpoint


def checkpoint_directory(path: str | Path) -> Path:
    """The folder meant by `path`; a file inside a checkpoint stands for its folder. CheckpointError if there is none."""
    path = Path(path).expanduser()
    if path.is_file() and path.name in (CONFIG, REST, CONSOLIDATED, METADATA):
        return path.parent
    if not path.exists():
        raise CheckpointError(path, "no such file or directory")
    if not path.is_dir():
        raise CheckpointError(path, "is not a checkpoint folder")
    return path


def _consolidated(directory: Path) -> Path | None:
    """The folder of consolidated.pth: `directory` itself, or the one that consolidation makes inside a step folder."""
    for folder in (directory, directory / "consolidated"):
        if (folder / CONSOLIDATED).is_file():
            return folder
    return None


def _open_lingua(directory: Path) -> Checkpoint:
    return open_consolidated(_consolidated(directory) or directory)


_READERS = {"memlane": open_directory, "lingua": _open_lingua, "lingua-dcp": open_dcp}
