"""Names, types, buckets and labels of what Prometheus sees, and that the numbers move."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from running import Server

from memlane import ipc
from memlane_server.engine_metrics import TABLE_COUNTERS, TABLE_GAUGES
from memlane_server.metrics import Metrics

GAUGES = [
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
]
COUNTERS = [
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens"),
    *("prompt_tokens_by_source", "prompt_tokens_cached", "request_success"),
]
HISTOGRAMS = [
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "request_max_num_generation_tokens", "request_params_max_tokens"),
    *("request_prefill_kv_computed_tokens", "iteration_tokens_total", "request_params_n"),
    "request_num_preemptions",
]


def test_names_types_and_labels(shared: Server) -> None:
    shared.client.post("/v1/completions", json={"prompt": "say:abc"})
    families = {f.name: f for f in text_string_to_metric_families(shared.client.get("/metrics").text)}
    for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        for name in names:
            family = families[f"memlane:{name}"]
            assert family.type == kind, name
            assert family.documentation
            for sample in family.samples:
                assert sample.labels["model_name"] == "toy"
                assert sample.labels["engine"] == "0"
    assert families["memlane:admission_rejections"].type == "counter"
    edges = [
        s.labels["le"] for s in families["memlane:time_to_first_token_seconds"].samples if "le" in s.labels
    ]
    assert edges[:3] == ["0.001", "0.005", "0.01"]
    assert edges[-2:] == ["2560.0", "+Inf"]
    reasons = {s.labels["finished_reason"] for s in families["memlane:request_success"].samples}
    assert reasons == {"stop", "length", "abort", "error"}
    assert "process_resident_memory_bytes" in families
    assert families["http_requests"].type == "counter"


def test_one_request_is_measured(toy: Path) -> None:
    with Server(toy) as server:
        server.ready()
        server.client.post("/v1/completions", json={"prompt": "slow:abc", "n": 2})
        assert server.metric("memlane:request_success_total", finished_reason="stop") == 2
        assert server.metric("memlane:request_prompt_tokens_sum") == 16
        assert server.metric("memlane:request_params_n_sum") == 2
        assert server.metric("memlane:request_generation_tokens_sum") == 8
        assert server.metric("memlane:time_to_first_token_seconds_count") == 2
        assert server.metric("memlane:inter_token_latency_seconds_count") == 6
        assert server.metric("memlane:inter_token_latency_seconds_sum") > 6 * 0.025
        assert server.metric("memlane:request_queue_time_seconds_sum") == pytest.approx(0.002)
        assert server.metric("memlane:request_prefill_kv_computed_tokens_sum") == 8
        assert (
            server.metric("http_requests_total", handler="/v1/completions", method="POST", status="2xx") == 1
        )


def test_tables_are_visible_while_a_request_runs(toy: Path) -> None:
    with Server(toy) as server:
        server.ready()
        body = {"prompt": "slow:" + "x" * 100, "max_tokens": 100, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as running:
            lines = running.iter_lines()
            next(lines)
            labels = {"table": "values", "tier": "disk"}
            server.until(lambda: server.metric("memlane:table_rows_requested_total", **labels) > 50)
            assert server.metric("memlane:num_requests_running") == 1
            assert server.metric("memlane:table_cache_hit_ratio", **labels) == 0.5
            assert server.metric("memlane:table_bytes_read_total", **labels) > 5000
            assert server.metric("memlane:table_stall_seconds_total", **labels) == 0.5
            assert server.metric("memlane:table_resident_bytes", **labels) == 4096


def stats(tokens: int, hits: float) -> ipc.Stats:
    table = ipc.TableStats(table="values", tier="disk", counters={"hits": hits}, gauges={})
    return ipc.Stats(
        running=0,
        waiting=0,
        kv_blocks_used=1,
        kv_blocks_total=4,
        prefix_cache_queries=0,
        prefix_cache_hits=0,
        preemptions=0,
        steps=1,
        step_tokens=[3, 5],
        prompt_tokens=0,
        generation_tokens=tokens,
        tables=[table],
        resident_bytes=1,
    )


def test_counters_go_on_when_an_engine_is_replaced() -> None:
    metrics = Metrics("m")
    value = metrics.registry.get_sample_value
    labels = {"model_name": "m", "engine": "0"}
    place = labels | {"table": "values", "tier": "disk"}
    metrics.engine_stats(stats(10, 4))
    assert value("memlane:kv_cache_usage_perc", labels) == 0.25
    metrics.engine_ended()
    assert value("memlane:generation_tokens_total", labels) == 10
    assert value("memlane:kv_cache_usage_perc", labels) == 0
    metrics.engine_stats(stats(3, 1))
    metrics.engine_stats(stats(5, 2))
    assert value("memlane:generation_tokens_total", labels) == 15
    assert value("memlane:table_cache_hits_total", place) == 6
    assert value("memlane:iteration_tokens_total_count", labels) == 6


def test_every_counter_of_a_table_has_a_metric() -> None:
    fields = (Path(__file__).parents[2] / "engine/memlane/tables/stats.py").read_text()
    for name in [*TABLE_COUNTERS, *TABLE_GAUGES]:
        assert f"    {name}:" in fields, f"tables count no {name}"
    counted = [
        line.split(":")[0].strip() for line in fields.splitlines() if ": int" in line or ": float" in line
    ]
    assert set(counted) == {*TABLE_COUNTERS, *TABLE_GAUGES}
