"""Transformers with memory layers. Rows are reached only through the `Table` protocol; nothing here knows where they lie."""

from memlane.models.attention import Attention, CausalAttention
from memlane.models.config import MemoryConfig, ModelConfig
from memlane.models.memory import MemoryLayer
from memlane.models.product_keys import Selection, search, search_reference, select, select_reference
from memlane.models.transformer import Transformer

__all__ = [
    "Attention",
    "CausalAttention",
    "MemoryConfig",
    "MemoryLayer",
    "ModelConfig",
    "Selection",
    "Transformer",
    "search",
    "search_reference",
    "select",
    "select_reference",
]
