"""Attention over the KV cache: what a library computes, or torch's scaled_dot_product_attention."""

from memlane.runner.attention.choice import DEFAULT_BLOCK_SIZE, choose_backend
from memlane.runner.attention.protocol import AttentionBackend
from memlane.runner.attention.sdpa import SdpaBackend

__all__ = ["DEFAULT_BLOCK_SIZE", "AttentionBackend", "SdpaBackend", "choose_backend"]
