"""Carries out a step: batch tensors, paged attention, sampling. Mechanics only: no queues, no policy."""

from memlane.runner.attention import AttentionBackend, choose_backend
from memlane.runner.batch import resolve
from memlane.runner.decode_batch import DecodeBatch, DecodeBatches
from memlane.runner.kv import KVCache
from memlane.runner.overlap import DecodeSplit
from memlane.runner.runner import Runner
from memlane.runner.sampler import Pending, Sampled

__all__ = [
    "AttentionBackend",
    "DecodeBatch",
    "DecodeBatches",
    "DecodeSplit",
    "KVCache",
    "Pending",
    "Runner",
    "Sampled",
    "choose_backend",
    "resolve",
]
