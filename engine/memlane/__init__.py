"""memlane: serve language models whose knowledge sits in lookup tables.

`from memlane import LLM, SamplingParams`. Importing memlane does not import torch; using LLM does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlane.config import EngineConfig
    from memlane.llm import LLM
    from memlane.request import SamplingParams

__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]

__version__ = "0.1.0"

_HOME = {"LLM": "memlane.llm", "EngineConfig": "memlane.config", "SamplingParams": "memlane.request"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'memlane' has no attribute {name!r}")
