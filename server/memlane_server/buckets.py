"""Bucket edges of all histograms: those of vLLM, so that its dashboards fit."""

from __future__ import annotations

from typing import Final

# A first token may come within a millisecond (tiny model) or after a 100 k prompt.
FIRST_TOKEN: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
# Readers notice gaps above about 0.1 s.
TOKEN: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
# Whole requests.
REQUEST: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# Tokens of one step: powers of two up to the largest budgets in use.
STEP_TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES: Final = (1, 2, 5, 10, 20)
PREEMPTIONS: Final = (1, 2, 3, 4, 5, 10, 20)
# HTTP exchanges: the default edges of the usual FastAPI instrumentation.
HTTP_SECONDS: Final = (0.1, 0.5, 1.0)


def up_to(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 … up to and including the last not above `limit`."""
    edges = []
    scale = 1
    while scale <= limit:
        edges += [m * scale for m in (1, 2, 5) if m * scale <= limit]
        scale *= 10
    return edges or [1]
