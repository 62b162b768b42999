"""What Prometheus sees. The names are vLLM's with our prefix, so that its dashboards work after one replace.

The engine reports plain counters (ipc.Stats); `engine_metrics.py` turns them into samples. This module
holds what only the HTTP side can measure: times as clients feel them, how requests ended, HTTP itself.
"""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from memlane import ipc
from memlane.errors import ErrorKind
from memlane.request import RequestTiming, SamplingParams
from memlane_server import buckets
from memlane_server.engine_metrics import EngineCollector

LABELS: Final = ("model_name", "engine")
ENGINE: Final = "0"


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str, max_model_len: int = 2**17) -> None:
        """`max_model_len` bounds the buckets that count tokens of a request; unknown when we start."""
        # One more sample for each of hundreds, of use to nobody here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._names = {"model_name": model_name, "engine": ENGINE}
        self.engine = EngineCollector(self._names)
        self.registry.register(self.engine)

        tokens = buckets.up_to(max_model_len)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", buckets.FIRST_TOKEN
        )
        self._between = self._histogram(
            "inter_token_latency_seconds", "Time between tokens of one answer.", buckets.TOKEN
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first, once per answer.",
            buckets.TOKEN,
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "Arrival to last token.", buckets.REQUEST
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "Time waiting to be scheduled.", buckets.REQUEST
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", "First scheduled to last token.", buckets.REQUEST
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "First scheduled to first token.", buckets.REQUEST
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "First token to last token.", buckets.REQUEST
        )
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of the prompt.", tokens)
        self._generated = self._histogram("request_generation_tokens", "Tokens of the answer.", tokens)
        self._longest = self._histogram(
            "request_max_num_generation_tokens", "Most tokens asked for in one answer.", tokens
        )
        self._asked = self._histogram("request_params_max_tokens", "max_tokens of requests.", tokens)
        self._computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens not found in the prefix cache.", tokens
        )
        self._choices = self._histogram("request_params_n", "n of requests.", buckets.CHOICES)
        self._preemptions = self._histogram(
            "request_num_preemptions", "Times that an answer was preempted.", buckets.PREEMPTIONS
        )
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in one step.", buckets.STEP_TOKENS
        )
        self._success = Counter(
            "memlane:request_success",
            "Answers by how they ended.",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._refused = Counter(
            "memlane:admission_rejections",
            "Requests refused before they reached the engine.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(**self._names, finished_reason=reason)
        for reason in (ErrorKind.OVERLOADED, ErrorKind.NOT_READY):
            self._refused.labels(model_name, reason.value)

    def _histogram(
        self, name: str, text: str, edges: tuple[float, ...] | tuple[int, ...] | list[int]
    ) -> Histogram:
        metric = Histogram(f"memlane:{name}", text, LABELS, buckets=edges, registry=self.registry)
        return metric.labels(**self._names)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    # requests

    def accepted(self, n: int) -> None:
        """A request was admitted that asks for `n` answers to each prompt."""
        self._choices.observe(n)

    def sequence(self, prompt_tokens: int, params: SamplingParams) -> SequenceRecord:
        """Start measuring one accepted answer."""
        return SequenceRecord(self, prompt_tokens, params)

    def refused(self, kind: ErrorKind) -> None:
        self._refused.labels(self._names["model_name"], kind.value).inc()

    # engine_client.Observer

    def engine_started(self, ready: ipc.Ready) -> None:
        self.engine.started(ready)

    def engine_stats(self, stats: ipc.Stats) -> None:
        self.engine.update(stats)
        for tokens in stats.step_tokens:
            self._step_tokens.observe(tokens)

    def engine_ended(self) -> None:
        self.engine.ended()

    def sequence_timed(self, timing: RequestTiming) -> None:
        self._queue.observe(timing.queue)
        self._prefill.observe(timing.prefill)
        self._decode.observe(timing.decode)
        self._inference.observe(timing.prefill + timing.decode)
        self._preemptions.observe(timing.preemptions)
        self._computed.observe(timing.prompt_tokens_computed)

    # called by SequenceRecord

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._between.observe(seconds)

    def ended(self, record: SequenceRecord, reason: str) -> None:
        self._success.labels(**self._names, finished_reason=reason).inc()
        self._whole.observe(record.last - record.arrived)
        self._prompt.observe(record.prompt_tokens)
        self._generated.observe(record.generated)
        self._longest.observe(record.generated)
        if record.params.max_tokens is not None:
            self._asked.observe(record.params.max_tokens)
        if record.generated > 1 and record.first is not None:
            self._per_token.observe((record.last - record.first) / (record.generated - 1))


class SequenceRecord:
    """The life of one answer, from its arrival to exactly one end. Times are time.monotonic()."""

    def __init__(self, metrics: Metrics, prompt_tokens: int, params: SamplingParams) -> None:
        self.params = params
        self.prompt_tokens = prompt_tokens
        self.generated = 0
        self.arrived = self.last = time.monotonic()
        self.first: float | None = None
        self._metrics = metrics
        self._finished = False

    def tokens(self, count: int) -> None:
        """`count` more tokens have arrived together."""
        if not count:
            return
        now = time.monotonic()
        if self.first is None:
            self.first = now
            self._metrics.first_token(now - self.arrived)
        else:
            self._metrics.next_token(now - self.last)
        self.last = now
        self.generated += count

    def finish(self, reason: str) -> None:
        """Counts the first time only: an answer ends once."""
        if not self._finished:
            self._finished = True
            self.last = time.monotonic()
            self._metrics.ended(self, reason)
