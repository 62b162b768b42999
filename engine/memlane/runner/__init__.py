"""Carries out a step: batch tensors, paged attention, sampling. Mechanics only: no queues, no policy."""

from memlane.runner.kv import KVCache
from memlane.runner.overlap import DecodeSplit
from memlane.runner.runner import Runner
from memlane.runner.sampler import Pending, Sampled

__all__ = ["DecodeSplit", "KVCache", "Pending", "Runner", "Sampled"]
