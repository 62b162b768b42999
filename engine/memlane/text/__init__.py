"""Text in, token ids out, and back: tokeniser, incremental detokeniser, chat templates.

Used by the HTTP process and by the offline API. Knows nothing about tensors, queues or HTTP.
"""

from __future__ import annotations

from memlane.text.chat import ChatTemplate
from memlane.text.detokenize import Detokenizer
from memlane.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer"]
