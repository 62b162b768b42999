"""Reading foreign checkpoints, and reading and writing our own model directories. No pickle is ever executed."""

from memlane.checkpoints.cache import resolve
from memlane.checkpoints.checker import ModelReport, check
from memlane.checkpoints.converter import convert, save
from memlane.checkpoints.directory import open_directory, read_config, verify
from memlane.checkpoints.forms import detect, open_checkpoint
from memlane.checkpoints.source import Checkpoint

__all__ = [
    "Checkpoint",
    "ModelReport",
    "check",
    "convert",
    "detect",
    "open_checkpoint",
    "open_directory",
    "read_config",
    "resolve",
    "save",
    "verify",
]
