"""Carries out a step: batch tensors, paged attention, sampling. Mechanics only: no queues, no policy."""

from memlane.runner.attention import AttentionBackend, choose_backend
from memlane.runner.decode_batch import DecodeBatch, DecodeBatches, resolve
from memlane.runner.kv import KVCache
from memlane.runner.overlap import DecodeSplit
from memlane.runner.runner import Runner
from memlane.runner.sampler import Sampled, sample

__all__ = [
    "AttentionBackend",
    "DecodeBatch",
    "DecodeBatches",
    "DecodeSplit",
    "KVCache",
    "Runner",
    "Sampled",
    "choose_backend",
    "resolve",
    "sample",
]
