"""Carries out a step: batch tensors, paged attention, sampling. Mechanics only: no queues, no policy."""

from memlane.runner.kv import KVCache
from memlane.runner.runner import Runner
from memlane.runner.sampler import Sampled, sample

__all__ = ["KVCache", "Runner", "Sampled", "sample"]
