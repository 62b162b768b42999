"""Which tokens run next. Policy only: no tensors, no text, no torch."""

from memlane.scheduler.blocks import BlockPool
from memlane.scheduler.plan import Chunk, StepPlan
from memlane.scheduler.scheduler import Scheduler
from memlane.scheduler.sequence import Sequence

__all__ = ["BlockPool", "Chunk", "Scheduler", "Sequence", "StepPlan"]
